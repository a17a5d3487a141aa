// Arm: what panels and kernels for single tokens share. Products of bytes come as sums of four in 32 bits, so a sub-block's sum
// times its integer scale is one more instruction, and K-quants are added up in integers within a block as with AVX2
// (allocmoe-whole-blocks.h): the same exact sums in any order, which become floats once in 256 columns.
//
// With i8mm one instruction multiplies 8 columns of two rows with those of two tokens. Panels hold 8 columns of a row together for it,
// and 4 without, of 4 rows in turns: what is multiplied with one token's columns lies in the order in which it is read.
#pragma once

#include "allocmoe-vectors.h"

#include <algorithm>

#if defined(ALLOCMOE_KERNEL) && !defined(__AVX2__)

namespace allocmoe {

#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int TOGETHER = 8; // columns of a row that lie together in a panel
#else
constexpr int TOGETHER = 4;
#endif

// Where a panel has columns from c on, a multiple of 8, of 4 rows.
constexpr int in_panel(int row, int c) { return row * QK_K + c * 4; }

inline int8x16_t as_signed(vb x) { return vreinterpretq_s8_u8(x); }

// Eight 6-bit scales and then eight mins of Q4_K and Q5_K. 16 bytes are read, 12 of them used.
inline vb unpack_scales_k4(const uint8_t * packed) {
    static constexpr uint8_t low[16]  = { 0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 8, 9, 10, 11 };
    static constexpr uint8_t high[16] = { 255, 255, 255, 255, 0, 1, 2, 3, 255, 255, 255, 255, 4, 5, 6, 7 };
    static constexpr int8_t down[16]  = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, -4, -4, -4, -4 };
    static constexpr uint8_t mask[16] = { 63, 63, 63, 63, 15, 15, 15, 15, 63, 63, 63, 63, 15, 15, 15, 15 };

    const vb x = load_bytes(packed);
    const vb a = vandq_u8(vshlq_u8(vqtbl1q_u8(x, vld1q_u8(low)), vld1q_s8(down)), vld1q_u8(mask));
    return vsraq_n_u8(a, vandq_u8(vqtbl1q_u8(x, vld1q_u8(high)), vdupq_n_u8(0xc0)), 2);
}

// The integer scales of a block of one row.
struct block_scales {
    int16x8_t scale[2], second[2]; // in order; second: mins, or the same scales where codes have an offset

    explicit block_scales(const block_q6_K & b) { set(vld1q_s8(b.scales)); }
    explicit block_scales(const block_q3_K & b) {
        // four bits of each of 16 in 8 bytes, two more in 4
        static constexpr int8_t down[16] = { 0, 0, 0, 0, -2, -2, -2, -2, -4, -4, -4, -4, -6, -6, -6, -6 };
        uint32_t last;
        memcpy(&last, b.scales + 8, 4);
        const uint8x8_t packed = vld1_u8(b.scales);
        const vb low           = vcombine_u8(vand_u8(packed, vdup_n_u8(15)), vshr_n_u8(packed, 4));
        const vb high          = vandq_u8(vshlq_u8(vreinterpretq_u8_u32(vdupq_n_u32(last)), vld1q_s8(down)), vdupq_n_u8(3));
        set(vsubq_s8(as_signed(vsliq_n_u8(low, high, 4)), vdupq_n_s8(32)));
    }
    explicit block_scales(const block_q2_K & b) {
        const vb x = load_bytes(b.scales), s = bits<0, 15, 0>(x), m = bits<4, 15, 0>(x);
        set(as_signed(s));
        second[0] = vmovl_s8(vget_low_s8(as_signed(m)));
        second[1] = vmovl_high_s8(as_signed(m));
    }
    explicit block_scales(const block_iq4_xs & b) {
        // four bits of each of 8 in 4 bytes, two more in 2
        static constexpr int16_t down[8] = { 0, -2, -4, -6, -8, -10, -12, -14 };
        uint32_t first;
        memcpy(&first, b.scales_l, 4);
        const uint8x8_t packed = vcreate_u8(first);
        const uint16x8_t low   = vmovl_u8(vzip1_u8(vand_u8(packed, vdup_n_u8(15)), vshr_n_u8(packed, 4)));
        const uint16x8_t high  = vandq_u16(vshlq_u16(vdupq_n_u16(b.scales_h), vld1q_s16(down)), vdupq_n_u16(3));
        scale[0] = scale[1] = second[0] = second[1] = vsubq_s16(vreinterpretq_s16_u16(vsliq_n_u16(low, high, 4)), vdupq_n_s16(32));
    }
    explicit block_scales(const block_q4_K & b) { set_k4(b.scales); }
    explicit block_scales(const block_q5_K & b) { set_k4(b.scales); }

    // Of sub-blocks 4*i to 4*i + 3.
    vi four(int i) const { return i % 2 == 0 ? vmovl_s16(vget_low_s16(scale[i / 2])) : vmovl_high_s16(scale[i / 2]); }

    // For panels: a word for each sub-block, and one for two, whose codes have no offset.
    template <typename F>
    void store(int32_t * scales, int32_t * pairs) const {
        for (int i = 0; i < CHUNK_K / F::SUB / 4; ++i) {
            vst1q_s32(scales + 4 * i, four(i));
        }
        for (int i = 0; F::MIN && i < CHUNK_K / F::SUB / 8; ++i) {
            vst1q_s16((int16_t *) (pairs + 4 * i), second[i]);
        }
    }

    // Times the sums of activations, both in order.
    template <int SUB>
    vi times_sums(const int32_t * pairs) const {
        vi sum = zero();
        for (int i = 0; i < CHUNK_K / SUB / 8; ++i) {
            const int16x8_t x = vreinterpretq_s16_s32(vld1q_s32(pairs + 4 * i));
            sum               = vmlal_s16(sum, vget_low_s16(second[i]), vget_low_s16(x));
            sum               = vmlal_high_s16(sum, second[i], x);
        }
        return sum;
    }

private:
    static constexpr int CHUNK_K = QK_K;

    void set(int8x16_t s) {
        scale[0] = second[0] = vmovl_s8(vget_low_s8(s));
        scale[1] = second[1] = vmovl_high_s8(s);
    }
    void set_k4(const uint8_t * packed) {
        const int8x16_t both = as_signed(unpack_scales_k4(packed));
        scale[0] = scale[1] = vmovl_s8(vget_low_s8(both));
        second[0] = second[1] = vmovl_high_s8(both);
    }
};

// sum + y*scale. GCC adds up in an order of its own, and keeps more products at hand for it than there are registers.
inline vi in_this_order(vi sum) {
#if defined(__GNUC__)
    asm("" : "+w"(sum));
#endif
    return sum;
}
inline vi add_scaled(vi sum, vi y, vi scale) { return in_this_order(vmlaq_s32(sum, y, scale)); }
template <int LANE>
inline vi add_scaled(vi sum, vi y, vi scales) { return in_this_order(vmlaq_laneq_s32(sum, y, scales, LANE)); }

// 32 columns' products with the codes, each sub-block's times its scale. I: which 32 of the block
template <int SUB, int I>
inline vi add_32(vi sum, codes_32 codes, codes_32 x, const block_scales & s) {
    const vi low    = dot<false>(zero(), codes.low, x.low);
    const vi scales = s.four(I * 32 / SUB / 4);
    if (SUB == 32) {
        return add_scaled<I % 4>(sum, dot<false>(low, codes.high, x.high), scales);
    }
    sum = add_scaled<2 * I % 4>(sum, low, scales);
    return add_scaled<(2 * I + 1) % 4>(sum, dot<false>(zero(), codes.high, x.high), scales);
}

// The sum of a block, of codes without their offset; second: of the same scales times sums of activations.
template <typename F>
inline vi without_offset(vi sum, vi second) {
    static_assert(F::OFFSET == 0 || F::OFFSET == 4 || F::OFFSET == 32, "a shift");
    return F::OFFSET == 0 ? sum : vsubq_s32(sum, vshlq_n_s32(second, F::OFFSET == 4 ? 2 : 5));
}

template <int OFFSET>
inline vb less(vb x) { return OFFSET == 0 ? x : vsubq_u8(x, vdupq_n_u8(OFFSET)); }

// 16 columns of 4 rows to a panel.
inline void store_16_columns(const vb (&x)[4], uint8_t * at) {
    if (TOGETHER == 8) {
        for (int i = 0; i < 4; i += 2) {
            const uint64x2_t a = vreinterpretq_u64_u8(x[i]), b = vreinterpretq_u64_u8(x[i + 1]);
            vst1q_u8(at + 8 * i, vreinterpretq_u8_u64(vtrn1q_u64(a, b)));
            vst1q_u8(at + 8 * i + 32, vreinterpretq_u8_u64(vtrn2q_u64(a, b)));
        }
        return;
    }
    uint64x2_t pairs[2][2];
    for (int i = 0; i < 2; ++i) {
        const uint32x4_t a = vreinterpretq_u32_u8(x[2 * i]), b = vreinterpretq_u32_u8(x[2 * i + 1]);
        pairs[i][0] = vreinterpretq_u64_u32(vtrn1q_u32(a, b));
        pairs[i][1] = vreinterpretq_u64_u32(vtrn2q_u32(a, b));
    }
    for (int i = 0; i < 2; ++i) {
        vst1q_u8(at + 16 * i, vreinterpretq_u8_u64(vtrn1q_u64(pairs[0][i], pairs[1][i])));
        vst1q_u8(at + 16 * i + 32, vreinterpretq_u8_u64(vtrn2q_u64(pairs[0][i], pairs[1][i])));
    }
}

//
// panels: 4 rows' sums, of one token, or of two with i8mm
//

#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int TOKENS_AT_ONCE = 2;

struct row_sums {
    vi of[2] = { zero(), zero() }; // rows 0 and 1, 2 and 3: [token][row]
};

// Of N tokens. w: [SUB/8][rows 0 and 1, 2 and 3]; x: of two tokens [SUB/8][token][8], of a last one [SUB]
template <int SUB, int N>
inline void add_products(row_sums * sums, const vb * w, const int8_t * x) {
#pragma GCC unroll 4
    for (int k = 0; k < SUB / 8; ++k) {
#pragma GCC unroll 2
        for (int t = 0; t < N; t += 2) {
            const int8x16_t y = as_signed(t + 1 == N ? broadcast_8(x + t * SUB + 8 * k) : load_bytes(x + t * SUB + 16 * k));
            sums[t / 2].of[0] = vmmlaq_s32(sums[t / 2].of[0], y, as_signed(w[2 * k]));
            sums[t / 2].of[1] = vmmlaq_s32(sums[t / 2].of[1], y, as_signed(w[2 * k + 1]));
        }
    }
}

struct row_scales {
    vi of[2];
    explicit row_scales(const int32_t * scale) {
        const int64x2_t both = vreinterpretq_s64_s32(vld1q_s32(scale));
        of[0]                = vreinterpretq_s32_s64(vdupq_laneq_s64(both, 0));
        of[1]                = vreinterpretq_s32_s64(vdupq_laneq_s64(both, 1));
    }
};

inline void add_scaled(row_sums & sums, const row_sums & y, const row_scales & scale) {
    for (int i = 0; i < 2; ++i) {
        sums.of[i] = add_scaled(sums.of[i], y.of[i], scale.of[i]);
    }
}

inline vi of_token(const row_sums & sums, int i) {
    const int64x2_t a = vreinterpretq_s64_s32(sums.of[0]), b = vreinterpretq_s64_s32(sums.of[1]);
    return vreinterpretq_s32_s64(i == 0 ? vtrn1q_s64(a, b) : vtrn2q_s64(a, b));
}
#else
constexpr int TOKENS_AT_ONCE = 1;

struct row_sums {
    vi of = zero();
};

template <int LANE, int N>
inline void add_products(row_sums * sums, vb w, const int8x16_t * x) {
#pragma GCC unroll 4
    for (int t = 0; t < N; ++t) {
        sums[t].of = vdotq_laneq_s32(sums[t].of, as_signed(w), x[t], LANE);
    }
}

// Of N tokens. w: [SUB/4] of four columns of 4 rows, x: [N][SUB]
template <int SUB, int N>
inline void add_products(row_sums * sums, const vb * w, const int8_t * x) {
#pragma GCC unroll 2
    for (int k = 0; k < SUB / 16; ++k) {
        int8x16_t y[N];
#pragma GCC unroll 4
        for (int t = 0; t < N; ++t) {
            y[t] = vld1q_s8(x + t * SUB + 16 * k);
        }
        add_products<0, N>(sums, w[4 * k], y);
        add_products<1, N>(sums, w[4 * k + 1], y);
        add_products<2, N>(sums, w[4 * k + 2], y);
        add_products<3, N>(sums, w[4 * k + 3], y);
    }
}

struct row_scales {
    vi of;
    explicit row_scales(const int32_t * scale) : of(vld1q_s32(scale)) {}
};

inline void add_scaled(row_sums & sums, const row_sums & y, const row_scales & scale) { sums.of = add_scaled(sums.of, y.of, scale.of); }
inline vi of_token(const row_sums & sums, int) { return sums.of; }
#endif

// The registers of a panel for SUB columns of 4 rows.
template <int N>
inline void load_panel(const uint8_t * from, vb (&w)[N]) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
        w[i] = load_bytes(from + 16 * i);
    }
}

// Sums of a sub-block of N tokens, from token T on: use(which TOKENS_AT_ONCE, their sums). Four tokens take turns: a sum waits for its
// previous addition, and not every processor reorders.
template <int SUB, int N, int T = 0, typename U>
inline void multiply_tokens(const vb * w, const int8_t * x, const U & use) {
    constexpr int TURNS = std::min(4, N - T), SUMS = (TURNS + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE;
    row_sums y[SUMS];
    add_products<SUB, TURNS>(y, w, x + T * SUB);
#pragma GCC unroll 4
    for (int i = 0; i < SUMS; ++i) {
        use(T / TOKENS_AT_ONCE + i, y[i]);
    }
    if constexpr (T + 4 < N) {
        multiply_tokens<SUB, N, T + 4>(w, x, use);
    }
}

// Two tokens' activations of a sub-block, one after the other, become what add_products() reads.
template <int SUB>
inline void pair_up(int8_t * x) {
    int8_t y[2 * SUB];
    for (int k = 0; k < SUB / 8; ++k) {
        vst1q_s8(y + 16 * k, vcombine_s8(vld1_s8(x + 8 * k), vld1_s8(x + SUB + 8 * k)));
    }
    memcpy(x, y, sizeof(y));
}

//
// llama.cpp's repacked layouts: N rows together, STEP columns of each in turn
//

// four numbers of rows
inline vi whole_numbers(const uint8_t * a) {
    uint32_t four;
    memcpy(&four, a, 4);
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four)))));
}
inline vf halves(const ggml_half * a) { return vcvt_f32_f16(vld1_f16((const __fp16 *) a)); }
inline vf powers_of_two(const uint8_t * a) {
    const vi e      = whole_numbers(a);
    const vi normal = vshlq_n_s32(vsubq_s32(e, vdupq_n_s32(1)), 23);
    const vi small  = vshlq_s32(vdupq_n_s32(0x00200000), e);
    return vreinterpretq_f32_s32(vbslq_s32(vcltq_s32(e, vdupq_n_s32(2)), small, normal));
}

// 8 columns of 4 rows
struct piece {
    vb of[2]; // where STEP is 4: columns 0 to 3, 4 to 7; where it is 8: rows 0 and 1, 2 and 3
};

// piece i of rows `first` to first + 3
template <int N, int STEP>
inline piece load_piece(const void * from, int first, int i) {
    const auto * at = (const uint8_t *) from + i * 8 * N + first * STEP;
    return { { load_bytes(at), load_bytes(at + (STEP == 8 ? 16 : 4 * N)) } };
}

// bits() and insert_bits() as objects
template <int SHIFT, int MASK, int UP>
inline constexpr auto take_bits = [](vb x) { return bits<SHIFT, MASK, UP>(x); };
template <int SHIFT, int MASK, int UP>
inline constexpr auto add_bits = [](vb y, vb x) { return insert_bits<SHIFT, MASK, UP>(y, x); };

template <typename U>
inline piece each(piece x, const U & f) { return { { f(x.of[0]), f(x.of[1]) } }; }
template <typename U>
inline piece each(piece x, piece y, const U & f) { return { { f(x.of[0], y.of[0]), f(x.of[1], y.of[1]) } }; }

// 8 columns of one token's activations
template <int STEP>
struct columns {
    int8x16_t of;
    explicit columns(const int8_t * x) : of(as_signed(broadcast_8(x))) {}
};
template <>
struct columns<4> {
    int8x8_t of;
    explicit columns(const int8_t * x) : of(vld1_s8(x)) {}
};

// 4 rows' sums for one token
template <int STEP>
struct sums_of_4 {
    vi of[2] = { zero(), zero() }; // of two columns of pairs of rows
    void add(piece w, columns<STEP> x) {
        for (int i = 0; i < 2; ++i) {
            of[i] = vdotq_s32(of[i], as_signed(w.of[i]), x.of);
        }
    }
    vi total() const { return vpaddq_s32(of[0], of[1]); }
};
template <>
struct sums_of_4<4> {
    vi of = zero();
    void add(piece w, columns<4> x) { of = vdotq_lane_s32(vdotq_lane_s32(of, as_signed(w.of[0]), x.of, 0), as_signed(w.of[1]), x.of, 1); }
    vi total() const { return of; }
};

// to columns c to c + 7 of a panel
template <int STEP>
inline void store_piece(piece x, int c, int row, uint8_t * panel) {
    if (STEP != TOGETHER) {
        const uint32x4_t a = vreinterpretq_u32_u8(x.of[0]), b = vreinterpretq_u32_u8(x.of[1]);
        x = { { vreinterpretq_u8_u32(STEP == 4 ? vzip1q_u32(a, b) : vuzp1q_u32(a, b)),
            vreinterpretq_u8_u32(STEP == 4 ? vzip2q_u32(a, b) : vuzp2q_u32(a, b)) } };
    }
    vst1q_u8(panel + in_panel(row, c), x.of[0]);
    vst1q_u8(panel + in_panel(row, c) + 16, x.of[1]);
}

} // namespace allocmoe

#endif
