// A single token: rows of weights are multiplied as they are read. Making a panel of them would be most of the work.
//
// Memory is the limit here, and a thread that reads one place after the other leaves much of it unused: the hardware
// fetches ahead for each place apart. So a thread multiplies rows from STREAMS places, far apart, at the same time.
//
// Sub-blocks are added in the panels' order with the same roundings: a token's result is the same, bit for bit, whether it
// comes alone or with others.
#pragma once

#include "allocmoe-panel.h"

namespace allocmoe {

constexpr int STREAMS = 4;

// For a layout L: GROUP, the rows of each place, 0 if there is no such kernel; and
// multiply(const char * const rows[STREAMS], int64_t n_in, const tile & x, float * const out[STREAMS]).
template <typename L>
struct one_token {
    static constexpr int GROUP = 0;
};

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)

//
// layouts of 8 rows with 8 codes of each in turn: a register of products has two lanes for each row
//

// the sums of 8 rows and of 8 others
inline __m512i sum_pairs(__m512i a, __m512i b) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd  = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return _mm512_add_epi32(_mm512_permutex2var_epi32(a, even, b), _mm512_permutex2var_epi32(a, odd, b));
}

inline __m512i broadcast_8(const int8_t * x) {
    int64_t eight;
    memcpy(&eight, x, 8);
    return _mm512_set1_epi64(eight);
}

// fp16 of 8 rows and of 8 others
template <typename T>
inline __m512 to_floats(const T * a, const T * b) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) a))),
        _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) b)), 1);
}

inline void store_pair(__m512 sum, float * a, float * b) {
    _mm256_storeu_ps(a, _mm512_castps512_ps256(sum));
    _mm256_storeu_ps(b, _mm512_extractf32x8_ps(sum, 1));
}

template <>
struct one_token<repacked_q4_K<8>> {
    static constexpr int GROUP = 8;

    // four sub-blocks' 6-bit scales, each followed by its mins, 8 rows of both
    static __m512i scales(const uint8_t * packed) {
        const __m512i low  = _mm512_setr_epi32(0, 2, 1, 2, 3, 5, 4, 5, 6, 8, 7, 8, 9, 11, 10, 11);
        const __m512i high = _mm512_setr_epi32(0, 0, 0, 1, 3, 3, 3, 4, 6, 6, 6, 7, 9, 9, 9, 10);
        const __m512i x    = _mm512_loadu_si512(packed); // 48 bytes of it: 16 of what follows too
        const __m512i a    = _mm512_srlv_epi32(_mm512_permutexvar_epi32(low, x), _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0, 0, 4)));
        const __m512i b    = _mm512_srli_epi32(_mm512_permutexvar_epi32(high, x), 2);
        return _mm512_or_si512(
            _mm512_and_si512(a, _mm512_broadcast_i32x4(_mm_setr_epi32(0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f))),
            _mm512_and_si512(b, _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x30303030, 0, 0x30303030))));
    }

    // two groups by 256 columns; x begins there
    static __m512 add(const block_q4_Kx8 & a, const block_q4_Kx8 & b, const tile & x, __m512 sum) {
        static_assert(sizeof(a.scales) == 96 && sizeof(a.qs) >= 16, "what scales() reads");
        const __m512i mask_low = _mm512_set1_epi8(0x0f), mask_high = _mm512_set1_epi8((char) 0xf0);
        const __m512 d = to_floats(a.d, b.d), d_min = _mm512_xor_ps(to_floats(a.dmin, b.dmin), _mm512_set1_ps(-0.0f));
        alignas(64) uint8_t s[8][16], m[8][16];
        for (int h = 0; h < 2; ++h) {
            const __m512i sa = scales(a.scales + 48 * h), sb = scales(b.scales + 48 * h);
            _mm512_store_si512(s[4 * h], _mm512_unpacklo_epi64(sa, sb));
            _mm512_store_si512(m[4 * h], _mm512_unpackhi_epi64(sa, sb));
        }
        const auto add_sub_block = [&](int i, __m512i dot) {
            const __m512i si = _mm512_cvtepu8_epi32(_mm_load_si128((const __m128i *) s[i]));
            const __m512i mi = _mm512_cvtepu8_epi32(_mm_load_si128((const __m128i *) m[i]));
            const __m512 di  = _mm512_mul_ps(_mm512_mul_ps(d, _mm512_cvtepi32_ps(si)), _mm512_set1_ps(x.d[i]));
            sum              = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), di, sum);
            sum              = _mm512_fmadd_ps(_mm512_mul_ps(d_min, _mm512_cvtepi32_ps(mi)), _mm512_set1_ps(x.sum[i]), sum);
        };
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            __m512i low[2]  = { _mm512_setzero_si512(), _mm512_setzero_si512() };
            __m512i high[2] = { _mm512_setzero_si512(), _mm512_setzero_si512() };
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const __m512i xl = broadcast_8(x.q + 64 * j + 8 * i), xh = broadcast_8(x.q + 64 * j + 8 * i + 32);
                const __m512i qa = _mm512_loadu_si512(a.qs + 256 * j + 64 * i), qb = _mm512_loadu_si512(b.qs + 256 * j + 64 * i);
                low[0]  = _mm512_dpbusd_epi32(low[0], _mm512_and_si512(qa, mask_low), xl);
                low[1]  = _mm512_dpbusd_epi32(low[1], _mm512_and_si512(qb, mask_low), xl);
                high[0] = _mm512_dpbusd_epi32(high[0], _mm512_and_si512(qa, mask_high), xh);
                high[1] = _mm512_dpbusd_epi32(high[1], _mm512_and_si512(qb, mask_high), xh);
            }
            add_sub_block(2 * j, sum_pairs(low[0], low[1]));
            add_sub_block(2 * j + 1, _mm512_srai_epi32(sum_pairs(high[0], high[1]), 4)); // 16 times the code until here
        }
        return sum;
    }

    static void multiply(const char * const * rows, int64_t n_in, const tile & x, float * const * out) {
        __m512 sum[2] = { _mm512_setzero_ps(), _mm512_setzero_ps() };
        for (int64_t k = 0; k < n_in / QK_K; ++k) {
            const tile part = { x.q + k * QK_K, x.d + k * 8, x.sum + k * 8, nullptr };
            for (int i = 0; i < 2; ++i) {
                sum[i] = add(((const block_q4_Kx8 *) rows[2 * i])[k], ((const block_q4_Kx8 *) rows[2 * i + 1])[k], part, sum[i]);
            }
        }
        store_pair(sum[0], out[0], out[1]);
        store_pair(sum[1], out[2], out[3]);
    }
};

// the types of 32 nibbles in a block
template <typename F, typename X>
struct one_token<repacked_nibbles<F, X>> {
    static constexpr int GROUP = 8;

    static void codes(const void * from, __m512i & low, __m512i & high) {
        const __m512i x = _mm512_xor_si512(_mm512_loadu_si512(from), _mm512_set1_epi8((char) repacked_nibbles<F, X>::FLIPPED));
        low             = _mm512_and_si512(x, _mm512_set1_epi8(15));
        high            = _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15));
        if (const uint8_t * table = repacked_nibbles<F, X>::table()) {
            const __m512i values = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) table));
            low                  = _mm512_shuffle_epi8(values, low);
            high                 = _mm512_shuffle_epi8(values, high);
        }
    }

    static void multiply(const char * const * rows, int64_t n_in, const tile & x, float * const * out) {
        __m512 sum[2] = { _mm512_setzero_ps(), _mm512_setzero_ps() };
        for (int64_t k = 0; k < n_in / 32; ++k) {
            const __m512 xd    = _mm512_set1_ps(x.d[k]);
            const __m512i init = _mm512_set1_epi32(x.init[k]);
            for (int v = 0; v < 2; ++v) {
                const X * const blocks[2] = { (const X *) rows[2 * v] + k, (const X *) rows[2 * v + 1] + k };
                alignas(64) float d[16];
                __m512i dot[2];
                for (int i = 0; i < 2; ++i) {
                    repacked_nibbles<F, X>::write_scales(*blocks[i], d + 8 * i);
                    dot[i] = _mm512_setzero_si512();
                    for (int half = 0; half < 2; ++half) {
                        __m512i low, high;
                        codes(blocks[i]->qs + 64 * half, low, high);
                        dot[i] = _mm512_dpbusd_epi32(dot[i], low, broadcast_8(x.q + 32 * k + 8 * half));
                        dot[i] = _mm512_dpbusd_epi32(dot[i], high, broadcast_8(x.q + 32 * k + 8 * half + 16));
                    }
                }
                const __m512 y = _mm512_cvtepi32_ps(_mm512_add_epi32(sum_pairs(dot[0], dot[1]), init));
                sum[v]         = _mm512_fmadd_ps(y, _mm512_mul_ps(_mm512_load_ps(d), xd), sum[v]);
            }
        }
        store_pair(sum[0], out[0], out[1]);
        store_pair(sum[1], out[2], out[3]);
    }
};

//
// rows as they are in the file, one of each place
//

// [lane][STREAMS]: the sum of each 128-bit lane of each row
inline __m256i sum_lanes(const __m256i * row) {
    const __m256i a = _mm256_add_epi32(_mm256_unpacklo_epi32(row[0], row[1]), _mm256_unpackhi_epi32(row[0], row[1]));
    const __m256i b = _mm256_add_epi32(_mm256_unpacklo_epi32(row[2], row[3]), _mm256_unpackhi_epi32(row[2], row[3]));
    return _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
}
inline __m512i sum_lanes(const __m512i * row) {
    const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(row[0], row[1]), _mm512_unpackhi_epi32(row[0], row[1]));
    const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(row[2], row[3]), _mm512_unpackhi_epi32(row[2], row[3]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}
static_assert(STREAMS == 4, "the sums above");

template <typename B>
inline __m128 scales_of(const B * const * block) {
    return _mm_cvtph_ps(_mm_setr_epi16(block[0]->d, block[1]->d, block[2]->d, block[3]->d, 0, 0, 0, 0));
}

inline void store_each(__m128 sum, float * const * out) {
    alignas(16) float sums[STREAMS];
    _mm_store_ps(sums, sum);
    for (int i = 0; i < STREAMS; ++i) {
        *out[i] = sums[i];
    }
}

// 32 codes in a block, one scale
template <typename F>
struct one_token_32 {
    static constexpr int GROUP = 1;

    static void multiply(const char * const * rows, int64_t n_in, const tile & x, float * const * out) {
        using block = typename F::block;
        __m128 sum  = _mm_setzero_ps();
        for (int64_t k = 0; k < n_in / 32; ++k) {
            const __m256i xk = _mm256_loadu_si256((const __m256i *) (x.q + 32 * k));
            const block * b[STREAMS];
            __m256i dot[STREAMS];
            for (int i = 0; i < STREAMS; ++i) {
                b[i]   = (const block *) rows[i] + k;
                dot[i] = _mm256_dpbusd_epi32(_mm256_setzero_si256(), codes(*b[i]), xk);
            }
            const __m256i lanes = sum_lanes(dot);
            const __m128i y     = _mm_add_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
            const __m128 d      = _mm_mul_ps(scales_of(b), _mm_set1_ps(x.d[k]));
            sum                 = _mm_fmadd_ps(_mm_cvtepi32_ps(_mm_add_epi32(y, _mm_set1_epi32(x.init[k]))), d, sum);
        }
        store_each(sum, out);
    }

    static __m256i codes(const block_q8_0 & b) { return flip(load_32(b.qs), SIGNED_BIAS); }
    static __m256i codes(const block_q5_0 & b) {
        uint32_t fifth;
        memcpy(&fifth, b.qh, 4);
        const __m256i x   = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) b.qs));
        const __m256i low = _mm256_and_si256(_mm256_srlv_epi64(x, _mm256_setr_epi64x(0, 0, 4, 4)), _mm256_set1_epi8(15));
        return _mm256_mask_add_epi8(low, fifth, low, _mm256_set1_epi8(16));
    }
};

template <>
struct one_token<plain<format_q8_0>> : one_token_32<format_q8_0> {};
template <>
struct one_token<plain<format_q5_0>> : one_token_32<format_q5_0> {};

template <>
struct one_token<plain<format_q6_K>> {
    static constexpr int GROUP = 1;

    static void multiply(const char * const * rows, int64_t n_in, const tile & x, float * const * out) {
        const __m512i mask_low = _mm512_set1_epi8(0x0f), mask_high = _mm512_set1_epi8(0x30);
        const __m512i up = _mm512_setr_epi64(4, 4, 4, 4, 2, 2, 2, 2), down = _mm512_setr_epi64(0, 0, 0, 0, 2, 2, 2, 2);
        const __m512i each4 = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        __m128 sum          = _mm_setzero_ps();
        for (int64_t k = 0; k < n_in / QK_K; ++k) {
            const int8_t * q = x.q + k * QK_K;
            const block_q6_K * b[STREAMS];
            __m128i s[STREAMS];
            __m512i dot[4][STREAMS]; // of 64 columns
            for (int i = 0; i < STREAMS; ++i) {
                b[i] = (const block_q6_K *) rows[i] + k;
                s[i] = _mm_loadu_si128((const __m128i *) b[i]->scales);
                for (int h = 0; h < 2; ++h) {
                    const __m512i low  = _mm512_loadu_si512(b[i]->ql + 64 * h);
                    const __m512i high = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) (b[i]->qh + 32 * h)));
                    const __m512i q0   = _mm512_or_si512(_mm512_and_si512(low, mask_low),
                        _mm512_and_si512(_mm512_sllv_epi64(high, up), mask_high));
                    const __m512i q1   = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(low, 4), mask_low),
                        _mm512_and_si512(_mm512_srlv_epi64(high, down), mask_high));
                    dot[2 * h][i]      = _mm512_dpbusd_epi32(_mm512_setzero_si512(), q0, _mm512_loadu_si512(q + 128 * h));
                    dot[2 * h + 1][i]  = _mm512_dpbusd_epi32(_mm512_setzero_si512(), q1, _mm512_loadu_si512(q + 128 * h + 64));
                }
            }
            const __m512 d       = _mm512_broadcast_f32x4(scales_of(b));
            const __m512 xd      = _mm512_set1_ps(x.d[k * 16]);
            const __m128i s01[2] = { _mm_unpacklo_epi8(s[0], s[1]), _mm_unpackhi_epi8(s[0], s[1]) };
            const __m128i s23[2] = { _mm_unpacklo_epi8(s[2], s[3]), _mm_unpackhi_epi8(s[2], s[3]) };
            for (int c = 0; c < 4; ++c) { // four sub-blocks
                const __m128i sc   = c % 2 ? _mm_unpackhi_epi16(s01[c / 2], s23[c / 2]) : _mm_unpacklo_epi16(s01[c / 2], s23[c / 2]);
                const __m512i init = _mm512_permutexvar_epi32(each4, _mm512_castsi128_si512(
                                                                         _mm_loadu_si128((const __m128i *) (x.init + k * 16 + 4 * c))));
                const __m512 y     = _mm512_cvtepi32_ps(_mm512_add_epi32(sum_lanes(dot[c]), init));
                const __m512 f     = _mm512_mul_ps(_mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sc))), xd);
                sum                = _mm_fmadd_ps(_mm512_castps512_ps128(y), _mm512_castps512_ps128(f), sum);
                sum                = _mm_fmadd_ps(_mm512_extractf32x4_ps(y, 1), _mm512_extractf32x4_ps(f, 1), sum);
                sum                = _mm_fmadd_ps(_mm512_extractf32x4_ps(y, 2), _mm512_extractf32x4_ps(f, 2), sum);
                sum                = _mm_fmadd_ps(_mm512_extractf32x4_ps(y, 3), _mm512_extractf32x4_ps(f, 3), sum);
            }
        }
        store_each(sum, out);
    }
};

#endif

} // namespace allocmoe
