// Products of a few tokens with the key-value cache without flash attention: keys by queries, and values by probabilities.
// Heads that share keys and values (grouped queries; with latent attention, all of them), of all tokens, are multiplied together:
// a line of the cache is read and converted from half precision once for up to 8 of them. llama.cpp does it once for each.
//
// A token's result is the same, bit for bit, whether it comes alone or with others: so a draft is verified by the numbers that
// plain decoding would have. llama.cpp rounds queries and probabilities to half precision where there are several tokens.

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined operands inside its own AVX-512 intrinsics for ours
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "allocmoe-cpu.h"

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"

#include <algorithm>
#include <cmath>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
#define ALLOCMOE_SIMD
using vec           = __m512;
constexpr int LANES = 16, N_SUMS = 16;
inline vec zero() { return _mm512_setzero_ps(); }
inline vec load(const float * x) { return _mm512_loadu_ps(x); }
inline vec load(const ggml_fp16_t * x) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) x)); }
inline vec multiply_add(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
// out[i]: the sum of a[i]
inline void add_up(const vec * a, float * out) {
    vec b[8], c[4], d[2];
    for (int i = 0; i < 8; ++i) {
        b[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
    }
    for (int i = 0; i < 4; ++i) {
        const __m512d x = _mm512_castps_pd(b[2 * i]), y = _mm512_castps_pd(b[2 * i + 1]);
        c[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    for (int i = 0; i < 2; ++i) {
        d[i] = _mm512_add_ps(_mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0x88), _mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0xdd));
    }
    _mm512_storeu_ps(out, _mm512_add_ps(_mm512_shuffle_f32x4(d[0], d[1], 0x88), _mm512_shuffle_f32x4(d[0], d[1], 0xdd)));
}
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define ALLOCMOE_SIMD
using vec           = __m256;
constexpr int LANES = 8, N_SUMS = 8;
inline vec zero() { return _mm256_setzero_ps(); }
inline vec load(const float * x) { return _mm256_loadu_ps(x); }
inline vec load(const ggml_fp16_t * x) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) x)); }
inline vec multiply_add(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
inline void add_up(const vec * a, float * out) {
    const vec x = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    const vec y = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
    _mm256_storeu_ps(out, _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31)));
}
#elif defined(__ARM_NEON) && defined(__aarch64__)
#define ALLOCMOE_SIMD
using vec           = float32x4_t;
constexpr int LANES = 4, N_SUMS = 16;
inline vec zero() { return vdupq_n_f32(0.0f); }
inline vec load(const float * x) { return vld1q_f32(x); }
inline vec load(const ggml_fp16_t * x) { return vcvt_f32_f16(vld1_f16((const __fp16 *) x)); }
inline vec multiply_add(vec a, vec b, vec c) { return vfmaq_f32(c, a, b); }
inline void add_up(const vec * a, float * out) {
    for (int i = 0; i < N_SUMS; i += 4) {
        vst1q_f32(out + i, vpaddq_f32(vpaddq_f32(a[i], a[i + 1]), vpaddq_f32(a[i + 2], a[i + 3])));
    }
}
#endif

#if defined(ALLOCMOE_SIMD)
constexpr int64_t BLOCK      = 64; // lines of the cache that a thread takes at once
constexpr int64_t MAX_TOKENS = 32; // a draft and the token before it; longer parts of prompts go llama.cpp's way

// out[line*HEADS + head]: products of n elements
template <int LINES>
void multiply(const ggml_fp16_t * const * lines, const float * const * heads, int64_t n, float * out) {
    constexpr int HEADS = N_SUMS / LINES;
    vec sum[N_SUMS];
    for (int i = 0; i < N_SUMS; ++i) {
        sum[i] = zero();
    }
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES) {
        vec line[LINES];
        for (int i = 0; i < LINES; ++i) {
            line[i] = load(lines[i] + k);
        }
        for (int h = 0; h < HEADS; ++h) {
            const vec head = load(heads[h] + k);
            for (int i = 0; i < LINES; ++i) {
                sum[i * HEADS + h] = multiply_add(line[i], head, sum[i * HEADS + h]);
            }
        }
    }
    add_up(sum, out);
    for (; k < n; ++k) {
        for (int i = 0; i < N_SUMS; ++i) {
            // one rounding wherever the compiler puts this: the same for any number of heads
            out[i] = std::fma(GGML_CPU_FP16_TO_FP32(lines[i / HEADS][k]), heads[i % HEADS][k], out[i]);
        }
    }
}

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
    const auto run          = n_columns == 1 ? multiply_block<N_SUMS> : n_columns > N_SUMS / 4 ? multiply_block<2> : multiply_block<4>;
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
