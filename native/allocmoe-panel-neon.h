// The end of allocmoe-panel.h: llama.cpp's repacked layouts on Arm. The blocks of N rows lie together, STEP columns of each in turn.
// A panel has its codes in nearly the same order, so they go into it as registers.
#pragma once

#include "allocmoe-panel.h"

#if defined(ALLOCMOE_KERNEL) && !defined(__AVX2__)

namespace allocmoe {

template <typename X>
inline vf scales_of_4(const X & x, int row) { return halves(x.d + row); }
inline vf scales_of_4(const block_mxfp4x4 & x, int row) { return powers_of_two(x.e + row); }

// What 16 codes of four bits stand for. llama.cpp has given those of Q4_0 a sign.
template <typename F, int SHIFT>
inline vb values_of(vb x) {
    if (std::is_same<F, format_q4_0>::value) {
        const int8x16_t y = as_signed(x);
        return vreinterpretq_u8_s8(vshrq_n_s8(SHIFT == 0 ? vshlq_n_s8(y, 4) : y, 4));
    }
    return look_up((const uint8_t *) (std::is_same<F, format_mxfp4>::value ? kvalues_mxfp4 : kvalues_iq4nl), bits<SHIFT, 15, 0>(x));
}

// types with blocks of 32
template <typename F, typename X, int N, int STEP>
struct repacked : F {
    static void unpack(const char * rows, size_t row_size, int n_rows, int64_t k0, int n, panel & p) {
        for (int r = 0; r < n_rows; r += 4) {
            const auto * x  = (const X *) (rows + r / N * N * row_size) + k0 / 32;
            const int first = r % N;
            for (int i = 0; i < n / 32; ++i) {
                vst1q_f32(p.scales + i * ROWS + r, scales_of_4(x[i], first));
                if constexpr (std::is_same<F, format_q8_0>::value) {
                    for (int k = 0; k < 4; ++k) {
                        store_piece<STEP>(load_piece<N, STEP>(x[i].qs, first, k), 32 * i + 8 * k, r, p.q);
                    }
                } else {
                    for (int k = 0; k < 2; ++k) {
                        const piece both = load_piece<N, STEP>(x[i].qs, first, k);
                        store_piece<STEP>(each(both, values_of<F, 0>), 32 * i + 8 * k, r, p.q);
                        store_piece<STEP>(each(both, values_of<F, 4>), 32 * i + 8 * k + 16, r, p.q);
                    }
                }
            }
        }
    }
};

// Piece i, 8 columns, of the codes of columns from 64*J on and of those from 64*J + 32 on.
template <typename F, int STEP, int J, typename X>
inline void pieces_of_64(const X & x, int first, int i, piece & low, piece & high) {
    const piece both = load_piece<8, STEP>(x.qs + 256 * J, first, i);
    low              = each(both, take_bits<0, 15, 0>);
    high             = each(both, take_bits<4, 15, 0>);
    if constexpr (std::is_same<F, format_q5_K>::value) {
        const piece fifth = load_piece<8, STEP>(x.qh, first, i);
        low               = each(low, fifth, add_bits<2 * J, 1, 4>);
        high              = each(high, fifth, add_bits<2 * J + 1, 1, 4>);
    }
}

// Q4_K and Q5_K
template <typename F, typename X, int STEP>
struct repacked_k4 : F {
    static void unpack(const char * rows, size_t row_size, int n_rows, int64_t k0, int, panel & p) {
        for (int r = 0; r < n_rows; r += 8) {
            const X & x = ((const X *) (rows + r * row_size))[k0 / QK_K];
            for (int i = 0; i < 4; ++i) {
                int16x8_t mins[2];
                for (int h = 0; h < 2; ++h) {
                    const int8x16_t both   = as_signed(unpack_scales_k4(x.scales + 12 * (2 * i + h)));
                    const int16x8_t scales = vmovl_s8(vget_low_s8(both));
                    vst1q_s32(p.whole.scale[2 * i + h] + r, vmovl_s16(vget_low_s16(scales)));
                    vst1q_s32(p.whole.scale[2 * i + h] + r + 4, vmovl_high_s16(scales));
                    mins[h] = vmovl_high_s8(both);
                }
                vst1q_s16((int16_t *) (p.whole.pairs[i] + r), vzip1q_s16(mins[0], mins[1]));
                vst1q_s16((int16_t *) (p.whole.pairs[i] + r + 4), vzip2q_s16(mins[0], mins[1]));
            }
            for (int first = 0; first < 8; first += 4) {
                vst1q_f32(p.whole.d + r + first, halves(x.d + first));
                vst1q_f32(p.whole.m + r + first, negative(halves(x.dmin + first)));
                const auto store_64 = [&](auto j) {
                    constexpr int J = decltype(j)::value;
                    for (int i = 0; i < 4; ++i) {
                        piece low, high;
                        pieces_of_64<F, STEP, J>(x, first, i, low, high);
                        store_piece<STEP>(low, 64 * J + 8 * i, r + first, p.q);
                        store_piece<STEP>(high, 64 * J + 8 * i + 32, r + first, p.q);
                    }
                };
                store_64(std::integral_constant<int, 0>());
                store_64(std::integral_constant<int, 1>());
                store_64(std::integral_constant<int, 2>());
                store_64(std::integral_constant<int, 3>());
            }
        }
    }
};

// Of a half of Q6_K's block, columns 8*i to 8*i + 7 of each of four times 32 columns.
template <int STEP>
inline void pieces_of_q6_K(const block_q6_Kx8 & x, int half, int first, int i, piece (&q)[4]) {
    const piece a = load_piece<8, STEP>(x.ql + 512 * half, first, i), b = load_piece<8, STEP>(x.ql + 512 * half, first, i + 4);
    const piece high = load_piece<8, STEP>(x.qh + 256 * half, first, i);
    q[0]             = each(each(a, take_bits<0, 15, 0>), high, add_bits<0, 3, 4>);
    q[1]             = each(each(b, take_bits<0, 15, 0>), high, add_bits<2, 3, 4>);
    q[2]             = each(each(a, take_bits<4, 15, 0>), high, add_bits<4, 3, 4>);
    q[3]             = each(each(b, take_bits<4, 15, 0>), high, add_bits<6, 3, 4>);
}

template <int STEP>
struct repacked<format_q6_K, block_q6_Kx8, 8, STEP> : format_q6_K {
    static void unpack(const char * rows, size_t row_size, int n_rows, int64_t k0, int, panel & p) {
        for (int r = 0; r < n_rows; r += 8) {
            const auto & x = ((const block_q6_Kx8 *) (rows + r * row_size))[k0 / QK_K];
            for (int i = 0; i < QK_K / SUB; ++i) {
                const int16x8_t scales = vmovl_s8(vld1_s8(x.scales + 8 * i));
                vst1q_s32(p.whole.scale[i] + r, vmovl_s16(vget_low_s16(scales)));
                vst1q_s32(p.whole.scale[i] + r + 4, vmovl_high_s16(scales));
            }
            for (int first = 0; first < 8; first += 4) {
                vst1q_f32(p.whole.d + r + first, halves(x.d + first));
                for (int i = 0; i < 8; ++i) {
                    piece q[4];
                    pieces_of_q6_K<STEP>(x, i / 4, first, i % 4, q);
                    for (int c = 0; c < 4; ++c) {
                        const auto centred = [](vb y) { return vsubq_u8(y, vdupq_n_u8(OFFSET)); };
                        store_piece<STEP>(each(q[c], centred), 128 * (i / 4) + 32 * c + 8 * (i % 4), r + first, p.q);
                    }
                }
            }
        }
    }
};

} // namespace allocmoe

#endif
