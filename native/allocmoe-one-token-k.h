// The end of allocmoe-one-token.h: K-quants with AVX2, for one token, in whole blocks (allocmoe-whole-blocks.h).
#pragma once

#include "allocmoe-one-token.h"

#if defined(ALLOCMOE_WHOLE_BLOCKS)

namespace allocmoe {

// 16-bit numbers of a sub-block times the sums of its activations, both in order
template <int SUB>
inline __m256i multiply_sums(__m256i second, const int32_t * pairs) {
    return SUB == 16 ? _mm256_madd_epi16(second, load_32(pairs))
                     : _mm256_zextsi128_si256(_mm_madd_epi16(_mm256_castsi256_si128(second), _mm_loadu_si128((const __m128i *) pairs)));
}

template <typename F>
struct one_token_of_whole_blocks {
    static constexpr int GROUP = 1;
    using block                = typename F::block;

    static void multiply(const char * const * rows, int64_t n_in, const tile & x, float * const * out) {
        f4 sum = zero_four();
        for (int64_t k = 0; k < n_in / QK_K; ++k) {
            products y[STREAMS], second[STREAMS];
            alignas(16) float d[STREAMS], m[STREAMS];
            for (int i = 0; i < STREAMS; ++i) {
                const block & b = ((const block *) rows[i])[k];
                prefetch_after_block((const block *) rows[i], k);
                const block_scales s(b);
                __m256i products = _mm256_setzero_si256();
                for_eighths([&](auto i_) {
                    constexpr int I = decltype(i_)::value;
                    products        = add_32<I>(products, F::template codes_of<I>(b), x.q + k * QK_K + 32 * I, s.scale);
                });
                second[i].of = multiply_sums<F::SUB>(s.second, x.init + k * (QK_K / F::SUB / 2));
                y[i].of      = without_offset<F>(products, second[i].of);
                d[i]         = scale_of(b);
                if constexpr (F::MIN) {
                    m[i] = -min_of_k(b);
                }
            }
            i4 total[1];
            add_up(y, total);
            sum = fma(to_float(total[0]), mul(load_four(d), four_of(x.d + k)), sum);
            if (F::MIN) {
                add_up(second, total);
                sum = fma(to_float(total[0]), mul(load_four(m), four_of(x.d + k)), sum);
            }
        }
        store_each(sum, out);
    }
};

template <>
struct one_token<plain<format_q2_K>> : one_token_of_whole_blocks<format_q2_K> {};
template <>
struct one_token<plain<format_q3_K>> : one_token_of_whole_blocks<format_q3_K> {};
template <>
struct one_token<plain<format_q4_K>> : one_token_of_whole_blocks<format_q4_K> {};
template <>
struct one_token<plain<format_q5_K>> : one_token_of_whole_blocks<format_q5_K> {};
template <>
struct one_token<plain<format_q6_K>> : one_token_of_whole_blocks<format_q6_K> {};

// Of 8 rows together: sums of a row's 8 columns lie beside each other, rows 0 to 3 in one register and 4 to 7 in the other.
struct whole_sums {
    __m256i of[2];
};

inline __m256i total(whole_sums y) { return _mm256_permute4x64_epi64(_mm256_hadd_epi32(y.of[0], y.of[1]), 0xd8); }
inline __m256 halves_8(const ggml_half * x) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) x)); }

// What a block of 8 rows gives, added to their sums; second: of the mins.
template <typename X>
inline __m256 add_block(__m256 sum, const X & b, whole_sums y, __m256i second, __m256 xd) {
    sum = fma(to_float(total(y)), mul(halves_8(b.d), xd), sum);
    return fma(to_float(second), mul(negative(halves_8(b.dmin)), xd), sum);
}

// Adds sums of a sub-block, in 16 bits or the low half of 32, times the scale of its row: byte `FIRST + STEP*row`.
template <bool LOW_HALF, int FIRST, int STEP>
inline void add_scaled(whole_sums & y, whole_sums products, __m256i scales) {
    constexpr auto word = [](int row) { return LOW_HALF ? (int) 0x80808000 + FIRST + STEP * row : (int) 0x80008000 + (FIRST + STEP * row) * 0x10001; };
    for (int r = 0; r < 2; ++r) {
        const __m256i rows = _mm256_setr_epi32(word(4 * r), word(4 * r), word(4 * r + 1), word(4 * r + 1), word(4 * r + 2),
            word(4 * r + 2), word(4 * r + 3), word(4 * r + 3));
        y.of[r]            = add_products(y.of[r], products.of[r], _mm256_shuffle_epi8(scales, rows));
    }
}

template <typename X>
struct one_token<repacked_k4<format_q4_K, X, 8>> {
    static constexpr int GROUP = 8;
    static_assert(sizeof(X::scales) == 96 && sizeof(X::qs) >= 16, "what unpack_scales_k4() reads");

    static void multiply(const char * const * rows, int64_t n_in, const tile & x, float * const * out) {
        constexpr bool BY_4 = BY_FOUR<format_q4_K::LARGEST>;
        __m256 sum[STREAMS];
        for (auto & s : sum) {
            s = _mm256_setzero_ps();
        }
        for (int64_t k = 0; k < n_in / QK_K; ++k) {
            const __m256 xd = broadcast(x.d + k);
            for (int v = 0; v < STREAMS; ++v) {
                const X & b = ((const X *) rows[v])[k];
                prefetch_after(&b, offsetof(X, qs));
                alignas(32) uint8_t scales[8][2][8];
                unpack_scales_k4(b.scales, scales);
                whole_sums y   = { { zero(), zero() } };
                __m256i second = zero();
#pragma GCC unroll 1
                for (int j = 0; j < 4; ++j) {
                    const int8_t * q = x.q + k * QK_K + 64 * j;
                    prefetch_after(b.qs + 256 * j, 256);
                    whole_sums low = { { zero(), zero() } }, high = low;
#pragma GCC unroll 4
                    for (int i = 0; i < 4; ++i) {
                        const __m256i x0 = broadcast_8(q + 8 * i), x1 = broadcast_8(q + 8 * i + 32);
                        for (int r = 0; r < 2; ++r) {
                            const __m256i codes = load_32(b.qs + 256 * j + 64 * i + 32 * r);
#if defined(ALLOCMOE_VNNI)
                            low.of[r]  = in_this_order(dot_unsigned(low.of[r], bits<0, 15, 0>(codes), x0));
                            high.of[r] = in_this_order(dot_unsigned(high.of[r], bits<4, 15, 4>(codes), x1));
#else
                            low.of[r]  = in_this_order(_mm256_add_epi16(low.of[r], _mm256_maddubs_epi16(bits<0, 15, 0>(codes), x0)));
                            high.of[r] = in_this_order(_mm256_add_epi16(high.of[r], _mm256_maddubs_epi16(bits<4, 15, 0>(codes), x1)));
#endif
                        }
                    }
#if defined(ALLOCMOE_VNNI)
                    for (auto & r : high.of) {
                        r = _mm256_srai_epi32(r, 4); // the codes were 16 times as large
                    }
#endif
                    add_scaled<BY_4, 0, 1>(y, low, broadcast_8((const int8_t *) scales[2 * j][0]));
                    add_scaled<BY_4, 0, 1>(y, high, broadcast_8((const int8_t *) scales[2 * j + 1][0]));
                    second = add_products(second, two_mins(scales[2 * j], scales[2 * j + 1]), broadcast(x.init + 4 * k + j));
                }
                sum[v] = add_block(sum[v], b, y, second, xd);
            }
        }
        for (int v = 0; v < STREAMS; ++v) {
            _mm256_storeu_ps(out[v], sum[v]);
        }
    }
};

#if defined(__AVX512F__) // elsewhere llama.cpp repacks no Q2_K
template <typename X>
struct one_token<repacked<format_q2_K, X, 8, 8>> {
    static constexpr int GROUP = 8;

    static void multiply(const char * const * rows, int64_t n_in, const tile & x, float * const * out) {
        __m256 sum[STREAMS];
        for (auto & s : sum) {
            s = _mm256_setzero_ps();
        }
        for (int64_t k = 0; k < n_in / QK_K; ++k) {
            const __m256 xd = broadcast(x.d + k);
            for (int v = 0; v < STREAMS; ++v) {
                const X & b = ((const X *) rows[v])[k];
                prefetch_after_block((const X *) rows[v], k);
                whole_sums y   = { { zero(), zero() } };
                __m256i second = zero();
                for_eighths([&](auto i_) {
                    constexpr int I = decltype(i_)::value;
                    // two sub-blocks' scales take turns, each with its min in the high half
                    const __m128i both   = _mm_loadu_si128((const __m128i *) (b.scales + 16 * I));
                    const __m256i scales = _mm256_broadcastsi128_si256(_mm_and_si128(both, _mm_set1_epi8(15)));
                    whole_sums halves[2];
                    for (int half = 0; half < 2; ++half) {
                        const int8_t * q = x.q + k * QK_K + 32 * I + 16 * half;
                        for (int r = 0; r < 2; ++r) {
                            const uint8_t * codes = b.qs + (4 * (I / 4) + 2 * half) * 64 + 32 * r;
                            halves[half].of[r]    = _mm256_add_epi16(_mm256_maddubs_epi16(bits<I % 4 * 2, 3, 0>(load_32(codes)), broadcast_8(q)),
                                _mm256_maddubs_epi16(bits<I % 4 * 2, 3, 0>(load_32(codes + 64)), broadcast_8(q + 8)));
                        }
                    }
                    add_scaled<false, 0, 2>(y, halves[0], scales);
                    add_scaled<false, 1, 2>(y, halves[1], scales);
                    const __m256i mins = _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16(both, 4), _mm_set1_epi8(15)));
                    second             = add_products(second, mins, broadcast(x.init + 8 * k + I));
                });
                sum[v] = add_block(sum[v], b, y, second, xd);
            }
        }
        for (int v = 0; v < STREAMS; ++v) {
            _mm256_storeu_ps(out[v], sum[v]);
        }
    }
};
#endif

} // namespace allocmoe

#endif // ALLOCMOE_WHOLE_BLOCKS
