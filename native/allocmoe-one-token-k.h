// The end of allocmoe-one-token.h: K-quants and IQ4_XS on x86, for one token, in whole blocks (allocmoe-whole-blocks.h).
#pragma once

#include "allocmoe-one-token.h"

#if defined(ALLOCMOE_KERNEL) && defined(__AVX2__)

namespace allocmoe {

// 16-bit numbers of a sub-block times the sums of its activations, both in order
template <int SUB>
inline __m256i multiply_sums(__m256i second, const int32_t * pairs) {
    return SUB == 16 ? _mm256_madd_epi16(second, load_32(pairs))
                     : _mm256_zextsi128_si256(_mm_madd_epi16(_mm256_castsi256_si128(second), _mm_loadu_si128((const __m128i *) pairs)));
}

// The products of a block's codes, each times the scale of its sub-block, in sums that are yet to be added up.
template <typename F>
inline __m256i multiply_codes(const typename F::block & b, const block_scales & s, const int8_t * x) {
    __m256i sum = _mm256_setzero_si256();
    for_eighths([&](auto i_) {
        constexpr int I = decltype(i_)::value;
        sum             = add_32<I>(sum, F::template codes_of<I>(b), x + 32 * I, s.scale);
    });
    return sum;
}

#if defined(ALLOCMOE_AVX512)
// 64 columns at a time: a lane of their sums of four, which fit into 16 bits, is a sub-block
template <>
inline __m256i multiply_codes<format_q6_K>(const block_q6_K & b, const block_scales &, const int8_t * x) {
    const __m512i up = _mm512_setr_epi64(4, 4, 4, 4, 2, 2, 2, 2), down = _mm512_setr_epi64(0, 0, 0, 0, 2, 2, 2, 2);
    const __m512i each4  = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512i scales = _mm512_and_si512(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) b.scales)), _mm512_set1_epi32(0xffff));
    __m512i sum          = zero();
    const auto add_64    = [&](int i, __m512i low, __m512i high) {
        const __m512i codes = either(bits<0, 15, 0>(low), _mm512_and_si512(high, _mm512_set1_epi8(0x30)));
        const __m512i scale = _mm512_permutexvar_epi32(_mm512_add_epi32(each4, _mm512_set1_epi32(4 * i)), scales);
        sum                 = add_products(sum, dot_unsigned(zero(), codes, load_bytes(x + 64 * i)), scale);
    };
    for (int h = 0; h < 2; ++h) {
        const __m512i low  = load_bytes(b.ql + 64 * h);
        const __m512i high = _mm512_broadcast_i64x4(load_32(b.qh + 32 * h));
        add_64(2 * h, low, _mm512_sllv_epi64(high, up));
        add_64(2 * h + 1, _mm512_srli_epi16(low, 4), _mm512_srlv_epi64(high, down));
    }
    return add(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64(sum, 1));
}
#endif

// A register's codes are of whole sub-blocks, 16 bytes each: the first halves of these, and the others.
template <>
inline __m256i multiply_codes<format_iq4_xs>(const block_iq4_xs & b, const block_scales & s, const int8_t * x) {
    vi sum                = zero();
    const auto add_halves = [&](auto i_) {
        constexpr int I = decltype(i_)::value;
        const vb both = load_bytes(b.qs + 4 * W * I), x0 = load_bytes(x + 8 * W * I), x1 = load_bytes(x + 8 * W * I + 4 * W);
        const vb codes[2] = { look_up(values_iq4_nl.values, bits<0, 15, 0>(both)), look_up(values_iq4_nl.values, bits<4, 15, 0>(both)) };
#if defined(ALLOCMOE_AVX512)
        const vb halves[2]  = { _mm512_shuffle_i64x2(x0, x1, 0x88), _mm512_shuffle_i64x2(x0, x1, 0xdd) };
        const __m512i each4 = _mm512_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4, 1, 1, 1, 1, 5, 5, 5, 5);
        const vi scales     = _mm512_permutexvar_epi32(_mm512_add_epi32(each4, _mm512_set1_epi32(2 * I)), _mm512_castsi256_si512(s.scale));
#else
        const vb halves[2] = { _mm256_permute2x128_si256(x0, x1, 0x20), _mm256_permute2x128_si256(x0, x1, 0x31) };
        const vi scales    = _mm256_shuffle_epi32(s.scale, 0x55 * I);
#endif
        sum = add_signed<2>(sum, codes, halves, scales);
    };
    add_halves(std::integral_constant<int, 0>()), add_halves(std::integral_constant<int, 1>());
#if defined(ALLOCMOE_AVX512)
    return add(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64(sum, 1));
#else
    add_halves(std::integral_constant<int, 2>()), add_halves(std::integral_constant<int, 3>());
    return sum;
#endif
}

// The scales of four blocks, and those of their mins. Written to memory one by one they could not be read back together without waiting.
template <typename B>
inline void halves_of_pairs(const B * const * b, f4 & d, f4 & m) {
    int32_t both[STREAMS];
    for (int i = 0; i < STREAMS; ++i) {
        memcpy(both + i, &b[i]->GGML_COMMON_AGGR_U, sizeof(both[i]));
    }
    const __m128i x = _mm_shuffle_epi8(_mm_setr_epi32(both[0], both[1], both[2], both[3]), _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    const __m256 y  = _mm256_cvtph_ps(x);
    d               = _mm256_castps256_ps128(y);
    m               = _mm256_extractf128_ps(y, 1);
}

template <typename F>
struct one_token_of_whole_blocks {
    static constexpr int GROUP = 1;
    using block                = typename F::block;

    static void multiply(const char * const * rows, int64_t n_in, const tile & x, float * const * out) {
        f4 sum = zero_four();
        for (int64_t k = 0; k < n_in / QK_K; ++k) {
            products y[STREAMS], second[STREAMS];
            const block * b[STREAMS];
#pragma GCC unroll 4 // sums stay in registers
            for (int i = 0; i < STREAMS; ++i) {
                b[i] = (const block *) rows[i] + k;
                prefetch_after_block((const block *) rows[i], k);
                const block_scales s(*b[i]);
                second[i] = multiply_sums<F::SUB>(s.second, x.init + k * (QK_K / F::SUB / 2));
                y[i]      = without_offset<F>(multiply_codes<F>(*b[i], s, x.q + k * QK_K), second[i]);
            }
            const f4 xd = four_of(x.d + k);
            if constexpr (F::MIN) {
                f4 d, m;
                halves_of_pairs(b, d, m);
                sum = fma(to_float(add_up(y)), mul(d, xd), sum);
                sum = fma(to_float(add_up(second)), mul(negative(m), xd), sum);
            } else {
                sum = fma(to_float(add_up(y)), mul(halves_of(b), xd), sum);
            }
        }
        store_each(sum, out);
    }
};

// Of 8 rows together: sums of a row's 8 columns lie beside each other, the rows one after the other in a register or two.
constexpr int REGISTERS_OF_8 = 16 / W;
struct whole_sums {
    vi of[REGISTERS_OF_8];
};
inline whole_sums no_sums() {
    whole_sums y;
    for (auto & r : y.of) {
        r = zero();
    }
    return y;
}

#if defined(ALLOCMOE_AVX512)
inline __m256i total(whole_sums y) { return _mm512_cvtepi64_epi32(_mm512_add_epi32(y.of[0], _mm512_srli_epi64(y.of[0], 32))); }
inline vb repeated(__m128i x) { return _mm512_broadcast_i32x4(x); }
#else
inline __m256i total(whole_sums y) { return _mm256_permute4x64_epi64(_mm256_hadd_epi32(y.of[0], y.of[1]), 0xd8); }
inline vb repeated(__m128i x) { return _mm256_broadcastsi128_si256(x); }
#endif
inline __m256 halves_8(const ggml_half * x) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) x)); }

// What a block of 8 rows gives, added to their sums; second: of the mins.
template <typename X>
inline __m256 add_block(__m256 sum, const X & b, whole_sums y, __m256i second, __m256 xd) {
    sum = fma(to_float(total(y)), mul(halves_8(b.d), xd), sum);
    return fma(to_float(second), mul(negative(halves_8(b.dmin)), xd), sum);
}

// For each 32 bits of such sums, where their scales lie: byte `FIRST + STEP*row`, in 16 bits, or the low half of 32 alone.
template <bool LOW_HALF, int FIRST, int STEP>
struct scale_bytes {
    alignas(64) uint32_t of[16];
    constexpr scale_bytes() : of() {
        for (int i = 0; i < 16; ++i) {
            const uint32_t byte = FIRST + STEP * (i / 2);
            of[i]               = LOW_HALF ? 0x80808000 + byte : 0x80008000 + byte * 0x10001;
        }
    }
};

// Adds sums of a sub-block, in 16 bits or the low half of 32, times the scale of its row.
template <bool LOW_HALF, int FIRST, int STEP>
inline void add_scaled(whole_sums & y, whole_sums products, vb scales) {
    static constexpr scale_bytes<LOW_HALF, FIRST, STEP> bytes;
    for (int r = 0; r < REGISTERS_OF_8; ++r) {
        y.of[r] = add_products(y.of[r], products.of[r], shuffle_bytes(scales, load_bytes(bytes.of + W * r)));
    }
}

template <typename X>
constexpr bool place_after_place<repacked_k4<format_q4_K, X, 8>> = true;

template <typename X>
struct one_token<repacked_k4<format_q4_K, X, 8>> {
    static constexpr int GROUP = 8;
    static_assert(sizeof(X::scales) == 96 && sizeof(X::qs) >= 16, "what unpack_scales_k4() reads");

    static void multiply(const char * const * rows, int64_t n_in, const tile & x, float * const * out) {
        const int64_t n_blocks = n_in / QK_K;
        __m256 sum[STREAMS];
        for (auto & s : sum) {
            s = _mm256_setzero_ps();
        }
        const bool together = allocmoe_cpu_streams;
        for (int64_t i = 0; i < (together ? n_blocks : STREAMS); ++i) {
            for (int64_t j = 0; j < (together ? STREAMS : n_blocks); ++j) {
                const int64_t k = together ? i : j;
                const int v     = together ? j : i;
                sum[v]          = add_product(sum[v], ((const X *) rows[v])[k], x, k);
            }
        }
        for (int v = 0; v < STREAMS; ++v) {
            _mm256_storeu_ps(out[v], sum[v]);
        }
    }

    // With block k of 8 rows times the activations.
    static __m256 add_product(__m256 sum, const X & b, const tile & x, int64_t k) {
        constexpr bool BY_4 = BY_FOUR<format_q4_K::LARGEST>;
        prefetch_after(&b, offsetof(X, qs));
        alignas(32) uint8_t scales[8][2][8];
        unpack_scales_k4(b.scales, scales);
        whole_sums y   = no_sums();
        __m256i second = _mm256_setzero_si256();
#pragma GCC unroll 1
        for (int j = 0; j < 4; ++j) {
            const int8_t * q = x.q + k * QK_K + 64 * j;
            prefetch_after(b.qs + 256 * j, 256);
            whole_sums low = no_sums(), high = low;
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const vb x0 = broadcast_8(q + 8 * i), x1 = broadcast_8(q + 8 * i + 32);
                for (int r = 0; r < REGISTERS_OF_8; ++r) {
                    const vb codes = load_bytes(b.qs + 256 * j + 64 * i + 4 * W * r);
#if defined(ALLOCMOE_VNNI)
                    low.of[r]  = in_this_order(dot_unsigned(low.of[r], bits<0, 15, 0>(codes), x0));
                    high.of[r] = in_this_order(dot_unsigned(high.of[r], bits<4, 15, 4>(codes), x1));
#else
                    low.of[r]  = in_this_order(add_16(low.of[r], multiply_pairs(bits<0, 15, 0>(codes), x0)));
                    high.of[r] = in_this_order(add_16(high.of[r], multiply_pairs(bits<4, 15, 0>(codes), x1)));
#endif
                }
            }
#if defined(ALLOCMOE_VNNI)
            for (auto & r : high.of) {
                r = shift_right<4>(r); // the codes were 16 times as large
            }
#endif
            add_scaled<BY_4, 0, 1>(y, low, broadcast_8((const int8_t *) scales[2 * j][0]));
            add_scaled<BY_4, 0, 1>(y, high, broadcast_8((const int8_t *) scales[2 * j + 1][0]));
            second = add_products(second, two_mins(scales[2 * j], scales[2 * j + 1]), _mm256_set1_epi32(x.init[4 * k + j]));
        }
        return add_block(sum, b, y, second, _mm256_broadcast_ss(x.d + k));
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
            const __m256 xd = _mm256_broadcast_ss(x.d + k);
            for (int v = 0; v < STREAMS; ++v) {
                const X & b = ((const X *) rows[v])[k];
                prefetch_after_block((const X *) rows[v], k);
                whole_sums y   = no_sums();
                __m256i second = _mm256_setzero_si256();
                for_eighths([&](auto i_) {
                    constexpr int I = decltype(i_)::value;
                    // two sub-blocks' scales take turns, each with its min in the high half
                    const __m128i both = _mm_loadu_si128((const __m128i *) (b.scales + 16 * I));
                    const vb scales    = repeated(_mm_and_si128(both, _mm_set1_epi8(15)));
                    whole_sums halves[2];
                    for (int half = 0; half < 2; ++half) {
                        const int8_t * q = x.q + k * QK_K + 32 * I + 16 * half;
                        for (int r = 0; r < REGISTERS_OF_8; ++r) {
                            const uint8_t * codes = b.qs + (4 * (I / 4) + 2 * half) * 64 + 4 * W * r;
                            halves[half].of[r]    = add_16(multiply_pairs(bits<I % 4 * 2, 3, 0>(load_bytes(codes)), broadcast_8(q)),
                                multiply_pairs(bits<I % 4 * 2, 3, 0>(load_bytes(codes + 64)), broadcast_8(q + 8)));
                        }
                    }
                    add_scaled<false, 0, 2>(y, halves[0], scales);
                    add_scaled<false, 1, 2>(y, halves[1], scales);
                    const __m256i mins = _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16(both, 4), _mm_set1_epi8(15)));
                    second             = add_products(second, mins, _mm256_set1_epi32(x.init[8 * k + I]));
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

#endif // ALLOCMOE_KERNEL
