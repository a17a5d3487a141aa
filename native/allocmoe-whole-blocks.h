// K-quants and IQ4_XS on x86: the 256 columns of a block are added up as integers, each sub-block times its
// integer scale, and become a float once in a block. Without this every sub-block has sums of its own to widen, to add up
// across registers and to scale, which took more instructions than the products. Scaling costs none: what adds pairs of
// 16-bit sums multiplies them, too.
//
// The sums are exact: at most 256 products of 63, 127 and a scale of 128, or of 241, 127 and 32. So they do not depend on the order, and
// a panel's are a row's.
#pragma once

#include "allocmoe-vectors.h"

#include <algorithm>

#if defined(ALLOCMOE_KERNEL) && defined(__AVX2__)

namespace allocmoe {

// sums of two 16-bit products added to sums
inline __m256i add_products(__m256i sum, __m256i a, __m256i b) {
#if defined(ALLOCMOE_AVX512)
    return _mm256_dpwssd_epi32(sum, a, b);
#elif defined(ALLOCMOE_VNNI)
    return _mm256_dpwssd_avx_epi32(sum, a, b);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#endif
}

// sums of two products of bytes, and sums of those
inline __m256i multiply_pairs(__m256i w, __m256i x) { return _mm256_maddubs_epi16(w, x); }
inline __m256i add_16(__m256i a, __m256i b) { return _mm256_add_epi16(a, b); }
template <int N>
inline __m256i shift_left(__m256i x) { return _mm256_slli_epi32(x, N); }
template <int N>
inline __m256i shift_right(__m256i x) { return _mm256_srai_epi32(x, N); }
inline __m256i subtract(__m256i a, __m256i b) { return _mm256_sub_epi32(a, b); }
inline __m256i shuffle_bytes(__m256i x, __m256i from) { return _mm256_shuffle_epi8(x, from); }
inline __m256i mul(__m256i a, __m256i b) { return _mm256_mullo_epi32(a, b); }

#if defined(ALLOCMOE_AVX512)
inline __m512i add_products(__m512i sum, __m512i a, __m512i b) { return _mm512_dpwssd_epi32(sum, a, b); }
inline __m512i multiply_pairs(__m512i w, __m512i x) { return _mm512_maddubs_epi16(w, x); }
inline __m512i add_16(__m512i a, __m512i b) { return _mm512_add_epi16(a, b); }
template <int N>
inline __m512i shift_left(__m512i x) { return _mm512_slli_epi32(x, N); }
template <int N>
inline __m512i shift_right(__m512i x) { return _mm512_srai_epi32(x, N); }
inline __m512i subtract(__m512i a, __m512i b) { return _mm512_sub_epi32(a, b); }
inline __m512i shuffle_bytes(__m512i x, __m512i from) { return _mm512_shuffle_epi8(x, from); }
inline __m512i mul(__m512i a, __m512i b) { return _mm512_mullo_epi32(a, b); }
#endif

// GCC adds up in an order of its own, and keeps more products at hand for it than there are registers.
template <typename V>
inline V in_this_order(V sum) {
#if defined(__GNUC__)
    asm("" : "+v"(sum));
#endif
    return sum;
}

// How many sums of 2 and of 4 products of codes up to LARGEST and activations fit into 16 bits together.
template <int LARGEST>
constexpr int PAIRS_THAT_FIT = 32767 / (2 * 128 * LARGEST);
#if defined(ALLOCMOE_VNNI)
// where VNNI's sums of 4 fit at least twice, they are taken, else those of 2; either in the low half of 32 bits or in both
template <int LARGEST>
constexpr bool BY_FOUR = 32767 / (4 * 128 * LARGEST) >= 2;
#else
template <int LARGEST>
constexpr bool BY_FOUR = false;
#endif

// A scale as add_products() wants it beside such sums.
template <int LARGEST>
inline __m256i scale_words(__m256i x) { return BY_FOUR<LARGEST> ? x : _mm256_or_si256(x, _mm256_slli_epi32(x, 16)); }

// What add_signed() multiplies by, from scales of 32 bits.
inline __m256i signed_scales(__m256i x) {
#if defined(ALLOCMOE_VNNI)
    return x;
#else
    return _mm256_shuffle_epi8(x, _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13)));
#endif
}

// N times four SIGNED codes and their activations, times the scale of their sub-block: sums of two fit into 16 bits, where codes are
// without their offset; with it, as VNNI needs them, none does.
template <int N>
inline vi add_signed(vi sum, const vb * w, const vb * x, vi scale) {
#if defined(ALLOCMOE_VNNI)
    vi some = zero();
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
        some = dot_unsigned(some, w[i], x[i]);
    }
    return add(sum, mul(some, scale));
#else
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
        sum = in_this_order(add_products(sum, _mm256_maddubs_epi16(_mm256_abs_epi8(w[i]), _mm256_sign_epi8(x[i], w[i])), scale));
    }
    return sum;
#endif
}

// The integer scales of a block.
struct block_scales {
    __m256i scale;  // 16 bits each; with 16 sub-blocks: of those with even numbers, then of the others; with 8: all of them, twice;
                    // of SIGNED types: signed_scales(), even numbers first as well
    __m256i second; // 16 bits each: mins, or the same scales where codes have an offset; in order

    explicit block_scales(const block_q6_K & b) {
        const __m128i s = _mm_loadu_si128((const __m128i *) b.scales);
        scale           = _mm256_cvtepi8_epi16(even_and_odd(s));
        second          = _mm256_cvtepi8_epi16(s);
    }
    explicit block_scales(const block_q3_K & b) {
        // four bits of each of 16 in 8 bytes, two more in 4
        int32_t last;
        memcpy(&last, b.scales + 8, 4);
        const __m128i low     = _mm_shuffle_epi32(_mm_loadl_epi64((const __m128i *) b.scales), 0x44);
        const __m128i high    = _mm_srlv_epi32(_mm_set1_epi32(last), _mm_setr_epi32(0, 2, 4, 6));
        const __m128i s       = _mm_or_si128(_mm_and_si128(_mm_srlv_epi32(low, _mm_setr_epi32(0, 0, 4, 4)), _mm_set1_epi8(15)),
            _mm_slli_epi16(_mm_and_si128(high, _mm_set1_epi8(3)), 4));
        const __m128i centred = _mm_sub_epi8(s, _mm_set1_epi8(32));
        scale                 = _mm256_cvtepi8_epi16(even_and_odd(centred));
        second                = _mm256_cvtepi8_epi16(centred);
    }
    explicit block_scales(const block_q2_K & b) {
        const __m128i s = _mm_loadu_si128((const __m128i *) b.scales);
        scale           = _mm256_cvtepu8_epi16(even_and_odd(_mm_and_si128(s, _mm_set1_epi8(15))));
        second          = _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16(s, 4), _mm_set1_epi8(15)));
    }
    explicit block_scales(const block_iq4_xs & b) {
        // four bits of each of 8 in 4 bytes, two more in the 2 before those, which follow d
        int32_t words[2];
        memcpy(words, &b, sizeof(words));
        const __m256i low     = _mm256_srlv_epi32(_mm256_set1_epi32(words[1]), _mm256_setr_epi32(0, 8, 16, 24, 4, 12, 20, 28));
        const __m256i high    = _mm256_srlv_epi32(_mm256_set1_epi32(words[0]), _mm256_setr_epi32(12, 16, 20, 24, 14, 18, 22, 26));
        const __m256i s       = _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi32(15)), _mm256_and_si256(high, _mm256_set1_epi32(0x30)));
        const __m256i centred = _mm256_sub_epi32(s, _mm256_set1_epi32(32));
        const __m128i even = _mm256_castsi256_si128(centred), odd = _mm256_extracti128_si256(centred, 1);
        scale  = signed_scales(centred);
        second = _mm256_zextsi128_si256(_mm_blend_epi16(even, _mm_slli_epi32(odd, 16), 0xaa));
    }
    explicit block_scales(const block_q4_K & b) : block_scales(b.scales) {}
    explicit block_scales(const block_q5_K & b) : block_scales(b.scales) {}

    // For panels: a word for each sub-block, and one for two.
    template <typename F>
    void store(int32_t * scales, int32_t * pairs) const {
        _mm256_store_si256((__m256i *) pairs, second);
        const __m128i even = _mm256_castsi256_si128(scale), odd = _mm256_extracti128_si256(scale, 1);
        if constexpr (F::SIGNED) {
            _mm_store_si128((__m128i *) scales, _mm_unpacklo_epi32(even, odd));
            _mm_store_si128((__m128i *) scales + 1, _mm_unpackhi_epi32(even, odd));
        } else {
            const auto words = [](__m128i x) { return scale_words<F::LARGEST>(_mm256_and_si256(_mm256_cvtepi16_epi32(x), _mm256_set1_epi32(0xffff))); };
            _mm256_store_si256((__m256i *) scales, words(F::SUB == 16 ? _mm_unpacklo_epi16(even, odd) : even));
            _mm256_store_si256((__m256i *) scales + 1, words(F::SUB == 16 ? _mm_unpackhi_epi16(even, odd) : even));
        }
    }

private:
    // Q4_K and Q5_K: 16 bytes are read
    explicit block_scales(const uint8_t * packed) {
        const __m128i x     = _mm_loadu_si128((const __m128i *) packed);
        const __m128i a     = _mm_srlv_epi32(_mm_shuffle_epi32(x, 0x98), _mm_setr_epi32(0, 0, 0, 4));
        const __m128i b     = _mm_srli_epi32(_mm_shuffle_epi32(x, 0x40), 2);
        const __m128i both  = _mm_or_si128(_mm_and_si128(a, _mm_setr_epi32(0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f)),
            _mm_and_si128(b, _mm_setr_epi32(0, 0x30303030, 0, 0x30303030)));
        const __m256i words = _mm256_cvtepu8_epi16(both);
        scale               = _mm256_permute4x64_epi64(words, 0x44);
        second              = _mm256_zextsi128_si256(_mm256_extracti128_si256(words, 1));
    }

    static __m128i even_and_odd(__m128i x) {
        return _mm_shuffle_epi8(x, _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    }
};

// The 6-bit scales and mins of eight sub-blocks of Q4_K, 8 rows of both: out[sub-block][scale or min][row]. The 4 bytes after
// the packed ones are read, too.
inline void unpack_scales_k4(const uint8_t * packed, uint8_t (*out)[2][8]) {
    for (int i = 0; i < 8; i += 2) {
        const __m256i x = _mm256_loadu2_m128i((const __m128i *) (packed + 12 * i + 12), (const __m128i *) (packed + 12 * i));
        const __m256i a = _mm256_srlv_epi32(_mm256_shuffle_epi32(x, 0x98), _mm256_setr_epi32(0, 0, 0, 4, 0, 0, 0, 4));
        const __m256i b = _mm256_srli_epi32(_mm256_shuffle_epi32(x, 0x40), 2);
        _mm256_store_si256((__m256i *) out[i], _mm256_or_si256(
                                                   _mm256_and_si256(a, _mm256_setr_epi32(0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f)),
                                                   _mm256_and_si256(b, _mm256_setr_epi32(0, 0x30303030, 0, 0x30303030, 0, 0x30303030, 0, 0x30303030))));
    }
}
// the mins of two of those sub-blocks, in 16 bits, row by row
inline __m256i two_mins(const uint8_t (*a)[8], const uint8_t (*b)[8]) {
    return _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(_mm_loadl_epi64((const __m128i *) a[1]), _mm_loadl_epi64((const __m128i *) b[1])));
}

// Of 8 rows, 8 bytes of each in turn: the first four bytes of each, or the others.
inline __m256i four_columns(__m256i rows0, __m256i rows4, bool others) {
    const __m256 a = _mm256_castsi256_ps(rows0), b = _mm256_castsi256_ps(rows4);
    return _mm256_permute4x64_epi64(_mm256_castps_si256(others ? _mm256_shuffle_ps(a, b, 0xdd) : _mm256_shuffle_ps(a, b, 0x88)), 0xd8);
}

// 32 columns' products with the codes, each half times its sub-block's scale. I: which 32 of the block
template <int I>
inline __m256i add_32(__m256i sum, __m256i codes, const int8_t * x, __m256i scale) {
    const __m256i word = _mm256_set1_epi16((short) (0x0100 * (2 * I + 1) + 2 * I));
    return in_this_order(add_products(sum, _mm256_maddubs_epi16(codes, load_32(x)), _mm256_shuffle_epi8(scale, word)));
}

// A sub-block of W rows of a panel, for one token: w: [SUB/4] registers of four columns each.
template <int LARGEST, int SUB>
inline vi multiply_sub_block(vi sum, const vb * w, const int8_t * x, vi scale) {
    constexpr int FITS = std::min(SUB / 4, BY_FOUR<LARGEST> ? PAIRS_THAT_FIT<LARGEST> / 2 : PAIRS_THAT_FIT<LARGEST>);
    vi some            = zero();
#pragma GCC unroll 8
    for (int i = 0; i < SUB / 4; ++i) {
        const bool first = i % FITS == 0, last = i % FITS == FITS - 1 || i == SUB / 4 - 1;
        const vb four = broadcast_4(x + 4 * i);
#if defined(ALLOCMOE_VNNI)
        const vi more = BY_FOUR<LARGEST> ? dot_unsigned(first ? zero() : some, w[i], four) : multiply_pairs(w[i], four);
#else
        const vi more = multiply_pairs(w[i], four);
#endif
        some = first || BY_FOUR<LARGEST> ? more : add_16(some, more);
        if (last) {
            sum = add_products(sum, some, scale);
        }
    }
    return sum;
}

// The same for any type whose blocks are whole.
template <typename F>
inline vi multiply_sub_block(vi sum, const vb * w, const int8_t * x, vi scale) {
    if constexpr (F::SIGNED) {
        vb each[F::SUB / 4];
        for (int i = 0; i < F::SUB / 4; ++i) {
            each[i] = broadcast_4(x + 4 * i);
        }
        return add_signed<F::SUB / 4>(sum, w, each, scale);
    } else {
        return multiply_sub_block<F::LARGEST, F::SUB>(sum, w, x, scale);
    }
}

// The sum of a block, of codes without their offset; second: of the same scales times sums of activations.
template <typename F, typename V>
inline V without_offset(V sum, V second) {
    constexpr int SHIFT = F::OFFSET == 128 ? 7 : F::OFFSET == 32 ? 5
                                                                 : 2;
    static_assert(F::OFFSET == 0 || F::OFFSET == 1 << SHIFT, "a shift");
    return F::OFFSET == 0 ? sum : subtract(sum, shift_left<SHIFT>(second));
}

} // namespace allocmoe

#endif
