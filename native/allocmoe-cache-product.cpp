// Attention without flash attention on the CPU: keys by queries, and values by probabilities, of a few tokens. Heads that share keys
// and values are computed together: a line of the key-value cache is read and converted to floats once for several of them.
//
// A token's result is the same, bit for bit, whether it comes alone or with others, MAX_TOKENS at most. Longer parts of prompts go
// llama.cpp's way, which rounds queries and probabilities to half precision.

#include "allocmoe-cpu.h"
#include "allocmoe-floats.h"

#include <algorithm>

namespace {

#if defined(ALLOCMOE_SIMD)
using namespace allocmoe;

constexpr int64_t MAX_TOKENS = 32; // a draft and the token before it

constexpr int64_t BLOCK = 64; // lines of the cache that a thread takes at once

// Lines line0 to line1 of a matrix by the heads that share it, n_heads from head0 on, of all tokens: n_columns in all.
template <int LINES>
void multiply_block(ggml_tensor * dst, const char * matrix, int64_t line0, int64_t line1, int64_t head0, int64_t n_heads, int64_t n_columns) {
    constexpr int HEADS      = N_SUMS / LINES;
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    const auto column_of     = [&](const ggml_tensor * x, int64_t column) {
        return (char *) x->data + (head0 + column % n_heads) * x->nb[2] + column / n_heads * x->nb[1];
    };
    for (int64_t c = 0; c < n_columns; c += HEADS) {
        const int64_t n_here = std::min<int64_t>(HEADS, n_columns - c);
        const float * heads[HEADS];
        for (int64_t i = 0; i < HEADS; ++i) {
            heads[i] = (const float *) column_of(src1, c + std::min(i, n_here - 1)); // where there are fewer, the last one again
        }
        for (int64_t line = line0; line < line1; line += LINES) {
            const ggml_fp16_t * lines[LINES];
            for (int64_t i = 0; i < LINES; ++i) {
                lines[i] = (const ggml_fp16_t *) (matrix + std::min(line + i, line1 - 1) * src0->nb[1]);
            }
            float products[N_SUMS];
            multiply<LINES>(lines, heads, src0->ne[0], products);
            for (int64_t i = 0; i < n_here; ++i) {
                auto * out = (float *) column_of(dst, c + i);
                for (int64_t j = 0; j < std::min<int64_t>(LINES, line1 - line); ++j) {
                    out[line + j] = products[j * HEADS + i];
                }
            }
        }
    }
}
#endif

} // namespace

bool allocmoe_mul_mat_cache(const ggml_compute_params * params, ggml_tensor * dst) {
#if defined(ALLOCMOE_SIMD)
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    const int64_t n_heads    = src1->ne[2] / src0->ne[2]; // that share a matrix
    if (!allocmoe_cpu_kernels || params->use_ref || src0->type != GGML_TYPE_F16 || src1->type != GGML_TYPE_F32 || (n_heads < 2 && src0->ne[2] < 2) || src1->ne[1] > MAX_TOKENS ||
        src0->ne[3] != 1 || src1->ne[3] != 1 || src0->nb[0] != sizeof(ggml_fp16_t) || src1->nb[0] != sizeof(float)) {
        return false; // a matrix by itself is no cache: weights in half precision
    }
    const int64_t n_columns = n_heads * src1->ne[1];
    const auto run          = n_columns == 1 ? multiply_block<N_SUMS> : n_columns > N_SUMS / 4 ? multiply_block<2>
                                                                                               : multiply_block<4>;
    const int64_t n_blocks  = (src0->ne[1] + BLOCK - 1) / BLOCK;
    for (int64_t i = params->ith; i < n_blocks * src0->ne[2]; i += params->nth) {
        const int64_t i2    = i / n_blocks;
        const int64_t line0 = i % n_blocks * BLOCK, line1 = std::min(line0 + BLOCK, src0->ne[1]);
        const char * matrix = (const char *) src0->data + i2 * src0->nb[2];
        run(dst, matrix, line0, line1, i2 * n_heads, n_heads, n_columns);
    }
    return true;
#else
    GGML_UNUSED(params);
    GGML_UNUSED(dst);
    return false;
#endif
}
