// Matrices of floats, as routers are, by any number of tokens. A token's result is the same, bit for bit, whether it comes alone
// or with others: so a router gives it the same experts. llama.cpp adds in another order where there are several.

#include "allocmoe-cpu.h"
#include "allocmoe-floats.h"

#include <algorithm>

bool allocmoe_mul_mat_floats(const ggml_compute_params * params, ggml_tensor * dst) {
#if defined(ALLOCMOE_SIMD)
    using namespace allocmoe;

    constexpr int64_t LINES = 4, TOKENS = N_SUMS / LINES, BLOCK = 64, MAX_LINES = 1024;
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    if (!allocmoe_cpu_kernels || params->use_ref || src0->type != GGML_TYPE_F32 || src1->type != GGML_TYPE_F32 || src0->ne[1] > MAX_LINES ||
        ggml_get_op_params_i32(dst, 1) == GGML_HINT_SRC0_IS_HADAMARD || // for which llama.cpp has a fast transform
        src0->ne[2] != 1 || src1->ne[2] != 1 || src0->ne[3] != 1 || src1->ne[3] != 1 || src0->nb[0] != sizeof(float) || src1->nb[0] != sizeof(float)) {
        return false;
    }
    const int64_t n_lines = src0->ne[1], n_tokens = src1->ne[1];
    const int64_t of_lines = (n_lines + LINES - 1) / LINES, of_tokens = (n_tokens + BLOCK - 1) / BLOCK;
    for (int64_t i = params->ith; i < of_lines * of_tokens; i += params->nth) {
        const int64_t line0 = i % of_lines * LINES, token0 = i / of_lines * BLOCK, token1 = std::min(token0 + BLOCK, n_tokens);
        const float * lines[LINES];
        for (int64_t j = 0; j < LINES; ++j) {
            lines[j] = (const float *) ((const char *) src0->data + std::min(line0 + j, n_lines - 1) * src0->nb[1]);
        }
        for (int64_t token = token0; token < token1; token += TOKENS) {
            const float * inputs[TOKENS];
            for (int64_t t = 0; t < TOKENS; ++t) {
                inputs[t] = (const float *) ((const char *) src1->data + std::min(token + t, token1 - 1) * src1->nb[1]);
            }
            float products[N_SUMS];
            multiply<LINES>(lines, inputs, src0->ne[0], products);
            for (int64_t t = 0; t < std::min(TOKENS, token1 - token); ++t) {
                auto * out = (float *) ((char *) dst->data + (token + t) * dst->nb[1]);
                for (int64_t j = 0; j < std::min(LINES, n_lines - line0); ++j) {
                    out[line0 + j] = products[j * TOKENS + t];
                }
            }
        }
    }
    return true;
#else
    GGML_UNUSED(params);
    GGML_UNUSED(dst);
    return false;
#endif
}
