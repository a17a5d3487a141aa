// Vectors of floats, as the kernels see them that multiply what is not quantised. ALLOCMOE_SIMD: the instruction set has what
// they need.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined operands inside its own AVX-512 intrinsics for ours
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"
#include "vec.h"

#include <cmath>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace allocmoe {

#if defined(__AVX512F__)
#define ALLOCMOE_SIMD
using vec           = __m512;
constexpr int LANES = 16, N_SUMS = 16;
inline vec zero() { return _mm512_setzero_ps(); }
inline vec load(const float * x) { return _mm512_loadu_ps(x); }
inline vec load(const ggml_fp16_t * x) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) x)); }
inline vec broadcast(float x) { return _mm512_set1_ps(x); }
inline void store(float * x, vec y) { _mm512_storeu_ps(x, y); }
inline vec plus(vec a, vec b) { return _mm512_add_ps(a, b); }
inline vec minus(vec a, vec b) { return _mm512_sub_ps(a, b); }
inline vec times(vec a, vec b) { return _mm512_mul_ps(a, b); }
inline vec maximum(vec a, vec b) { return _mm512_max_ps(a, b); }
inline vec multiply_add(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
inline void transpose(vec * x) { // LANES rows of as many
    vec y[LANES];
    for (int i = 0; i < LANES; i += 2) {
        y[i]     = _mm512_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4) {
        for (int j = 0; j < 2; ++j) {
            const __m512d a = _mm512_castps_pd(y[i + j]), b = _mm512_castps_pd(y[i + j + 2]);
            x[i + 2 * j]     = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            x[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    for (int i = 0; i < 4; ++i) {
        y[i]      = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x88);
        y[i + 4]  = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd);
        y[i + 8]  = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0x88);
        y[i + 12] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
        x[i]     = _mm512_shuffle_f32x4(y[i], y[i + 8], 0x88);
        x[i + 8] = _mm512_shuffle_f32x4(y[i], y[i + 8], 0xdd);
    }
}
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
inline vec broadcast(float x) { return _mm256_set1_ps(x); }
inline void store(float * x, vec y) { _mm256_storeu_ps(x, y); }
inline vec plus(vec a, vec b) { return _mm256_add_ps(a, b); }
inline vec minus(vec a, vec b) { return _mm256_sub_ps(a, b); }
inline vec times(vec a, vec b) { return _mm256_mul_ps(a, b); }
inline vec maximum(vec a, vec b) { return _mm256_max_ps(a, b); }
inline vec multiply_add(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
inline void transpose(vec * x) { // LANES rows of as many
    vec y[LANES];
    for (int i = 0; i < LANES; i += 4) {
        const vec a = _mm256_unpacklo_ps(x[i], x[i + 1]), b = _mm256_unpackhi_ps(x[i], x[i + 1]);
        const vec c = _mm256_unpacklo_ps(x[i + 2], x[i + 3]), d = _mm256_unpackhi_ps(x[i + 2], x[i + 3]);
        y[i]     = _mm256_shuffle_ps(a, c, 0x44);
        y[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
        y[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
        y[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        x[i]     = _mm256_permute2f128_ps(y[i], y[i + 4], 0x20);
        x[i + 4] = _mm256_permute2f128_ps(y[i], y[i + 4], 0x31);
    }
}
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
inline vec broadcast(float x) { return vdupq_n_f32(x); }
inline void store(float * x, vec y) { vst1q_f32(x, y); }
inline vec plus(vec a, vec b) { return vaddq_f32(a, b); }
inline vec minus(vec a, vec b) { return vsubq_f32(a, b); }
inline vec times(vec a, vec b) { return vmulq_f32(a, b); }
inline vec maximum(vec a, vec b) { return vmaxq_f32(a, b); }
inline vec multiply_add(vec a, vec b, vec c) { return vfmaq_f32(c, a, b); }
inline void transpose(vec * x) { // LANES rows of as many
    const float32x4x2_t a = vzipq_f32(x[0], x[2]), b = vzipq_f32(x[1], x[3]);
    const float32x4x2_t c = vzipq_f32(a.val[0], b.val[0]), d = vzipq_f32(a.val[1], b.val[1]);
    x[0] = c.val[0], x[1] = c.val[1], x[2] = d.val[0], x[3] = d.val[1];
}
inline void add_up(const vec * a, float * out) {
    for (int i = 0; i < N_SUMS; i += 4) {
        vst1q_f32(out + i, vpaddq_f32(vpaddq_f32(a[i], a[i + 1]), vpaddq_f32(a[i + 2], a[i + 3])));
    }
}
#endif

#if defined(ALLOCMOE_SIMD)
#if defined(__ARM_FEATURE_SVE)
// vec.h has it for vectors of any length alone
inline vec exponential(vec x) {
    const svbool_t lanes = svwhilelt_b32(0, LANES);
    float values[LANES];
    store(values, x);
    svst1_f32(lanes, values, ggml_v_expf(lanes, svld1_f32(lanes, values)));
    return load(values);
}
#else
inline vec exponential(vec x) { return ggml_v_expf(x); }
#endif

// Vectors of half the size where the processor is as fast with them, for what would leave half of one empty.
#if defined(__AVX512F__)
using half_vec = __m256;
inline half_vec multiply_add(half_vec a, half_vec b, half_vec c) { return _mm256_fmadd_ps(a, b, c); }
inline void store(float * x, half_vec y) { _mm256_storeu_ps(x, y); }
#else
using half_vec = vec;
#endif
constexpr int HALF_LANES = sizeof(half_vec) / sizeof(float);

template <typename V>
V load_as(const float * x);
template <typename V>
V broadcast_as(float x);
template <>
inline vec load_as(const float * x) { return load(x); }
template <>
inline vec broadcast_as(float x) { return broadcast(x); }
#if defined(__AVX512F__)
template <>
inline half_vec load_as(const float * x) { return _mm256_loadu_ps(x); }
template <>
inline half_vec broadcast_as(float x) { return _mm256_set1_ps(x); }
#endif

// Has it loaded once. GCC takes what is used several times from memory each time, which AVX2's processors do as fast, and those with
// AVX-512 do not.
template <typename V>
inline void in_register(V & x) {
#if defined(__AVX512F__)
    asm("" : "+v"(x));
#else
    GGML_UNUSED(x);
#endif
}

inline float to_float(float x) { return x; }
inline float to_float(ggml_fp16_t x) { return GGML_CPU_FP16_TO_FP32(x); }

// out[line*HEADS + head]: products of n elements
template <int LINES, typename T>
void multiply(const T * const * lines, const float * const * heads, int64_t n, float * out) {
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
            out[i] = std::fma(to_float(lines[i / HEADS][k]), heads[i % HEADS][k], out[i]);
        }
    }
}
#endif

} // namespace allocmoe
