// A single token: rows of weights are multiplied as they are read. Making a panel of them would be most of the work.
//
// Memory is the limit here, and a thread that reads one place after the other leaves much of it unused: the hardware
// fetches ahead for each place apart. So a thread multiplies rows from STREAMS places, far apart, at the same time. And it
// asks for what comes next itself, because the hardware stops at the end of every page. On AMD's CPUs it does not: there what
// is asked for is in the way (a token on Zen 4 took up to 1.4 times as long), and repacked Q4_K, the quickest to multiply, is read
// one place after the other.
//
// Sub-blocks are added in the panels' order with the same roundings: a token's result is the same, bit for bit, whether it
// comes alone or with others.
#pragma once

#include "allocmoe-cpu.h"
#include "allocmoe-panel.h"

#if defined(ALLOCMOE_KERNEL)

namespace allocmoe {

constexpr int STREAMS = 4;
// Bytes, from a block to what is asked for while that is multiplied; half and twice as many do as well. Not timed on Arm, where
// four times as many are less than a third of a first-level cache.
constexpr int AHEAD = 2304;

// While n bytes are multiplied; few at once, because no more than some 16 lines can be on their way.
inline void prefetch_after(const void * from, size_t n) {
    if (allocmoe_cpu_streams) {
        prefetch<3>((const char *) from + AHEAD, n);
    }
}

// While block k of a row is, or of rows together: not for each where several lie in a line.
template <typename X>
inline void prefetch_after_block(const X * row, int64_t k) {
    constexpr int TOGETHER = sizeof(X) < 64 ? 64 / sizeof(X) : 1;
    if (k % TOGETHER == 0) {
        prefetch_after(row + k, TOGETHER * sizeof(X));
    }
}

// The same in each place, where blocks are small.
template <typename X>
inline void prefetch_after_blocks(const char * const * rows, int64_t k) {
    if (allocmoe_cpu_streams) {
        for (int i = 0; i < STREAMS; ++i) {
            prefetch_after_block((const X *) rows[i], k);
        }
    }
}

// For a layout L: GROUP, the rows of each place, and
// multiply(const char * const rows[STREAMS], int64_t n_in, const tile & x, float * const out[STREAMS]).
template <typename L>
struct one_token;

// Of those layouts whose rows of one place are multiplied before the next place's.
template <typename L>
constexpr bool place_after_place = false;

#if defined(__AVX2__) // Arm's: allocmoe-one-token-neon.h
//
// repacked layouts: 8 rows together, 8 bytes of each in turn. A register of sums is of W rows: of one group, or of two groups in
// a wide register
//

// 8 columns of W rows
struct piece {
    vb of[2];
};

// For each row two sums, beside each other. In 16 bits where there is no VNNI and the codes are so small that four products of
// two of them fit.
struct sums {
    vi of[2] = { zero(), zero() };
};

template <bool SIGNED>
inline void accumulate(sums & s, piece w, const int8_t * x) {
    for (int i = 0; i < 2; ++i) {
#if defined(ALLOCMOE_VNNI)
        s.of[i] = dot<SIGNED>(s.of[i], w.of[i], broadcast_8(x));
#else
        // rows share the activations' absolute values
        const __m256i y = broadcast_8(x);
        s.of[i]         = SIGNED ? dot<false>(s.of[i], _mm256_abs_epi8(y), _mm256_sign_epi8(w.of[i], y))
                                 : _mm256_add_epi16(s.of[i], _mm256_maddubs_epi16(w.of[i], y));
#endif
    }
}

template <bool SIGNED>
inline vi total(sums s) {
#if defined(ALLOCMOE_AVX512)
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd  = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return add(_mm512_permutex2var_epi32(s.of[0], even, s.of[1]), _mm512_permutex2var_epi32(s.of[0], odd, s.of[1]));
#else
#if !defined(ALLOCMOE_VNNI)
    if (!SIGNED) {
        for (auto & x : s.of) {
            x = _mm256_madd_epi16(x, _mm256_set1_epi16(1));
        }
    }
#endif
    return _mm256_permute4x64_epi64(_mm256_hadd_epi32(s.of[0], s.of[1]), 0xd8);
#endif
}

// W floats from numbers of 8 rows, and of 8 others where W is 16
#if defined(ALLOCMOE_AVX512)
inline vi whole_numbers(const uint8_t * a, const uint8_t * b) {
    return _mm512_cvtepu8_epi32(_mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i *) a), _mm_loadl_epi64((const __m128i *) b)));
}
inline vf halves(const ggml_half * a, const ggml_half * b) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) a))),
        _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) b)), 1);
}
inline vf powers_of_two(const uint8_t * a, const uint8_t * b) {
    const vi e      = whole_numbers(a, b);
    const vi normal = _mm512_slli_epi32(_mm512_sub_epi32(e, _mm512_set1_epi32(1)), 23);
    return _mm512_castsi512_ps(_mm512_mask_sllv_epi32(
        normal, _mm512_cmplt_epi32_mask(e, _mm512_set1_epi32(2)), _mm512_set1_epi32(0x00200000), e));
}
inline void store_rows(vf sum, float * a, float * b) {
    _mm256_storeu_ps(a, _mm512_castps512_ps256(sum));
    _mm256_storeu_ps(b, _mm512_extractf32x8_ps(sum, 1));
}
#else
inline vi whole_numbers(const uint8_t * a, const uint8_t *) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) a)); }
inline vf halves(const ggml_half * a, const ggml_half *) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) a)); }
inline vf powers_of_two(const uint8_t * a, const uint8_t * b) {
    const vi e      = whole_numbers(a, b);
    const vi normal = _mm256_slli_epi32(_mm256_sub_epi32(e, _mm256_set1_epi32(1)), 23);
    const vi small  = _mm256_sllv_epi32(_mm256_set1_epi32(0x00200000), e);
    return _mm256_castsi256_ps(_mm256_blendv_epi8(normal, small, _mm256_cmpgt_epi32(_mm256_set1_epi32(2), e)));
}
inline void store_rows(vf sum, float * a, float *) { _mm256_storeu_ps(a, sum); }
#endif

// A register's rows: the first ones of group a, and the second half of them from row SECOND of group b on.
struct rows_of_8 {
    static constexpr int GROUP     = 8;
    static constexpr int REGISTERS = STREAMS * 8 / W, SECOND = W / 2 % 8;

    static constexpr int a(int v) { return v * W / 8; }
    static constexpr int b(int v) { return (v * W + W / 2) / 8; }

    // 8 columns from the codes of blocks a and b on, piece i of what a row has there
    static piece load(const uint8_t * a, const uint8_t * b, int i) {
        return { { load_bytes(a + 64 * i), load_bytes(b + 64 * i + 8 * SECOND) } };
    }

    static void store(const vf * sum, float * const * out) {
        for (int v = 0; v < REGISTERS; ++v) {
            store_rows(sum[v], out[a(v)], out[b(v)] + SECOND);
        }
    }
};

// what 4-bit codes stand for
template <typename F>
inline vb value_of(vb codes) {
    if constexpr (std::is_same<F, format_iq4_nl>::value) {
        return look_up(values_iq4_nl.values, codes);
    } else if constexpr (std::is_same<F, format_mxfp4>::value) {
        return look_up(values_mxfp4.values, codes);
    } else {
        return codes;
    }
}

// one scale for 32 codes of 4 bits, which may stand for others
template <typename F, typename X>
struct one_token_of_32 : rows_of_8 {
    static void multiply(const char * const * rows, int64_t n_in, const tile & x, float * const * out) {
        vf sum[REGISTERS];
        for (auto & s : sum) {
            s = zero_f();
        }
        for (int64_t k = 0; k < n_in / 32; ++k) {
            const int8_t * q = x.q + 32 * k;
            const vf xd      = broadcast(x.d + k);
            const vi init    = broadcast(x.init + k);
            prefetch_after_blocks<X>(rows, k);
#pragma GCC unroll 4
            for (int v = 0; v < REGISTERS; ++v) {
                const X &block_a = ((const X *) rows[a(v)])[k], &block_b = ((const X *) rows[b(v)])[k];
                sums s;
                for (int i = 0; i < 2; ++i) {
                    const piece both = load((const uint8_t *) block_a.qs, (const uint8_t *) block_b.qs, i);
                    piece low, high;
                    for (int r = 0; r < 2; ++r) {
                        const vb codes = std::is_same<F, format_q4_0>::value ? flip(both.of[r], 0x88) : both.of[r];
                        low.of[r]      = value_of<F>(bits<0, 15, 0>(codes));
                        high.of[r]     = value_of<F>(bits<4, 15, 0>(codes));
                    }
                    accumulate<F::SIGNED>(s, low, q + 8 * i);
                    accumulate<F::SIGNED>(s, high, q + 8 * i + 16);
                }
                sum[v] = fma(to_float(add(total<F::SIGNED>(s), init)), mul(scales(block_a, block_b), xd), sum[v]);
            }
        }
        store(sum, out);
    }

    static vf scales(const X & a, const X & b) {
        if constexpr (std::is_same<F, format_mxfp4>::value) {
            return powers_of_two(a.e, b.e + SECOND);
        } else {
            return halves(a.d, b.d + SECOND);
        }
    }
};

template <typename F, typename X>
struct one_token<repacked_nibbles<F, X>> : one_token_of_32<F, X> {};

#endif // __AVX2__

//
// rows as they are in the file, one of each place
//

// four integers and four floats: of a row each
#if defined(__AVX2__)
using i4 = __m128i;
using f4 = __m128;
inline i4 four_of(const int32_t * x) { return _mm_set1_epi32(*x); }
inline f4 four_of(const float * x) { return _mm_broadcast_ss(x); }
inline f4 load_four(const float * x) { return _mm_load_ps(x); }
inline i4 add(i4 a, i4 b) { return _mm_add_epi32(a, b); }
inline f4 to_float(i4 x) { return _mm_cvtepi32_ps(x); }
inline f4 mul(f4 a, f4 b) { return _mm_mul_ps(a, b); }
inline f4 negative(f4 x) { return _mm_xor_ps(x, _mm_set1_ps(-0.0f)); }
inline f4 fma(f4 a, f4 b, f4 c) { return _mm_fmadd_ps(a, b, c); }
inline f4 zero_four() { return _mm_setzero_ps(); }
inline void store_four(f4 x, float * out) { _mm_store_ps(out, x); }

template <typename B>
inline f4 halves_of(const B * const * b) {
    return _mm_cvtph_ps(_mm_setr_epi16(b[0]->d, b[1]->d, b[2]->d, b[3]->d, 0, 0, 0, 0));
}

// sums of some of a row's products
using products = __m256i;
template <bool SIGNED>
inline products multiply_32(codes_32 w, const int8_t * x) { return dot<SIGNED>(_mm256_setzero_si256(), w, load_32(x)); }

inline i4 add_up(const products * row) {
    const __m256i a = _mm256_add_epi32(_mm256_unpacklo_epi32(row[0], row[1]), _mm256_unpackhi_epi32(row[0], row[1]));
    const __m256i b = _mm256_add_epi32(_mm256_unpacklo_epi32(row[2], row[3]), _mm256_unpackhi_epi32(row[2], row[3]));
    const __m256i y = _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
    return _mm_add_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
}
#else
using i4 = vi;
using f4 = vf;
inline i4 four_of(const int32_t * x) { return broadcast(x); }
inline f4 four_of(const float * x) { return broadcast(x); }
inline f4 load_four(const float * x) { return load(x); }
inline f4 zero_four() { return zero_f(); }
inline void store_four(f4 x, float * out) { store(out, x); }
template <typename B>
inline f4 halves_of(const B * const * b) {
    const uint16_t d[4] = { b[0]->d, b[1]->d, b[2]->d, b[3]->d };
    return vcvt_f32_f16(vld1_f16((const __fp16 *) d));
}

// sums of some of a row's products
using products = vi;
template <bool SIGNED>
inline products multiply_32(codes_32 w, const int8_t * x) {
    const codes_32 y = load_32(x);
    return dot<SIGNED>(dot<SIGNED>(zero(), w.low, y.low), w.high, y.high);
}

inline i4 add_up(const products * row) { return vpaddq_s32(vpaddq_s32(row[0], row[1]), vpaddq_s32(row[2], row[3])); }
#endif
static_assert(STREAMS == 4, "the sums above");

inline void store_each(f4 sum, float * const * out) {
    alignas(16) float sums[STREAMS];
    store_four(sum, sums);
    for (int i = 0; i < STREAMS; ++i) {
        *out[i] = sums[i];
    }
}

template <typename F>
struct one_token_by_sub_blocks {
    static constexpr int GROUP = 1;
    using block                = typename F::block;
    static_assert(F::BLOCK == 32 && F::SUB == 32, "blocks of one sub-block");

    static void multiply(const char * const * rows, int64_t n_in, const tile & x, float * const * out) {
        f4 sum = zero_four();
        for (int64_t k = 0; k < n_in / 32; ++k) {
            const block * b[STREAMS];
            alignas(64) uint8_t codes[STREAMS][32];
            alignas(64) float scales[STREAMS][32];
            prefetch_after_blocks<block>(rows, k);
            for (int i = 0; i < STREAMS; ++i) {
                b[i] = (const block *) rows[i] + k;
                F::codes(*b[i], codes[i]);
                if (!has_half<F>) {
                    F::scales(*b[i], scales[i]);
                }
            }
            products p[STREAMS];
            for (int i = 0; i < STREAMS; ++i) {
                p[i] = multiply_32<F::SIGNED>(load_32(codes[i]), x.q + 32 * k);
            }
            i4 y = add_up(p);
            if (F::OFFSET != 0) {
                y = add(y, four_of(x.init + k));
            }
            f4 d;
            if constexpr (has_half<F>) {
                d = halves_of(b);
            } else {
                d = load_each(scales, 0);
            }
            sum = fma(to_float(y), mul(d, four_of(x.d + k)), sum);
            if (F::MIN) {
                sum = fma(load_each(scales, CHUNK / 32), four_of(x.sum + k), sum);
            }
        }
        store_each(sum, out);
    }

    static f4 load_each(const float (*scales)[32], int i) {
        alignas(16) const float each[4] = { scales[0][i], scales[1][i], scales[2][i], scales[3][i] };
        return load_four(each);
    }

    template <typename G>
    static constexpr bool has_half =
        std::is_same<G, format_q4_0>::value || std::is_same<G, format_q5_0>::value || std::is_same<G, format_q8_0>::value || std::is_same<G, format_iq4_nl>::value;
};

} // namespace allocmoe

#include "allocmoe-one-token-k.h"
#include "allocmoe-one-token-neon.h"

namespace allocmoe {

template <typename F>
struct one_token<plain<F>> : std::conditional_t<whole_blocks<F>, one_token_of_whole_blocks<F>, one_token_by_sub_blocks<F>> {};

} // namespace allocmoe

#endif // ALLOCMOE_KERNEL
