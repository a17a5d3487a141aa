#include "allocmoe-estimator.h"

#include "llama-hparams.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>

ggml_type allocmoe_matrices::down_type() const {
    return n_embd % ggml_blck_size(GGML_TYPE_Q4_0) == 0 ? GGML_TYPE_Q4_0 : GGML_TYPE_F16;
}

int64_t allocmoe_matrices::n_columns() const {
    return GGML_PAD(rank, ggml_blck_size(GGML_TYPE_Q4_0));
}

size_t allocmoe_matrices::down_bytes() const {
    return n_down * ggml_row_size(down_type(), n_embd);
}

size_t allocmoe_matrices::up_bytes() const {
    return n_embd * ggml_row_size(GGML_TYPE_Q4_0, n_columns());
}

static bool in_range(const float * values, size_t n) {
    return std::all_of(values, values + n, [](float x) { return std::isfinite(x) && std::abs(x) <= ALLOCMOE_LARGEST; });
}

bool allocmoe_in_range(const allocmoe_estimator & e, int32_t n_layer, int32_t n_expert, int32_t n_embd) {
    const size_t experts = (size_t) n_layer * n_expert;
    const size_t columns = (size_t) n_layer * n_embd;
    return in_range(e.down, columns * e.n_down) && in_range(e.log_norm, experts * (e.n_down + 1)) && in_range(e.output, experts * e.rank) &&
           in_range(e.up, columns * e.rank);
}

static bool bytes_in_range(ggml_type type, const std::vector<uint8_t> & bytes) {
    // float16 values, or one at the start of every block of Q4_0
    const size_t step = ggml_type_size(type);
    for (size_t i = 0; i < bytes.size(); i += step) {
        ggml_fp16_t bits;
        memcpy(&bits, bytes.data() + i, sizeof(bits));
        if (!std::isfinite(ggml_fp16_to_fp32(bits))) {
            return false;
        }
    }
    return true;
}

const char * allocmoe_matrices_fault(const allocmoe_matrices & m) {
    if (m.n_down < 1 || m.n_down > INT16_MAX || m.rank < 0 || m.rank > m.n_down || m.n_relu < 0 || m.n_relu > m.n_down - m.rank) {
        return "estimator: n_down, rank and n_relu contradict each other";
    }
    if (!bytes_in_range(m.down_type(), m.down)) {
        return "estimator.down: found a number beyond the range of float16";
    }
    if (!bytes_in_range(GGML_TYPE_Q4_0, m.up)) {
        return "estimator.up: found a number beyond the range of float16";
    }
    if (!in_range(m.log_norm.data(), m.log_norm.size())) {
        return "estimator.log_norm: found a number beyond the range of float16";
    }
    if (!in_range(m.output.data(), m.output.size())) {
        return "estimator.output: found a number beyond the range of float16";
    }
    return nullptr;
}

static void append_rows(std::vector<uint8_t> & bytes, ggml_type type, const float * rows, int64_t n_rows, int64_t n) {
    const size_t begin = bytes.size();
    bytes.resize(begin + n_rows * ggml_row_size(type, n));
    ggml_quantize_chunk(type, rows, bytes.data() + begin, 0, n_rows, n, nullptr);
}

allocmoe_matrices allocmoe_round(const allocmoe_estimator & estimator, int32_t n_layer, int32_t n_expert, int32_t n_embd) {
    allocmoe_matrices m;
    m.n_down   = estimator.n_down;
    m.rank     = estimator.rank;
    m.n_relu   = estimator.n_relu;
    m.n_expert = n_expert;
    m.n_embd   = n_embd;
    m.log_norm.assign(estimator.log_norm, estimator.log_norm + (size_t) n_layer * n_expert * (m.n_down + 1));
    m.output.assign(estimator.output, estimator.output + (size_t) n_layer * n_expert * m.rank);

    const int64_t n_columns = m.n_columns();
    std::vector<float> transposed(n_columns * n_embd);
    for (int32_t il = 0; il < n_layer; ++il) {
        m.entry.push_back(il);
        append_rows(m.down, m.down_type(), estimator.down + (size_t) il * m.n_down * n_embd, m.n_down, n_embd);
        for (int64_t i = 0; i < (int64_t) m.rank * n_embd; ++i) {
            transposed[i % n_embd * n_columns + i / n_embd] = estimator.up[(size_t) il * m.rank * n_embd + i];
        }
        if (m.rank > 0) {
            append_rows(m.up, GGML_TYPE_Q4_0, transposed.data(), n_embd, n_columns);
        }
    }
    return m;
}

// For tensors that nodes beside layer il's router read.
static ggml_backend_buffer_type_t type_beside_router(const llama_model & model, int32_t il) {
    const auto * router = model.layers[il].ffn_gate_inp;
    auto * type         = router && router->buffer ? ggml_backend_buffer_get_type(router->buffer) : nullptr;
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
        ggml_context_ptr meta(ggml_init({ 3 * ggml_tensor_overhead(), nullptr, true }));
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

std::shared_ptr<const allocmoe_estimates> allocmoe_upload(const allocmoe_matrices & m, const llama_model & model) {
    auto estimates = std::make_shared<allocmoe_estimates>();
    estimates->layers.resize(m.entry.size());
    estimates->n_relu = m.n_relu;

    const ggml_type down_type = m.down_type();
    const int64_t n_columns   = m.n_columns();

    std::map<ggml_backend_buffer_type_t, ggml_context *> meta_by_type;
    const auto new_matrix = [&](ggml_backend_buffer_type_t buft, ggml_type type, int64_t n_in, int64_t n_out) {
        auto *& meta = meta_by_type[buft];
        if (!meta) {
            meta = ggml_init({ 4 * m.entry.size() * ggml_tensor_overhead(), nullptr, true });
            estimates->contexts.emplace_back(meta);
        }
        return ggml_new_tensor_2d(meta, type, n_in, n_out);
    };
    for (size_t il = 0; il < m.entry.size(); ++il) {
        if (m.entry[il] < 0) {
            continue;
        }
        auto * type    = type_beside_router(model, il);
        auto & layer   = estimates->layers[il];
        layer.down     = new_matrix(type_for_products(type, down_type, m.n_embd, m.n_down), down_type, m.n_embd, m.n_down);
        layer.log_norm = new_matrix(type, GGML_TYPE_F32, m.n_down + 1, m.n_expert);
        layer.output   = m.rank > 0 ? new_matrix(type, GGML_TYPE_F32, m.rank, m.n_expert) : nullptr;
        layer.up       = m.rank > 0 ? new_matrix(type_for_products(type, GGML_TYPE_Q4_0, n_columns, m.n_embd), GGML_TYPE_Q4_0, n_columns, m.n_embd) : nullptr;
        ggml_format_name(layer.down, "allocmoe.down-%zu", il);
    }
    for (const auto & [type, meta] : meta_by_type) {
        auto * buffer = ggml_backend_alloc_ctx_tensors_from_buft(meta, type);
        if (!buffer) {
            return nullptr;
        }
        ggml_backend_buffer_set_usage(buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        estimates->buffers.emplace_back(buffer);
    }
    for (size_t il = 0; il < m.entry.size(); ++il) {
        const size_t entry = m.entry[il];
        auto & layer       = estimates->layers[il];
        if (m.entry[il] < 0) {
            continue;
        }
        ggml_backend_tensor_set(layer.down, m.down.data() + entry * m.down_bytes(), 0, m.down_bytes());
        ggml_backend_tensor_set(layer.log_norm, m.log_norm.data() + entry * m.n_expert * (m.n_down + 1), 0, ggml_nbytes(layer.log_norm));
        if (m.rank > 0) {
            ggml_backend_tensor_set(layer.up, m.up.data() + entry * m.up_bytes(), 0, m.up_bytes());
            ggml_backend_tensor_set(layer.output, m.output.data() + entry * m.n_expert * m.rank, 0, ggml_nbytes(layer.output));
        }
    }
    return estimates;
}
