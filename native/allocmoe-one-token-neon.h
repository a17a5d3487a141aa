// The end of allocmoe-one-token.h: on Arm, repacked layouts, and K-quants in whole blocks (allocmoe-neon.h).
#pragma once

#include "allocmoe-one-token.h"

#if defined(ALLOCMOE_KERNEL) && !defined(__AVX2__)

namespace allocmoe {

//
// rows as they are in the file
//

template <typename F>
struct one_token_of_whole_blocks {
    static constexpr int GROUP = 1;
    using block                = typename F::block;

    static void multiply(const char * const * rows, int64_t n_in, const tile & x, float * const * out) {
        vf sum = zero_f();
        for (int64_t k = 0; k < n_in / QK_K; ++k) {
            vi y[STREAMS], second[STREAMS];
            alignas(16) float d[STREAMS], m[STREAMS];
            // two rows at a time, which share what is read of the activations
            for (int i = 0; i < STREAMS; i += 2) {
                const block &b0 = ((const block *) rows[i])[k], &b1 = ((const block *) rows[i + 1])[k];
                prefetch_after_block((const block *) rows[i], k);
                prefetch_after_block((const block *) rows[i + 1], k);
                const block_scales s0(b0), s1(b1);
                y[i] = y[i + 1] = zero();
                for_eighths([&](auto i_) {
                    constexpr int I  = decltype(i_)::value;
                    const codes_32 q = load_32(x.q + k * QK_K + 32 * I);
                    y[i]             = add_32<F::SUB, I>(y[i], F::template codes_of<I>(b0), q, s0);
                    y[i + 1]         = add_32<F::SUB, I>(y[i + 1], F::template codes_of<I>(b1), q, s1);
                });
                finish(s0, b0, x.init + k * (QK_K / F::SUB / 2), y[i], second[i], d[i], m[i]);
                finish(s1, b1, x.init + k * (QK_K / F::SUB / 2), y[i + 1], second[i + 1], d[i + 1], m[i + 1]);
            }
            const vf xd = broadcast(x.d + k);
            sum         = fma(to_float(add_up(y)), mul(load(d), xd), sum);
            if constexpr (F::MIN) {
                sum = fma(to_float(add_up(second)), mul(load(m), xd), sum);
            }
        }
        store_each(sum, out);
    }

    static void finish(const block_scales & s, const block & b, const int32_t * sums, vi & y, vi & second, float & d, float & m) {
        second = s.template times_sums<F::SUB>(sums);
        y      = without_offset<F>(y, second);
        d      = scale_of(b);
        if constexpr (F::MIN) {
            m = -min_of_k(b);
        }
    }
};

//
// repacked layouts: of each place a group of N rows, 4 of them in a register
//

template <typename F, typename X, int N, int STEP>
struct one_token<repacked<F, X, N, STEP>> {
    static constexpr int GROUP     = N;
    static constexpr bool TIMES_16 = std::is_same<F, format_q4_0>::value; // four bits with a sign, where they are quickest to get

    static vb low_times_16(vb x) { return vshlq_n_u8(x, 4); }
    static vb high_times_16(vb x) { return vandq_u8(x, vdupq_n_u8(0xf0)); }

    static void multiply(const char * const * rows, int64_t n_in, const tile & x, float * const * out) {
        vf sum[STREAMS][N / 4];
        for (auto & group : sum) {
            for (auto & s : group) {
                s = zero_f();
            }
        }
        for (int64_t k = 0; k < n_in / 32; ++k) {
            const int8_t * q = x.q + 32 * k;
            const vf xd      = broadcast(x.d + k);
            for (int v = 0; v < STREAMS; ++v) {
                prefetch_after_block((const X *) rows[v], k);
            }
#pragma GCC unroll 4
            for (int v = 0; v < STREAMS; ++v) {
                const X & b = ((const X *) rows[v])[k];
                for (int first = 0; first < N; first += 4) {
                    sums_of_4<STEP> y;
                    if constexpr (std::is_same<F, format_q8_0>::value) {
#pragma GCC unroll 4
                        for (int i = 0; i < 4; ++i) {
                            y.add(load_piece<N, STEP>(b.qs, first, i), columns<STEP>(q + 8 * i));
                        }
                    } else {
#pragma GCC unroll 2
                        for (int i = 0; i < 2; ++i) {
                            const piece both = load_piece<N, STEP>(b.qs, first, i);
                            y.add(each(both, TIMES_16 ? low_times_16 : values_of<F, 0>), columns<STEP>(q + 8 * i));
                            y.add(each(both, TIMES_16 ? high_times_16 : values_of<F, 4>), columns<STEP>(q + 8 * i + 16));
                        }
                    }
                    const vf total    = TIMES_16 ? vcvtq_n_f32_s32(y.total(), 4) : to_float(y.total());
                    sum[v][first / 4] = fma(total, mul(scales_of_4(b, first), xd), sum[v][first / 4]);
                }
            }
        }
        for (int v = 0; v < STREAMS; ++v) {
            for (int first = 0; first < N; first += 4) {
                vst1q_f32(out[v] + first, sum[v][first / 4]);
            }
        }
    }
};

// The sums of 8 rows in a block, and what they make.
struct sums_of_8 {
    vi of[2] = { zero(), zero() };

    template <int STEP>
    void add_scaled(const sums_of_4<STEP> * y, int16x8_t scales) {
        of[0] = allocmoe::add_scaled(of[0], y[0].total(), vmovl_s16(vget_low_s16(scales)));
        of[1] = allocmoe::add_scaled(of[1], y[1].total(), vmovl_high_s16(scales));
    }
    // I: which of eight sums of activations
    template <int I>
    void add_sums(int16x8_t numbers, int16x8_t sums) {
        of[0] = vmlal_laneq_s16(of[0], vget_low_s16(numbers), sums, I);
        of[1] = vmlal_high_laneq_s16(of[1], numbers, sums, I);
    }
};

template <typename F, typename X, int STEP>
struct one_token<repacked_k4<F, X, STEP>> {
    static constexpr int GROUP = 8;
    static_assert(sizeof(X::scales) == 96 && sizeof(X::qs) >= 16, "what unpack_scales_k4() reads");

    static void multiply(const char * const * rows, int64_t n_in, const tile & x, float * const * out) {
        vf sum[STREAMS][2];
        for (auto & s : sum) {
            s[0] = s[1] = zero_f();
        }
        for (int64_t k = 0; k < n_in / QK_K; ++k) {
            const int16x8_t x_sums = vreinterpretq_s16_s32(vld1q_s32(x.init + 4 * k));
            const vf xd            = broadcast(x.d + k);
            for (int v = 0; v < STREAMS; ++v) {
                const X & b = ((const X *) rows[v])[k];
                prefetch_after(&b, offsetof(X, qs));
                sums_of_8 y, second;
                const auto add_64 = [&](auto j) {
                    constexpr int J  = decltype(j)::value;
                    const int8_t * q = x.q + k * QK_K + 64 * J;
                    prefetch_after(b.qs + 256 * J, 256);
                    sums_of_4<STEP> low[2], high[2];
#pragma GCC unroll 4
                    for (int i = 0; i < 4; ++i) {
                        const columns<STEP> x0(q + 8 * i), x1(q + 8 * i + 32);
                        for (int half = 0; half < 2; ++half) {
                            piece l, h;
                            pieces_of_64<F, STEP, J>(b, 4 * half, i, l, h);
                            low[half].add(l, x0);
                            high[half].add(h, x1);
                        }
                    }
                    const int8x16_t s0 = as_signed(unpack_scales_k4(b.scales + 24 * J)), s1 = as_signed(unpack_scales_k4(b.scales + 24 * J + 12));
                    y.add_scaled(low, vmovl_s8(vget_low_s8(s0)));
                    y.add_scaled(high, vmovl_s8(vget_low_s8(s1)));
                    second.add_sums<2 * J>(vmovl_high_s8(s0), x_sums);
                    second.add_sums<2 * J + 1>(vmovl_high_s8(s1), x_sums);
                };
                add_64(std::integral_constant<int, 0>());
                add_64(std::integral_constant<int, 1>());
                add_64(std::integral_constant<int, 2>());
                add_64(std::integral_constant<int, 3>());
                for (int half = 0; half < 2; ++half) {
                    const vf d = mul(halves(b.d + 4 * half), xd), m = mul(negative(halves(b.dmin + 4 * half)), xd);
                    sum[v][half] = fma(to_float(second.of[half]), m, fma(to_float(y.of[half]), d, sum[v][half]));
                }
            }
        }
        for (int v = 0; v < STREAMS; ++v) {
            vst1q_f32(out[v], sum[v][0]);
            vst1q_f32(out[v] + 4, sum[v][1]);
        }
    }
};

template <int STEP>
struct one_token<repacked<format_q6_K, block_q6_Kx8, 8, STEP>> {
    static constexpr int GROUP = 8;

    static void multiply(const char * const * rows, int64_t n_in, const tile & x, float * const * out) {
        vf sum[STREAMS][2];
        for (auto & s : sum) {
            s[0] = s[1] = zero_f();
        }
        for (int64_t k = 0; k < n_in / QK_K; ++k) {
            const int16x8_t x_sums[2] = { vreinterpretq_s16_s32(vld1q_s32(x.init + 8 * k)), vreinterpretq_s16_s32(vld1q_s32(x.init + 8 * k + 4)) };
            const vf xd               = broadcast(x.d + k);
            for (int v = 0; v < STREAMS; ++v) {
                const auto & b = ((const block_q6_Kx8 *) rows[v])[k];
                prefetch_after(&b, offsetof(block_q6_Kx8, ql));
                sums_of_8 y, second;
                // 16 of each 32 columns of a half
                const auto add_64 = [&](auto j) {
                    constexpr int J = decltype(j)::value, H = J / 2, S = J % 2;
                    prefetch_after(b.ql + 256 * J, 256);
                    prefetch_after(b.qh + 128 * J, 128);
                    sums_of_4<STEP> sums[4][2];
#pragma GCC unroll 2
                    for (int i = 0; i < 2; ++i) {
                        for (int half = 0; half < 2; ++half) {
                            piece q[4];
                            pieces_of_q6_K<STEP>(b, H, 4 * half, 2 * S + i, q);
#pragma GCC unroll 4
                            for (int c = 0; c < 4; ++c) {
                                sums[c][half].add(q[c], columns<STEP>(x.q + k * QK_K + 128 * H + 32 * c + 16 * S + 8 * i));
                            }
                        }
                    }
                    const auto add_sub_block = [&](auto c) {
                        constexpr int C = decltype(c)::value, SUB_BLOCK = 2 * C + S; // of 8
                        const int16x8_t scales = vmovl_s8(vld1_s8(b.scales + 8 * (8 * H + SUB_BLOCK)));
                        y.add_scaled(sums[C], scales);
                        second.add_sums<SUB_BLOCK>(scales, x_sums[H]);
                    };
                    add_sub_block(std::integral_constant<int, 0>());
                    add_sub_block(std::integral_constant<int, 1>());
                    add_sub_block(std::integral_constant<int, 2>());
                    add_sub_block(std::integral_constant<int, 3>());
                };
                add_64(std::integral_constant<int, 0>());
                add_64(std::integral_constant<int, 1>());
                add_64(std::integral_constant<int, 2>());
                add_64(std::integral_constant<int, 3>());
                for (int half = 0; half < 2; ++half) {
                    const vi whole = without_offset<format_q6_K>(y.of[half], second.of[half]);
                    sum[v][half]   = fma(to_float(whole), mul(halves(b.d + 4 * half), xd), sum[v][half]);
                }
            }
        }
        for (int v = 0; v < STREAMS; ++v) {
            vst1q_f32(out[v], sum[v][0]);
            vst1q_f32(out[v] + 4, sum[v][1]);
        }
    }
};

} // namespace allocmoe

#endif
