// The instruction sets, as the kernels of allocmoe-mul-mat.cpp see them. ALLOCMOE_KERNEL: this one has what they need.
#pragma once

#define GGML_COMMON_DECL_CPP
#define GGML_COMMON_IMPL_CPP
#include "ggml-common.h"

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "simd-mappings.h"

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define ALLOCMOE_KERNEL
#define ALLOCMOE_AVX512
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define ALLOCMOE_KERNEL
#elif defined(__ARM_NEON) && defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#define ALLOCMOE_KERNEL
#endif

#if defined(ALLOCMOE_KERNEL)

#if defined(__AVX2__)
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif

namespace allocmoe {

// x86 multiplies unsigned by signed bytes, so that signed codes are stored with 128 added. Without VNNI the products of
// such codes overflow 16 bits: they stay signed there, and the kernel moves the sign to the activations. ARM has signed by
// signed.
#if defined(ALLOCMOE_AVX512) || defined(__AVXVNNI__)
#define ALLOCMOE_VNNI
constexpr int SIGNED_BIAS = 128;
#else
constexpr int SIGNED_BIAS = 0;
#endif

// Asks for n bytes. LEVEL: how near to have them, 3 the first-level cache and 2 the second
template <int LEVEL>
inline void prefetch(const char * from, size_t n) {
#if defined(__GNUC__)
    for (size_t i = 0; i < n; i += 64) {
        __builtin_prefetch(from + i, 0, LEVEL);
    }
#else
    GGML_UNUSED(from);
    GGML_UNUSED(n);
#endif
}

//
// registers: W lanes of 32 bits, of integers (vi), floats (vf) and four bytes (vb)
//

#if defined(__AVX2__)
inline __m256i add(__m256i a, __m256i b) { return _mm256_add_epi32(a, b); }
inline __m256 to_float(__m256i x) { return _mm256_cvtepi32_ps(x); }
inline __m256 negative(__m256 x) { return _mm256_xor_ps(x, _mm256_set1_ps(-0.0f)); }
inline __m256 mul(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
inline __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
#endif

#if defined(ALLOCMOE_AVX512)
constexpr int W = 16;
using vi        = __m512i;
using vf        = __m512;
using vb        = __m512i;
inline vi broadcast(const int32_t * x) { return _mm512_set1_epi32(*x); }
inline vf broadcast(const float * x) { return _mm512_set1_ps(*x); }
inline vf load(const float * x) { return _mm512_load_ps(x); }
inline void store(float * x, vf y) { _mm512_store_ps(x, y); }
inline vi zero() { return _mm512_setzero_si512(); }
inline vf zero_f() { return _mm512_setzero_ps(); }
inline vi add(vi a, vi b) { return _mm512_add_epi32(a, b); }
inline vf to_float(vi x) { return _mm512_cvtepi32_ps(x); }
inline vf negative(vf x) { return _mm512_xor_ps(x, _mm512_set1_ps(-0.0f)); }
inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vb load_bytes(const void * x) { return _mm512_loadu_si512(x); }
#elif defined(__AVX2__)
constexpr int W = 8;
using vi        = __m256i;
using vf        = __m256;
using vb        = __m256i;
inline vi broadcast(const int32_t * x) { return _mm256_set1_epi32(*x); }
inline vf broadcast(const float * x) { return _mm256_broadcast_ss(x); }
inline vf load(const float * x) { return _mm256_load_ps(x); }
inline void store(float * x, vf y) { _mm256_store_ps(x, y); }
inline vi zero() { return _mm256_setzero_si256(); }
inline vf zero_f() { return _mm256_setzero_ps(); }
inline vb load_bytes(const void * x) { return _mm256_loadu_si256((const __m256i *) x); }
#else
constexpr int W = 4;
using vi        = int32x4_t;
using vf        = float32x4_t;
using vb        = uint8x16_t;
inline vi broadcast(const int32_t * x) { return vld1q_dup_s32(x); }
inline vf broadcast(const float * x) { return vld1q_dup_f32(x); }
inline vf load(const float * x) { return vld1q_f32(x); }
inline void store(float * x, vf y) { vst1q_f32(x, y); }
inline vi zero() { return vdupq_n_s32(0); }
inline vf zero_f() { return vdupq_n_f32(0); }
inline vi add(vi a, vi b) { return vaddq_s32(a, b); }
inline vf to_float(vi x) { return vcvtq_f32_s32(x); }
inline vf negative(vf x) { return vnegq_f32(x); }
inline vf mul(vf a, vf b) { return vmulq_f32(a, b); }
inline vf fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
inline vb load_bytes(const void * x) { return vld1q_u8((const uint8_t *) x); }
#endif

// sums of four products of bytes added to sums; w: unsigned codes, or SIGNED ones with SIGNED_BIAS added
#if defined(__AVX2__)
#if defined(ALLOCMOE_AVX512)
inline __m512i dot_unsigned(__m512i sum, __m512i w, __m512i x) { return _mm512_dpbusd_epi32(sum, w, x); }
inline __m256i dot_unsigned(__m256i sum, __m256i w, __m256i x) { return _mm256_dpbusd_epi32(sum, w, x); }
#elif defined(ALLOCMOE_VNNI)
inline __m256i dot_unsigned(__m256i sum, __m256i w, __m256i x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
#endif
template <bool SIGNED, typename V>
inline V dot(V sum, V w, V x) {
#if defined(ALLOCMOE_VNNI)
    return dot_unsigned(sum, w, x);
#else
    const __m256i pairs = SIGNED ? _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)) : _mm256_maddubs_epi16(w, x);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}
#else
template <bool SIGNED>
inline vi dot(vi sum, vb w, vb x) { return vdotq_s32(sum, vreinterpretq_s8_u8(w), vreinterpretq_s8_u8(x)); }
#endif

inline vb broadcast_4(const int8_t * x) {
    int32_t four;
    memcpy(&four, x, 4);
#if defined(ALLOCMOE_AVX512)
    return _mm512_set1_epi32(four);
#elif defined(__AVX2__)
    return _mm256_set1_epi32(four);
#else
    return vreinterpretq_u8_s32(vdupq_n_s32(four));
#endif
}

inline vb broadcast_8(const int8_t * x) {
    int64_t eight;
    memcpy(&eight, x, 8);
#if defined(ALLOCMOE_AVX512)
    return _mm512_set1_epi64(eight);
#elif defined(__AVX2__)
    return _mm256_set1_epi64x(eight);
#else
    return vreinterpretq_u8_s64(vdupq_n_s64(eight));
#endif
}

//
// bytes: each function for 32 of them, and for a register. 32 codes are in registers: what is written to memory in pieces
// cannot be read back as a whole without waiting
//

#if defined(__AVX2__)
using codes_32 = __m256i;
inline codes_32 load_32(const void * in) { return _mm256_loadu_si256((const __m256i *) in); }
inline void store_32(codes_32 x, void * out) { _mm256_storeu_si256((__m256i *) out, x); }
inline codes_32 either(codes_32 a, codes_32 b) { return _mm256_or_si256(a, b); }
inline codes_32 flip(codes_32 a, uint8_t mask) { return _mm256_xor_si256(a, _mm256_set1_epi8((char) mask)); }
// ((x >> shift) & mask) << up; shifting 16 bits at once is safe: the mask leaves nothing that came from the other byte
template <int shift, int mask, int up>
inline codes_32 bits(codes_32 x) {
    if (shift != up) {
        x = shift > up ? _mm256_srli_epi16(x, shift > up ? shift - up : 0) : _mm256_slli_epi16(x, shift > up ? 0 : up - shift);
    }
    return _mm256_and_si256(x, _mm256_set1_epi8((char) (mask << up)));
}
// the bits of y with those of x from mask << up on, which y does not have
template <int shift, int mask, int up>
inline codes_32 insert_bits(codes_32 y, codes_32 x) { return either(y, bits<shift, mask, up>(x)); }
// the low halves of 16 bytes and then the high ones
inline codes_32 nibbles(const uint8_t * in) {
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) in));
    return _mm256_and_si256(_mm256_srlv_epi64(twice, _mm256_setr_epi64x(0, 0, 4, 4)), _mm256_set1_epi8(15));
}
inline codes_32 look_up(const uint8_t * table, codes_32 x) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) table)), x);
}
// 16 in each byte whose bit is set
inline codes_32 fifth_bits(const uint8_t * in) {
    uint32_t set;
    memcpy(&set, in, 4);
#if defined(ALLOCMOE_AVX512)
    return _mm256_maskz_set1_epi8(set, 16);
#else
    const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit  = _mm256_set1_epi64x((long long) 0x8040201008040201);
    const __m256i x    = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32((int) set), byte), bit);
    return _mm256_and_si256(_mm256_cmpeq_epi8(x, bit), _mm256_set1_epi8(16));
#endif
}
#if defined(ALLOCMOE_AVX512)
inline vb either(vb a, vb b) { return _mm512_or_si512(a, b); }
inline vb flip(vb a, uint8_t mask) { return _mm512_xor_si512(a, _mm512_set1_epi8((char) mask)); }
template <int shift, int mask, int up>
inline vb bits(vb x) {
    if (shift != up) {
        x = shift > up ? _mm512_srli_epi16(x, shift > up ? shift - up : 0) : _mm512_slli_epi16(x, shift > up ? 0 : up - shift);
    }
    return _mm512_and_si512(x, _mm512_set1_epi8((char) (mask << up)));
}
inline vb look_up(const uint8_t * table, vb x) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) table)), x);
}
#endif
#else
inline vb either(vb a, vb b) { return vorrq_u8(a, b); }
inline vb flip(vb a, uint8_t mask) { return veorq_u8(a, vdupq_n_u8(mask)); }
template <int shift, int mask, int up>
inline vb bits(vb x) {
    if (shift != up) {
        x = shift > up ? vshrq_n_u8(x, shift > up ? shift - up : 1) : vshlq_n_u8(x, shift > up ? 0 : up - shift);
    }
    return shift > up && (mask << up) == 0xff >> (shift > up ? shift - up : 0) ? x : vandq_u8(x, vdupq_n_u8(mask << up));
}
template <int shift, int mask, int up>
inline vb insert_bits(vb y, vb x) {
    if (shift != up) {
        x = shift > up ? vshrq_n_u8(x, shift > up ? shift - up : 1) : vshlq_n_u8(x, shift > up ? 0 : up - shift);
    }
    return vbslq_u8(vdupq_n_u8(mask << up), x, y);
}
inline vb look_up(const uint8_t * table, vb x) { return vqtbl1q_u8(vld1q_u8(table), x); }

struct codes_32 {
    vb low, high;
};
inline codes_32 load_32(const void * in) { return { load_bytes(in), load_bytes((const uint8_t *) in + 16) }; }
inline void store_32(codes_32 x, void * out) {
    vst1q_u8((uint8_t *) out, x.low);
    vst1q_u8((uint8_t *) out + 16, x.high);
}
inline codes_32 either(codes_32 a, codes_32 b) { return { either(a.low, b.low), either(a.high, b.high) }; }
inline codes_32 flip(codes_32 a, uint8_t mask) { return { flip(a.low, mask), flip(a.high, mask) }; }
template <int shift, int mask, int up>
inline codes_32 bits(codes_32 x) { return { bits<shift, mask, up>(x.low), bits<shift, mask, up>(x.high) }; }
template <int shift, int mask, int up>
inline codes_32 insert_bits(codes_32 y, codes_32 x) { return { insert_bits<shift, mask, up>(y.low, x.low), insert_bits<shift, mask, up>(y.high, x.high) }; }
inline codes_32 nibbles(const uint8_t * in) {
    const vb x = load_bytes(in);
    return { bits<0, 15, 0>(x), bits<4, 15, 0>(x) };
}
inline codes_32 look_up(const uint8_t * table, codes_32 x) { return { look_up(table, x.low), look_up(table, x.high) }; }
inline codes_32 fifth_bits(const uint8_t * in) {
    const uint8x8_t bit = vcreate_u8(0x8040201008040201);
    const vb bit2       = vcombine_u8(bit, bit);
    const vb low        = vcombine_u8(vdup_n_u8(in[0]), vdup_n_u8(in[1]));
    const vb high       = vcombine_u8(vdup_n_u8(in[2]), vdup_n_u8(in[3]));
    const vb sixteen    = vdupq_n_u8(16);
    return { vandq_u8(vtstq_u8(low, bit2), sixteen), vandq_u8(vtstq_u8(high, bit2), sixteen) };
}
#endif

} // namespace allocmoe

#endif // ALLOCMOE_KERNEL
