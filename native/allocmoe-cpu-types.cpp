// Which operands the kernels of ggml's CPU backend take. A file may store any tensor in any type; upstream finds out in the
// midst of a graph, and ends the process.

#include "allocmoe-cpu.h"

#include "ggml-cpu.h"

static bool is_float(const ggml_tensor * tensor) {
    return tensor->type == GGML_TYPE_F32;
}

static bool is_float_or_half(const ggml_tensor * tensor) {
    return is_float(tensor) || tensor->type == GGML_TYPE_F16 || tensor->type == GGML_TYPE_BF16;
}

static bool is_quantized(const ggml_tensor * tensor) {
    return ggml_is_quantized(tensor->type) && ggml_get_type_traits(tensor->type)->to_float;
}

// ADD, SUB, MUL, DIV: as in ggml's binary-ops.cpp
static bool has_binary_kernel(const ggml_tensor * op) {
    const ggml_tensor * a = op->src[0];
    const ggml_tensor * b = op->src[1];
    if (op->op == GGML_OP_ADD && is_quantized(a)) {
        return is_float(b);
    }
    return is_float_or_half(a) && (is_float(b) ? op->type == a->type || is_float(op) : b->type == a->type && op->type == a->type);
}

bool allocmoe_has_kernel(const ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_ADD:
        case GGML_OP_SUB:
        case GGML_OP_MUL:
        case GGML_OP_DIV:
            return has_binary_kernel(op);
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID:
            return ggml_get_type_traits_cpu(op->src[0]->type)->vec_dot != nullptr;
        case GGML_OP_GET_ROWS:
            return is_float_or_half(op->src[0]) || op->src[0]->type == GGML_TYPE_I32 || is_quantized(op->src[0]);
        case GGML_OP_UNARY:
            return is_float_or_half(op->src[0]);
        case GGML_OP_ADD_ID:
            return is_float(op->src[0]) && is_float(op->src[1]); // and ids
        case GGML_OP_SSM_CONV:
        case GGML_OP_SSM_SCAN:
        case GGML_OP_RWKV_WKV6:
        case GGML_OP_RWKV_WKV7:
            for (int i = 0; i < 6; ++i) { // a seventh operand of SSM_SCAN is ids
                if (op->src[i] && !is_float(op->src[i])) {
                    return false;
                }
            }
            return true;
        default:
            return true;
    }
}
