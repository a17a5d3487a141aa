// Quantised weights as panels: 16 rows by up to 256 columns of 8-bit codes, interleaved so that one vector register holds
// four columns of many rows. A weight is d*(code - offset) + m, with one d and m for each row and sub-block of columns.
// Every type that has a format below can be multiplied by the kernels in allocmoe-mul-mat.cpp: that one, or for K-quants and IQ4_XS
// the one that adds up a block's sub-blocks as integers, with one d and m for each row and block.
#pragma once

#include "allocmoe-neon.h"
#include "allocmoe-vectors.h"
#include "allocmoe-whole-blocks.h"

#if defined(ALLOCMOE_KERNEL)

#include "repack.h"

#include <type_traits>

namespace allocmoe {

constexpr int ROWS  = 16;
constexpr int CHUNK = 256;

struct panel {
    alignas(64) uint8_t q[CHUNK * ROWS]; // [CHUNK/4][ROWS][4], on Arm [ROWS/4][CHUNK/TOGETHER][4][TOGETHER]
    union {
        alignas(64) float scales[2 * CHUNK / 16 * ROWS]; // [sub-block][ROWS] of d, then the same of m
        // where whole_blocks
        struct {
            alignas(64) int32_t scale[CHUNK / 16][ROWS]; // of each sub-block, as multiply_sub_block() wants it; on Arm the number itself
            alignas(64) int32_t pairs[CHUNK / 16][ROWS]; // 16 bits of two sub-blocks each: mins, or scales where codes have an offset (not on Arm)
            alignas(64) float d[ROWS], m[ROWS];
        } whole;
    };
};

// The activations of some tokens, n of them, sub-block by sub-block.
struct tile {
    const int8_t * q;     // [sub-block][n][SUB]
    const float * d;      // [sub-block][n]; where whole_blocks: [block][n]
    const float * sum;    // [sub-block][n]: d times the sum of q, for m
    const int32_t * init; // [sub-block][n]: -offset times the sum of q; where whole_blocks: [two sub-blocks][n], 16 bits of each's sum
};

// n bytes of each of 16 rows, `stride` bytes apart, to [n/4][ROWS][4]. Reads and writes up to the next 64 bytes.
template <int STRIDE>
inline void interleave(const uint8_t * codes, int n, uint8_t * q) {
#if defined(__AVX512F__)
    for (int c = 0; c < n; c += 64) {
        __m512i a[16], b[16];
        for (int r = 0; r < 16; ++r) {
            a[r] = _mm512_load_si512(codes + r * STRIDE + c);
        }
        for (int r = 0; r < 16; r += 2) {
            b[r]     = _mm512_unpacklo_epi32(a[r], a[r + 1]);
            b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
        }
        for (int r = 0; r < 16; r += 4) {
            a[r]     = _mm512_unpacklo_epi64(b[r], b[r + 2]);
            a[r + 1] = _mm512_unpackhi_epi64(b[r], b[r + 2]);
            a[r + 2] = _mm512_unpacklo_epi64(b[r + 1], b[r + 3]);
            a[r + 3] = _mm512_unpackhi_epi64(b[r + 1], b[r + 3]);
        }
        for (int i = 0; i < 4; ++i) {
            const __m512i lo0 = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
            const __m512i hi0 = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
            const __m512i lo1 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
            const __m512i hi1 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
            uint8_t * out     = q + c * ROWS + i * 64;
            _mm512_store_si512(out, _mm512_shuffle_i32x4(lo0, lo1, 0x88));
            _mm512_store_si512(out + 256, _mm512_shuffle_i32x4(hi0, hi1, 0x88));
            _mm512_store_si512(out + 512, _mm512_shuffle_i32x4(lo0, lo1, 0xdd));
            _mm512_store_si512(out + 768, _mm512_shuffle_i32x4(hi0, hi1, 0xdd));
        }
    }
#elif defined(__AVX2__)
    for (int c = 0; c < n; c += 32) {
        for (int r0 = 0; r0 < 16; r0 += 8) {
            __m256i a[8], b[8];
            for (int r = 0; r < 8; ++r) {
                a[r] = _mm256_load_si256((const __m256i *) (codes + (r0 + r) * STRIDE + c));
            }
            for (int r = 0; r < 8; r += 2) {
                b[r]     = _mm256_unpacklo_epi32(a[r], a[r + 1]);
                b[r + 1] = _mm256_unpackhi_epi32(a[r], a[r + 1]);
            }
            for (int r = 0; r < 8; r += 4) {
                a[r]     = _mm256_unpacklo_epi64(b[r], b[r + 2]);
                a[r + 1] = _mm256_unpackhi_epi64(b[r], b[r + 2]);
                a[r + 2] = _mm256_unpacklo_epi64(b[r + 1], b[r + 3]);
                a[r + 3] = _mm256_unpackhi_epi64(b[r + 1], b[r + 3]);
            }
            for (int i = 0; i < 4; ++i) {
                uint8_t * out = q + c * ROWS + i * 64 + r0 * 4;
                _mm256_store_si256((__m256i *) out, _mm256_permute2x128_si256(a[i], a[i + 4], 0x20));
                _mm256_store_si256((__m256i *) (out + 256), _mm256_permute2x128_si256(a[i], a[i + 4], 0x31));
            }
        }
    }
#else
    for (int c = 0; c < n; c += 16) {
        for (int r = 0; r < 16; r += 4) {
            const uint32x4_t a0 = vreinterpretq_u32_u8(vld1q_u8(codes + (r + 0) * STRIDE + c));
            const uint32x4_t a1 = vreinterpretq_u32_u8(vld1q_u8(codes + (r + 1) * STRIDE + c));
            const uint32x4_t a2 = vreinterpretq_u32_u8(vld1q_u8(codes + (r + 2) * STRIDE + c));
            const uint32x4_t a3 = vreinterpretq_u32_u8(vld1q_u8(codes + (r + 3) * STRIDE + c));
            const uint64x2_t b0 = vreinterpretq_u64_u32(vtrn1q_u32(a0, a1)), b1 = vreinterpretq_u64_u32(vtrn2q_u32(a0, a1));
            const uint64x2_t b2 = vreinterpretq_u64_u32(vtrn1q_u32(a2, a3)), b3 = vreinterpretq_u64_u32(vtrn2q_u32(a2, a3));
            uint8_t * out = q + c * ROWS + r * 4;
            vst1q_u8(out, vreinterpretq_u8_u64(vtrn1q_u64(b0, b2)));
            vst1q_u8(out + 64, vreinterpretq_u8_u64(vtrn1q_u64(b1, b3)));
            vst1q_u8(out + 128, vreinterpretq_u8_u64(vtrn2q_u64(b0, b2)));
            vst1q_u8(out + 192, vreinterpretq_u8_u64(vtrn2q_u64(b1, b3)));
        }
    }
#endif
}

// The same for codes, as panels hold them: on Arm signed, without their offset, and perhaps more columns of a row together.
#if defined(__AVX2__)
template <int STRIDE, int>
inline void interleave_codes(const uint8_t * codes, int n, uint8_t * q) { interleave<STRIDE>(codes, n, q); }
#else
template <int STRIDE, int OFFSET>
inline void interleave_codes(const uint8_t * codes, int n, uint8_t * q) {
    for (int c = 0; c < n; c += 16) {
        for (int r = 0; r < ROWS; r += 4) {
            vb x[4];
            for (int i = 0; i < 4; ++i) {
                x[i] = less<OFFSET>(vld1q_u8(codes + (r + i) * STRIDE + c));
            }
            store_16_columns(x, q + in_panel(r, c));
        }
    }
}
#endif

//
// formats: what a type's block holds. codes() writes the codes of one block, codes_of<I>() are those of 32 columns from 32*I on;
// scales(), where sub-blocks have sums of their own, writes d, and m CHUNK/SUB floats after it
//

struct format_k { // super-blocks of 256
    static constexpr int BLOCK   = QK_K;
    static constexpr bool SIGNED = false;
};

// f(i) for the 32 columns of a super-block from 32*i on, i a constant
template <typename F>
inline void for_eighths(const F & f) {
    f(std::integral_constant<int, 0>()), f(std::integral_constant<int, 1>()), f(std::integral_constant<int, 2>()), f(std::integral_constant<int, 3>());
    f(std::integral_constant<int, 4>()), f(std::integral_constant<int, 5>()), f(std::integral_constant<int, 6>()), f(std::integral_constant<int, 7>());
}

template <typename F>
inline void store_codes(const typename F::block & b, uint8_t * q) {
    for_eighths([&](auto i) { store_32(F::template codes_of<decltype(i)::value>(b), q + 32 * i); });
}

struct format_32 {
    static constexpr int BLOCK   = 32;
    static constexpr int SUB     = 32;
    static constexpr bool SIGNED = false;
};

template <typename B>
inline float scale_of(const B & b) { return GGML_CPU_FP16_TO_FP32(b.d); }
template <typename B>
inline float scale_in_pair(const B & b) { return GGML_CPU_FP16_TO_FP32(b.GGML_COMMON_AGGR_U.GGML_COMMON_AGGR_S.d); }
inline float scale_of(const block_mxfp4 & b) { return GGML_CPU_E8M0_TO_FP32_HALF(b.e); }
inline float scale_of(const block_q8_1 & b) { return scale_in_pair(b); }
inline float scale_of(const block_q4_1 & b) { return scale_in_pair(b); }
inline float scale_of(const block_q5_1 & b) { return scale_in_pair(b); }
inline float scale_of(const block_q2_K & b) { return scale_in_pair(b); }
inline float scale_of(const block_q4_K & b) { return scale_in_pair(b); }
inline float scale_of(const block_q5_K & b) { return scale_in_pair(b); }
template <typename B>
inline float min_of(const B & b) { return GGML_CPU_FP16_TO_FP32(b.GGML_COMMON_AGGR_U.GGML_COMMON_AGGR_S.m); }
template <typename B>
inline float min_of_k(const B & b) { return GGML_CPU_FP16_TO_FP32(b.GGML_COMMON_AGGR_U.GGML_COMMON_AGGR_S.dmin); }

template <typename B>
struct format_with_scales_k4 : format_k {
    using block                 = B;
    static constexpr int SUB    = 32;
    static constexpr bool MIN   = true;
    static constexpr int OFFSET = 0;
};

struct format_q4_K : format_with_scales_k4<block_q4_K> {
    static constexpr int LARGEST = 15;
    template <int I>
    static codes_32 codes_of(const block & b) { return bits<I % 2 * 4, 15, 0>(load_32(b.qs + I / 2 * 32)); }
    static void codes(const block & b, uint8_t * q) { store_codes<format_q4_K>(b, q); }
};

struct format_q5_K : format_with_scales_k4<block_q5_K> {
    static constexpr int LARGEST = 31;
    template <int I>
    static codes_32 codes_of(const block & b) {
        return insert_bits<I, 1, 4>(bits<I % 2 * 4, 15, 0>(load_32(b.qs + I / 2 * 32)), load_32(b.qh));
    }
    static void codes(const block & b, uint8_t * q) { store_codes<format_q5_K>(b, q); }
};

struct format_q6_K : format_k {
    using block                  = block_q6_K;
    static constexpr int SUB     = 16;
    static constexpr bool MIN    = false;
    static constexpr int OFFSET  = 32;
    static constexpr int LARGEST = 63;
    template <int I>
    static codes_32 codes_of(const block & b) {
        return insert_bits<I % 4 * 2, 3, 4>(bits<I % 4 / 2 * 4, 15, 0>(load_32(b.ql + I / 4 * 64 + I % 2 * 32)), load_32(b.qh + I / 4 * 32));
    }
    static void codes(const block & b, uint8_t * q) { store_codes<format_q6_K>(b, q); }
};

struct format_q3_K : format_k {
    using block                  = block_q3_K;
    static constexpr int SUB     = 16;
    static constexpr bool MIN    = false;
    static constexpr int OFFSET  = 4;
    static constexpr int LARGEST = 7;
    template <int I>
    static codes_32 codes_of(const block & b) {
        return insert_bits<I, 1, 2>(bits<I % 4 * 2, 3, 0>(load_32(b.qs + I / 4 * 32)), load_32(b.hmask));
    }
    static void codes(const block & b, uint8_t * q) { store_codes<format_q3_K>(b, q); }
};

struct format_q2_K : format_k {
    using block                  = block_q2_K;
    static constexpr int SUB     = 16;
    static constexpr bool MIN    = true;
    static constexpr int OFFSET  = 0;
    static constexpr int LARGEST = 3;
    template <int I>
    static codes_32 codes_of(const block & b) { return bits<I % 4 * 2, 3, 0>(load_32(b.qs + I / 4 * 32)); }
    static void codes(const block & b, uint8_t * q) { store_codes<format_q2_K>(b, q); }
};

template <typename B>
struct format_nibbles : format_32 {
    using block                  = B;
    static constexpr int LARGEST = 15;
    static void codes(const block & b, uint8_t * q) { store_32(nibbles(b.qs), q); }
};

template <typename B>
struct format_five_bits : format_nibbles<B> {
    static constexpr int LARGEST = 31;
    static void codes(const B & b, uint8_t * q) {
        store_32(either(nibbles(b.qs), fifth_bits(b.qh)), q);
    }
};

template <typename F>
struct with_scale : F {
    static constexpr bool MIN = false;
    static void scales(const typename F::block & b, float * out) { *out = scale_of(b); }
};

template <typename F>
struct with_scale_and_min : F {
    static constexpr bool MIN   = true;
    static constexpr int OFFSET = 0;
    static void scales(const typename F::block & b, float * out) {
        out[0]              = scale_of(b);
        out[CHUNK / F::SUB] = min_of(b);
    }
};

struct format_q4_0 : with_scale<format_nibbles<block_q4_0>> {
    static constexpr int OFFSET = 8;
};

struct format_q5_0 : with_scale<format_five_bits<block_q5_0>> {
    static constexpr int OFFSET = 16;
};

using format_q4_1 = with_scale_and_min<format_nibbles<block_q4_1>>;
using format_q5_1 = with_scale_and_min<format_five_bits<block_q5_1>>;

struct codes_q8_0 : format_32 {
    using block                  = block_q8_0;
    static constexpr bool SIGNED = true;
    static constexpr int OFFSET  = SIGNED_BIAS;
    static void codes(const block & b, uint8_t * q) {
        store_32(flip(load_32(b.qs), SIGNED_BIAS), q);
    }
};
using format_q8_0 = with_scale<codes_q8_0>;

// The values of the types whose 4-bit codes stand for unevenly spaced numbers, with the offset added. Known to the compiler: what
// runs as the library is loaded must not need the instructions that it is built for, since a variant is asked afterwards whether
// this CPU has them.
struct value_table {
    uint8_t values[16] = {};
    constexpr value_table(const int8_t (&from)[16], int offset) {
        for (int i = 0; i < 16; ++i) {
            values[i] = (uint8_t) (from[i] + offset);
        }
    }
};
constexpr int8_t VALUES_IQ4_NL[16] = { -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113 };
constexpr int8_t VALUES_MXFP4[16]  = { 0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12 };

constexpr value_table values_iq4_nl(VALUES_IQ4_NL, SIGNED_BIAS);
constexpr value_table values_mxfp4(VALUES_MXFP4, 12);

struct format_iq4_nl : with_scale<format_nibbles<block_iq4_nl>> {
    static constexpr bool SIGNED = true;
    static constexpr int OFFSET  = SIGNED_BIAS;
    static void codes(const block & b, uint8_t * q) {
        store_32(look_up(values_iq4_nl.values, nibbles(b.qs)), q);
    }
};

struct format_mxfp4 : with_scale<format_nibbles<block_mxfp4>> {
    static constexpr int OFFSET  = 12;
    static constexpr int LARGEST = 24;
    static void codes(const block & b, uint8_t * q) {
        store_32(look_up(values_mxfp4.values, nibbles(b.qs)), q);
    }
};

struct format_iq4_xs : format_k {
    using block                  = block_iq4_xs;
    static constexpr int SUB     = 32;
    static constexpr bool MIN    = false;
    static constexpr bool SIGNED = true;
    static constexpr int OFFSET  = SIGNED_BIAS;
    template <int I>
    static codes_32 codes_of(const block & b) { return look_up(values_iq4_nl.values, nibbles(b.qs + 16 * I)); }
    static void codes(const block & b, uint8_t * q) { store_codes<format_iq4_xs>(b, q); }
};

// Whether the sub-blocks of a block are added up as integers.
template <typename F>
constexpr bool whole_blocks = std::is_base_of<format_k, F>::value;

//
// layouts: where the blocks of 16 rows lie. unpack() makes the panel of n columns from k0 on, of n_rows rows; what it
// leaves in the panel for the other rows is not used
//

// Codes and scales of 16 rows, one after the other, before they are interleaved.
template <typename F, bool WHOLE = whole_blocks<F>>
struct unpacked {
    static constexpr int N_SCALES = (F::MIN ? 2 : 1) * CHUNK / F::SUB;
    alignas(64) uint8_t codes[ROWS][CHUNK];
    alignas(64) float scales[ROWS][32];

    void add(int row, int block, const typename F::block & b) {
        F::codes(b, codes[row] + block * F::BLOCK);
        F::scales(b, scales[row] + block);
    }

    void finish(int n, panel & p) const {
        interleave_codes<CHUNK, F::OFFSET>(codes[0], n, p.q);
        interleave<32 * sizeof(float)>((const uint8_t *) scales[0], N_SCALES * sizeof(float), (uint8_t *) p.scales);
    }
};

template <typename F>
struct unpacked<F, true> {
    alignas(64) uint8_t codes[ROWS][CHUNK];
    alignas(64) int32_t scale[ROWS][16], pairs[ROWS][16];
    alignas(64) float d[ROWS], m[ROWS];

    void add(int row, int, const typename F::block & b) {
        F::codes(b, codes[row]);
        const block_scales s(b);
        s.store<F>(scale[row], pairs[row]);
        d[row] = scale_of(b);
        if constexpr (F::MIN) {
            m[row] = -min_of_k(b);
        }
    }

    void finish(int n, panel & p) const {
        interleave_codes<CHUNK, F::OFFSET>(codes[0], n, p.q);
        interleave<sizeof(scale[0])>((const uint8_t *) scale[0], CHUNK / F::SUB * sizeof(int32_t), (uint8_t *) p.whole.scale);
        interleave<sizeof(pairs[0])>((const uint8_t *) pairs[0], CHUNK / F::SUB / 2 * sizeof(int32_t), (uint8_t *) p.whole.pairs);
        memcpy(p.whole.d, d, sizeof(d));
        if (F::MIN) {
            memcpy(p.whole.m, m, sizeof(m));
        }
    }
};

template <typename F>
struct plain : F {
    static void unpack(const char * rows, size_t row_size, int n_rows, int64_t k0, int n, panel & p) {
        unpacked<F> u;
        for (int r = 0; r < n_rows; ++r) {
            const auto * block = (const typename F::block *) (rows + r * row_size) + k0 / F::BLOCK;
            for (int i = 0; i < n / F::BLOCK; ++i) {
                u.add(r, i, block[i]);
            }
        }
        u.finish(n, p);
    }
};

#if defined(__AVX2__) // Arm's: allocmoe-panel-neon.h
// llama.cpp's repacked layouts hold the blocks of N rows together, their codes taking turns, STEP bytes at a time
#if defined(__AVX512F__) // elsewhere llama.cpp repacks no Q2_K
template <int N, int STEP>
inline void take_turns(const void * from, int row, size_t n, void * out) {
    for (size_t i = 0; i < n; i += STEP) {
        memcpy((uint8_t *) out + i, (const uint8_t *) from + i * N + row * STEP, STEP);
    }
}

template <typename F, typename X, int N, int STEP>
struct repacked : F {
    static_assert(std::is_same<F, format_q2_K>::value, "no other layout on x86");

    static void unpack(const char * rows, size_t row_size, int n_rows, int64_t k0, int n, panel & p) {
        unpacked<F> u;
        for (int r = 0; r < n_rows; ++r) {
            const auto * x = (const X *) (rows + r / N * N * row_size) + k0 / F::BLOCK;
            for (int i = 0; i < n / F::BLOCK; ++i) {
                block_q2_K b;
                b.GGML_COMMON_AGGR_U.GGML_COMMON_AGGR_S.d    = x[i].d[r % N];
                b.GGML_COMMON_AGGR_U.GGML_COMMON_AGGR_S.dmin = x[i].dmin[r % N];
                take_turns<N, 2>(x[i].scales, r % N, sizeof(b.scales), b.scales);
                take_turns<N, STEP>(x[i].qs, r % N, sizeof(b.qs), b.qs);
                u.add(r, i, b);
            }
        }
        u.finish(n, p);
    }
};
#endif

// 64 bytes of 8 rows' 4-bit codes, 8 of each row, and the same of 8 more rows: the low halves to q, the high ones to q_high,
// as [2][ROWS][4]. table: what codes stand for, or null
inline void interleave_8x8(const uint8_t * rows0, const uint8_t * rows8, uint8_t flipped, const uint8_t * table, uint8_t * q, uint8_t * q_high) {
#if defined(__AVX512F__)
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd  = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    const __m512i mask = _mm512_set1_epi8(15);
    const __m512i a = _mm512_loadu_si512(rows0), b = _mm512_loadu_si512(rows8);
    const __m512i x[2] = { _mm512_permutex2var_epi32(a, even, b), _mm512_permutex2var_epi32(a, odd, b) };
    for (int i = 0; i < 2; ++i) {
        const __m512i codes = _mm512_xor_si512(x[i], _mm512_set1_epi8((char) flipped));
        __m512i low = _mm512_and_si512(codes, mask), high = _mm512_and_si512(_mm512_srli_epi16(codes, 4), mask);
        if (table) {
            const __m512i values = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) table));
            low                  = _mm512_shuffle_epi8(values, low);
            high                 = _mm512_shuffle_epi8(values, high);
        }
        _mm512_store_si512(q + 64 * i, low);
        _mm512_store_si512(q_high + 64 * i, high);
    }
#else
    for (int r = 0; r < ROWS; r += 8) {
        const uint8_t * rows = r == 0 ? rows0 : rows8;
        for (int i = 0; i < 2; ++i) {
            const codes_32 codes = flip(four_columns(load_32(rows), load_32(rows + 32), i == 1), flipped);
            codes_32 low = bits<0, 15, 0>(codes), high = bits<4, 15, 0>(codes);
            if (table) {
                low  = look_up(table, low);
                high = look_up(table, high);
            }
            store_32(low, q + 64 * i + 4 * r);
            store_32(high, q_high + 64 * i + 4 * r);
        }
    }
#endif
}

// the types of 32 nibbles in a block, of 8 rows
template <typename F, typename X>
struct repacked_nibbles : F {
    static constexpr uint8_t FLIPPED = std::is_same<F, format_q4_0>::value ? 0x88 : 0;
    static const uint8_t * table() {
        return std::is_same<F, format_iq4_nl>::value ? values_iq4_nl.values : std::is_same<F, format_mxfp4>::value ? values_mxfp4.values
                                                                                                                   : nullptr;
    }

    static void unpack(const char * rows, size_t row_size, int n_rows, int64_t k0, int n, panel & p) {
        const auto * x0 = (const X *) rows + k0 / 32;
        const auto * x1 = n_rows > 8 ? (const X *) (rows + 8 * row_size) + k0 / 32 : x0;
        for (int i = 0; i < n / 32; ++i) {
            write_scales(x0[i], p.scales + i * ROWS);
            write_scales(x1[i], p.scales + i * ROWS + 8);
            uint8_t * q = p.q + 32 * i * ROWS;
            for (int half = 0; half < 2; ++half) {
                const auto codes = [half](const X & x) { return (const uint8_t *) x.qs + 64 * half; };
                interleave_8x8(codes(x0[i]), codes(x1[i]), FLIPPED, table(), q + 8 * half * ROWS, q + (16 + 8 * half) * ROWS);
            }
        }
    }
    static void write_scales(const block_mxfp4x8 & x, float * out) {
        for (int r = 0; r < 8; ++r) {
            out[r] = GGML_CPU_E8M0_TO_FP32_HALF(x.e[r]);
        }
    }
    template <typename Y>
    static void write_scales(const Y & x, float * out) {
        _mm256_store_ps(out, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) x.d)));
    }
};

// Q4_K and Q5_K, whose scales are those of one sub-block of eight rows together
template <typename F, typename X, int STEP>
struct repacked_k4 : F {
    static_assert(STEP == 8 && std::is_same<F, format_q4_K>::value, "no other layout on x86");

    static void unpack(const char * rows, size_t row_size, int n_rows, int64_t k0, int, panel & p) {
        for (int r = 0; r < n_rows; r += 8) {
            const X & x = ((const X *) (rows + r * row_size))[k0 / QK_K];
            alignas(32) uint8_t scales[8][2][8];
            unpack_scales_k4(x.scales, scales);
            for (int i = 0; i < 8; ++i) {
                const __m128i s = _mm_loadl_epi64((const __m128i *) scales[i][0]);
                _mm256_store_si256((__m256i *) (p.whole.scale[i] + r), scale_words<F::LARGEST>(_mm256_cvtepu8_epi32(s)));
            }
            for (int i = 0; i < 4; ++i) {
                _mm256_store_si256((__m256i *) (p.whole.pairs[i] + r), two_mins(scales[2 * i], scales[2 * i + 1]));
            }
            _mm256_store_ps(p.whole.d + r, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) x.d)));
            _mm256_store_ps(p.whole.m + r, negative(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) x.dmin))));
        }
        const X *x0 = (const X *) rows + k0 / QK_K, *x1 = n_rows > 8 ? (const X *) (rows + 8 * row_size) + k0 / QK_K : x0;
        for (int j = 0; j < 4; ++j) {
            for (int i = 0; i < 4; ++i) {
                uint8_t * q  = p.q + (64 * j + 8 * i) * ROWS;
                const int at = 256 * j + 64 * i;
                interleave_8x8(x0->qs + at, x1->qs + at, 0, nullptr, q, q + 32 * ROWS);
            }
        }
    }
};

#endif // __AVX2__

} // namespace allocmoe

#include "allocmoe-panel-neon.h"

#endif // ALLOCMOE_KERNEL
