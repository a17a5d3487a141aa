#include "allocmoe-estimator.h"

#include "llama-hparams.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <map>

// For tensors that nodes beside layer il's router read.
static ggml_backend_buffer_type_t type_beside_router(const llama_model & model, int32_t il) {
    const auto * router = model.layers[il].ffn_gate_inp;
    auto       * type   = router && router->buffer ? ggml_backend_buffer_get_type(router->buffer) : nullptr;
    if (!type || ggml_backend_buft_is_host(type)) {
        return ggml_backend_cpu_buffer_type();
    }
    return ggml_backend_dev_buffer_type(ggml_backend_buft_get_device(type));
}

// Where on the CPU products with a matrix are quickest: in a buffer type that repacks it, if there is one for such a matrix.
static ggml_backend_buffer_type_t type_for_products(ggml_backend_buffer_type_t plain, ggml_type type, int64_t n_in, int64_t n_out) {
    if (plain != ggml_backend_cpu_buffer_type()) {
        return plain;
    }
    auto * device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    auto * proc   = ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts");
    if (!proc) {
        return plain;
    }
    for (auto * extra = ((ggml_backend_dev_get_extra_bufts_t) proc)(device); extra && *extra; ++extra) {
        ggml_context_ptr meta(ggml_init({ 3*ggml_tensor_overhead(), nullptr, true }));
        ggml_tensor * matrix  = ggml_new_tensor_2d(meta.get(), type, n_in, n_out);
        ggml_tensor * product = ggml_mul_mat(meta.get(), matrix, ggml_new_tensor_1d(meta.get(), GGML_TYPE_F32, n_in));
        ggml_backend_buffer_ptr empty(ggml_backend_buft_alloc_buffer(*extra, 0));
        matrix->buffer = empty.get();
        if (ggml_backend_dev_supports_op(device, product)) {
            return *extra;
        }
    }
    return plain;
}

// Sets a matrix of F16 or Q4_0.
static void set_converted(ggml_tensor * tensor, const float * values) {
    std::vector<char> data(ggml_nbytes(tensor));
    ggml_quantize_chunk(tensor->type, values, data.data(), 0, tensor->ne[1], tensor->ne[0], nullptr);
    ggml_backend_tensor_set(tensor, data.data(), 0, data.size());
}

int32_t allocmoe_make_estimates(const llama_model & model, const allocmoe_estimator & estimator, int32_t n_layer, int32_t n_expert, int32_t n_embd, std::shared_ptr<const allocmoe_estimates> & made) {
    const auto & hparams = model.hparams;
    if (n_layer != (int32_t) hparams.n_layer_all) {
        return ALLOCMOE_ERR_N_LAYER;
    }
    const int64_t n_down = estimator.n_down;
    const int64_t rank   = estimator.rank;
    const int64_t n_relu = estimator.n_relu;
    if (n_expert != (int32_t) hparams.n_expert || n_embd != (int32_t) hparams.n_embd || n_down < 1 || n_down > INT16_MAX ||
        rank < 0 || rank > n_down || n_relu < 0 || n_relu > n_down - rank) {
        return ALLOCMOE_ERR_ESTIMATOR;
    }
    const auto finite = [](const float * values, int64_t n) {
        return std::all_of(values, values + n, [](float x) { return std::isfinite(x) && std::abs(x) < 65504.0f; });
    };
    if (!finite(estimator.down, n_layer*n_down*n_embd) || !finite(estimator.log_norm, (int64_t) n_layer*n_expert*(n_down + 1)) ||
        !finite(estimator.output, n_layer*n_expert*rank) || !finite(estimator.up, n_layer*rank*n_embd)) {
        return ALLOCMOE_ERR_ESTIMATOR;
    }

    auto estimates = std::make_shared<allocmoe_estimates>();
    estimates->layers.resize(n_layer);
    estimates->n_relu = n_relu;

    // whole blocks; float16 would be multiplied 64 columns at a time or one by one
    const int64_t   n_block   = ggml_blck_size(GGML_TYPE_Q4_0);
    const int64_t   n_columns = GGML_PAD(rank, n_block);
    const ggml_type down_type = n_embd % n_block == 0 ? GGML_TYPE_Q4_0 : GGML_TYPE_F16;

    std::map<ggml_backend_buffer_type_t, ggml_context *> meta_by_type;
    const auto new_matrix = [&](ggml_backend_buffer_type_t buft, ggml_type type, int64_t n_in, int64_t n_out) {
        auto *& meta = meta_by_type[buft];
        if (!meta) {
            meta = ggml_init({ 4*n_layer*ggml_tensor_overhead(), nullptr, true });
            estimates->contexts.emplace_back(meta);
        }
        return ggml_new_tensor_2d(meta, type, n_in, n_out);
    };
    for (int32_t il = 0; il < n_layer; ++il) {
        auto * type  = type_beside_router(model, il);
        auto & layer = estimates->layers[il];
        layer.down     = new_matrix(type_for_products(type, down_type, n_embd, n_down), down_type, n_embd, n_down);
        layer.log_norm = new_matrix(type, GGML_TYPE_F32, n_down + 1, n_expert);
        layer.output   = rank > 0 ? new_matrix(type, GGML_TYPE_F32, rank, n_expert) : nullptr;
        layer.up       = rank > 0 ? new_matrix(type_for_products(type, GGML_TYPE_Q4_0, n_columns, n_embd), GGML_TYPE_Q4_0, n_columns, n_embd) : nullptr;
        ggml_format_name(layer.down, "allocmoe.down-%d", il);
    }
    for (const auto & [type, meta] : meta_by_type) {
        auto * buffer = ggml_backend_alloc_ctx_tensors_from_buft(meta, type);
        if (!buffer) {
            return ALLOCMOE_ERR_MEMORY;
        }
        ggml_backend_buffer_set_usage(buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        estimates->buffers.emplace_back(buffer);
    }

    std::vector<float> transposed(n_columns*n_embd);
    for (int32_t il = 0; il < n_layer; ++il) {
        auto & layer = estimates->layers[il];
        set_converted(layer.down, estimator.down + il*n_down*n_embd);
        ggml_backend_tensor_set(layer.log_norm, estimator.log_norm + il*n_expert*(n_down + 1), 0, ggml_nbytes(layer.log_norm));
        if (rank == 0) {
            continue;
        }
        for (int64_t i = 0; i < rank*n_embd; ++i) {
            transposed[i%n_embd*n_columns + i/n_embd] = estimator.up[il*rank*n_embd + i];
        }
        set_converted(layer.up, transposed.data());
        ggml_backend_tensor_set(layer.output, estimator.output + il*n_expert*rank, 0, ggml_nbytes(layer.output));
    }
    made = std::move(estimates);
    return ALLOCMOE_OK;
}
