// MUL_MAT_ID and MUL_MAT on the CPU for quantised weights: the tokens of an expert multiply its weights together, as a matrix.
//
// Each thread unpacks 16 rows by 256 columns of the weights at a time into a panel (allocmoe-panel.h) that stays in its
// first-level cache, and multiplies it with the 8-bit activations of all tokens of that expert. Activations are quantised
// as by llama.cpp's own functions, and every product is exact in 32-bit integers as in its kernels: results differ from those
// by the order in which the floats of sub-blocks, or of blocks, are added, and with Q4_1 and Q5_1 by the sums of activations,
// which llama.cpp rounds to half precision. That order is the same for any number of tokens.

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined operands inside its own AVX-512 intrinsics for ours
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "allocmoe-amx.h"
#include "allocmoe-cpu.h"
#include "allocmoe-one-token.h"
#include "allocmoe-panel.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <memory>
#include <vector>

namespace allocmoe {

#if defined(ALLOCMOE_KERNEL)

constexpr int TILE         = 8;  // tokens at a time: as many as their sums fit into registers
constexpr int PANEL_TOKENS = 4;  // an expert's tokens from which on making panels is worth it
constexpr int AMX_TOKENS   = 12; // and on using AMX

#if defined(__AVX2__)
// A sub-block's sums of W rows for one token, added to `sum`. w: of the panel, for these rows
template <typename F>
static vi add_sub_block(vi sum, const uint8_t * w, const int8_t * x) {
    constexpr int N = F::SUB / 4;
    vb codes[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
        codes[i] = load_bytes(w + 4 * i * ROWS);
    }
#if !defined(ALLOCMOE_VNNI)
    if constexpr (!F::SIGNED) {
        return multiply_sub_block<F::LARGEST, F::SUB>(sum, codes, x, _mm256_set1_epi16(1)); // several in 16 bits
    }
#endif
    // two sums: each waits for its previous addition
    vi other = zero();
#pragma GCC unroll 4
    for (int i = 0; i < N; i += 2) {
        sum   = dot<F::SIGNED>(sum, codes[i], broadcast_4(x + 4 * i));
        other = dot<F::SIGNED>(other, codes[i + 1], broadcast_4(x + 4 * i + 4));
    }
    return add(sum, other);
}

// acc: [N][ROWS], added to.
template <typename F, int N>
static void multiply_sub_blocks(const panel & p, int n_sub, const tile & x, float * acc) {
    for (int v = 0; v < ROWS; v += W) {
        vf sum[N];
        for (int t = 0; t < N; ++t) {
            sum[t] = load(acc + t * ROWS + v);
        }
        for (int s = 0; s < n_sub; ++s) {
            const uint8_t * w = p.q + (s * F::SUB) * ROWS + v * 4;
            const vf d        = load(p.scales + s * ROWS + v);
            const vf m        = load(p.scales + (F::MIN ? CHUNK / F::SUB + s : s) * ROWS + v);
#pragma GCC unroll 8
            for (int t = 0; t < N; ++t) {
                const int i = s * N + t;
                const vi y  = add_sub_block<F>(broadcast(x.init + i), w, x.q + i * F::SUB);
                sum[t]      = fma(to_float(y), mul(d, broadcast(x.d + i)), sum[t]);
                if (F::MIN) {
                    sum[t] = fma(m, broadcast(x.sum + i), sum[t]);
                }
            }
        }
        for (int t = 0; t < N; ++t) {
            store(acc + t * ROWS + v, sum[t]);
        }
    }
}

// The same for one block, whose sub-blocks are added up as integers.
template <typename F, int N>
static void multiply_block(const panel & p, const tile & x, float * acc) {
    constexpr int GROUPS = F::SUB / 4;
    for (int v = 0; v < ROWS; v += W) {
        vi sum[N], second[N];
        for (int t = 0; t < N; ++t) {
            sum[t] = second[t] = zero();
        }
        for (int s = 0; s < CHUNK / F::SUB; ++s) {
            const vi scale = load_bytes(p.whole.scale[s] + v);
            vb w[GROUPS];
#pragma GCC unroll 8
            for (int i = 0; i < GROUPS; ++i) {
                w[i] = load_bytes(p.q + (s * F::SUB + 4 * i) * ROWS + v * 4);
            }
#pragma GCC unroll 8
            for (int t = 0; t < N; ++t) {
                sum[t] = multiply_sub_block<F>(sum[t], w, x.q + (s * N + t) * F::SUB, scale);
            }
        }
        for (int s = 0; s < CHUNK / F::SUB / 2; ++s) {
            const vi pairs = load_bytes(p.whole.pairs[s] + v);
            for (int t = 0; t < N; ++t) {
                second[t] = add_products(second[t], pairs, broadcast(x.init + s * N + t));
            }
        }
        for (int t = 0; t < N; ++t) {
            const vf xd = broadcast(x.d + t);
            vf y        = fma(to_float(without_offset<F>(sum[t], second[t])), mul(load(p.whole.d + v), xd), load(acc + t * ROWS + v));
            if (F::MIN) {
                y = fma(to_float(second[t]), mul(load(p.whole.m + v), xd), y);
            }
            store(acc + t * ROWS + v, y);
        }
    }
}

#else
// The same on Arm, 4 rows at a time.
template <typename F, int N>
static void multiply_sub_blocks(const panel & p, int n_sub, const tile & x, float * acc) {
    for (int v = 0; v < ROWS; v += W) {
        vf sum[N];
        for (int t = 0; t < N; ++t) {
            sum[t] = load(acc + t * ROWS + v);
        }
        for (int s = 0; s < n_sub; ++s) {
            const vf d = load(p.scales + s * ROWS + v);
            const vf m = load(p.scales + (F::MIN ? CHUNK / F::SUB + s : s) * ROWS + v);
            vb w[F::SUB / 4];
            load_panel(p.q + in_panel(v, s * F::SUB), w);
            vf xd[(N + 3) / 4];
            for (int t = 0; t + 4 <= N; t += 4) {
                xd[t / 4] = load(x.d + s * N + t);
            }
            multiply_tokens<F::SUB, N>(w, x.q + s * N * F::SUB, [&](int group, const row_sums & y) {
                for (int t = group * TOKENS_AT_ONCE; t < std::min(N, (group + 1) * TOKENS_AT_ONCE); ++t) {
                    const int i  = s * N + t;
                    const vf dxd = t < N / 4 * 4 ? vmulq_n_f32(d, xd[t / 4][t % 4]) : mul(d, broadcast(x.d + i));
                    sum[t]       = fma(to_float(of_token(y, t % TOKENS_AT_ONCE)), dxd, sum[t]);
                    if (F::MIN) {
                        sum[t] = fma(m, broadcast(x.sum + i), sum[t]);
                    }
                }
            });
        }
        for (int t = 0; t < N; ++t) {
            store(acc + t * ROWS + v, sum[t]);
        }
    }
}

template <typename F, int N>
static void multiply_block(const panel & p, const tile & x, float * acc) {
    for (int v = 0; v < ROWS; v += W) {
        row_sums sum[(N + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE];
        for (int s = 0; s < CHUNK / F::SUB; ++s) {
            const row_scales scale(p.whole.scale[s] + v);
            vb w[F::SUB / 4];
            load_panel(p.q + in_panel(v, s * F::SUB), w);
            multiply_tokens<F::SUB, N>(w, x.q + s * N * F::SUB, [&](int group, const row_sums & y) { add_scaled(sum[group], y, scale); });
        }
        vi second[N];
        for (int t = 0; F::MIN && t < N; ++t) {
            second[t] = zero();
        }
        for (int s = 0; F::MIN && s < CHUNK / F::SUB / 2; ++s) {
            const vi pairs       = vld1q_s32(p.whole.pairs[s] + v);
            const int16x4_t even = vmovn_s32(pairs), odd = vshrn_n_s32(pairs, 16);
#pragma GCC unroll 8
            for (int t = 0; t < N; ++t) {
                const int16x4_t sums = vreinterpret_s16_s32(vld1_dup_s32(x.init + s * N + t));
                second[t]            = vmlal_lane_s16(vmlal_lane_s16(second[t], even, sums, 0), odd, sums, 1);
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < N; ++t) {
            const vf xd = broadcast(x.d + t);
            const vi y  = of_token(sum[t / TOKENS_AT_ONCE], t % TOKENS_AT_ONCE);
            vf total    = fma(to_float(y), mul(load(p.whole.d + v), xd), load(acc + t * ROWS + v));
            if (F::MIN) {
                total = fma(to_float(second[t]), mul(load(p.whole.m + v), xd), total);
            }
            store(acc + t * ROWS + v, total);
        }
    }
}
#endif

template <typename F, int N>
static void multiply(const panel & p, int n_sub, const tile & x, float * acc) {
    if constexpr (whole_blocks<F>) {
        multiply_block<F, N>(p, x, acc);
    } else {
        multiply_sub_blocks<F, N>(p, n_sub, x, acc);
    }
}

template <typename F>
static void multiply(int n, const panel & p, int n_sub, const tile & x, float * acc) {
    switch (n) {
        case 1: return multiply<F, 1>(p, n_sub, x, acc);
        case 2: return multiply<F, 2>(p, n_sub, x, acc);
        case 3: return multiply<F, 3>(p, n_sub, x, acc);
        case 4: return multiply<F, 4>(p, n_sub, x, acc);
        case 5: return multiply<F, 5>(p, n_sub, x, acc);
        case 6: return multiply<F, 6>(p, n_sub, x, acc);
        case 7: return multiply<F, 7>(p, n_sub, x, acc);
        case 8: return multiply<F, 8>(p, n_sub, x, acc);
        default: break; // a tile has no more
    }
}
static_assert(TILE == 8, "the cases above");

// d, and the sum of N codes from the first on, which are copied to q
template <int N>
static float read_activations(const block_q8_K & b, int first, int8_t * q, int32_t & sum) {
    memcpy(q, b.qs + first, N);
    sum = b.bsums[first / 16] + (N == 32 ? b.bsums[first / 16 + 1] : 0);
    return b.d;
}

template <int N, typename B>
static float read_activations(const B & b, int first, int8_t * q, int32_t & sum) {
    memcpy(q, b.qs + first, N);
    sum = 0;
    for (int i = 0; i < N; ++i) {
        sum += b.qs[first + i];
    }
    return scale_of(b);
}

#if defined(__AVX2__)
// What quantize_row_q8_K() does, which goes number by number and takes as long as a fifth of a prompt's products.
static void quantise_q8_K(const float * x, void * to, int64_t n) {
    auto * b = (block_q8_K *) to;
    for (const float * end = x + n; x < end; x += QK_K, ++b) {
        const __m256 sign = _mm256_set1_ps(-0.0f);
        __m256 most       = _mm256_setzero_ps(); // what is not a number does not count
        for (int i = 0; i < QK_K; i += 8) {
            most = _mm256_max_ps(_mm256_andnot_ps(sign, _mm256_loadu_ps(x + i)), most);
        }
        most = _mm256_max_ps(most, _mm256_permute2f128_ps(most, most, 1));
        most = _mm256_max_ps(most, _mm256_permute_ps(most, 0x4e));
        most = _mm256_max_ps(most, _mm256_permute_ps(most, 0xb1));
        if (_mm256_cvtss_f32(most) == 0) {
            memset(b, 0, sizeof(*b));
            continue;
        }
        // the first of that size becomes -127
        int first = 0, found = 0;
        for (; !found; first += 8) {
            found = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_andnot_ps(sign, _mm256_loadu_ps(x + first)), most, _CMP_EQ_OQ));
        }
        const float inverse = -127.0f / x[first - 8 + __builtin_ctz(found)];
        const auto eight    = [&](int i) {
            const __m256 y = _mm256_mul_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(inverse));
            return _mm256_cvtps_epi32(_mm256_and_ps(y, _mm256_cmp_ps(_mm256_andnot_ps(sign, y), _mm256_set1_ps(128), _CMP_LT_OQ)));
        };
        for (int i = 0; i < QK_K; i += 128) {
            __m256i sums[4];
            for (int j = 0; j < 4; ++j) {
                const int k       = i + 32 * j;
                const __m256i q16 = _mm256_packs_epi32(eight(k), eight(k + 8)), q16b = _mm256_packs_epi32(eight(k + 16), eight(k + 24));
                const __m256i q = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(q16, q16b), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
                store_32(q, b->qs + k);
                sums[j] = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), q), _mm256_set1_epi16(1));
            }
            const __m256i all  = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3]));
            const __m128i even = _mm256_castsi256_si128(all), odd = _mm256_extracti128_si256(all, 1);
            _mm_storeu_si128((__m128i *) (b->bsums + i / 16), _mm_packs_epi32(_mm_unpacklo_epi32(even, odd), _mm_unpackhi_epi32(even, odd)));
        }
        b->d = 1 / inverse;
    }
}
#endif

// Tokens that go through an expert's weights at once: their activations stay in the second-level cache.
constexpr int SLAB = 128;

// A thread's own memory, kept from one call to the next.
struct workspace {
    struct free_aligned {
        void operator()(void * p) const { ggml_aligned_free(p, 0); }
    };
    struct buffers {
        panel p;
        alignas(64) float acc[SLAB * ROWS];
#if defined(ALLOCMOE_AMX)
        amx_panel amx;
#endif
    };
    std::unique_ptr<buffers, free_aligned> fixed{ (buffers *) ggml_aligned_malloc(sizeof(buffers)) };
    std::vector<int8_t> q;
    std::vector<float> d, sum;
    std::vector<int32_t> init;
    std::vector<float *> out;
};

struct job {
    const ggml_tensor * src0;
    const ggml_tensor * src1;
    const ggml_tensor * dst;
    int64_t n_used;
    size_t dst_stride;     // from token to token
    const int32_t * slots; // token*n_used + rank, expert by expert; null for dense matrices: all of them
    const char * x;        // src1, quantised
    size_t x_size;         // of a row of it

    int64_t slot(int64_t i) const { return slots ? slots[i] : i; }
    const char * input(int64_t slot) const {
        return x + (slots ? slot % n_used % src1->ne[1] + slot / n_used * src1->ne[1] : slot) * x_size;
    }
    float * output(int64_t slot) const {
        return (float *) ((char *) dst->data + slot % n_used * dst->nb[1] + slot / n_used * dst_stride);
    }
};

// Tokens of a tile of n in all: each by itself where they are multiplied so.
static int tile_size(int n) { return n < PANEL_TOKENS ? 1 : TILE; }

// Copies the activations of n slots to the workspace, tile after tile.
template <typename F, typename X>
static void gather(const job & job, int64_t first, int n, workspace & ws) {
    const int64_t n_in  = job.src0->ne[0];
    const int64_t n_sub = n_in / F::SUB;
    ws.q.resize(n * n_in);
    ws.d.resize(n * n_sub);
    ws.sum.resize(n * n_sub);
    ws.init.resize(n * n_sub);
    constexpr int X_BLOCK = sizeof(X::qs), N_SUB = F::BLOCK / F::SUB;
    for (int t0 = 0; t0 < n; t0 += tile_size(n)) {
        const int n_tile = std::min(tile_size(n), n - t0);
        for (int t = 0; t < n_tile; ++t) {
            const auto * x = (const X *) job.input(job.slot(first + t0 + t));
            for (int64_t b = 0; b < n_sub; ++b) {
                const int64_t i = t0 * n_sub + b * n_tile + t;
                int8_t * q      = ws.q.data() + i * F::SUB;
                int32_t sum;
                const float d = read_activations<F::SUB>(x[b * F::SUB / X_BLOCK], b * F::SUB % X_BLOCK, q, sum);
#if !defined(__AVX2__)
                if (TOKENS_AT_ONCE == 2 && t % 2 == 1) {
                    pair_up<F::SUB>(q - F::SUB);
                }
#endif
                if (whole_blocks<F>) {
                    ws.d[t0 * n_sub / N_SUB + b / N_SUB * n_tile + t] = d;
                    const auto sum_16                                 = (int16_t) sum; // of up to 32 numbers up to 127
                    memcpy((int16_t *) (ws.init.data() + t0 * n_sub / 2 + b / 2 * n_tile + t) + b % 2, &sum_16, sizeof(sum_16));
                } else {
                    ws.d[i]    = d;
                    ws.sum[i]  = d * sum;
                    ws.init[i] = -F::OFFSET * sum;
                }
            }
        }
    }
}

// Those from sub-block i on, counted for all tokens together.
template <typename F>
static tile activations_from(const workspace & ws, int64_t i) {
    const int64_t i_d = whole_blocks<F> ? i / (F::BLOCK / F::SUB) : i;
    const float * sum = whole_blocks<F> ? nullptr : ws.sum.data() + i;
    return { ws.q.data() + i * F::SUB, ws.d.data() + i_d, sum, ws.init.data() + (whole_blocks<F> ? i / 2 : i) };
}

// Rows row0 to row1 of an expert's product with the gathered activations of n slots.
template <typename L>
static void multiply_rows(
    const job & job, const char * weights, int64_t row0, int64_t row1, int64_t first, int n, workspace & ws) {
    const int64_t n_in    = job.src0->ne[0];
    const int64_t n_sub   = n_in / L::SUB;
    const size_t row_size = job.src0->nb[1];
    panel & p             = ws.fixed->p;
    float * acc           = ws.fixed->acc;

    for (int64_t row = row0; row < row1; row += ROWS) {
        const int n_rows       = std::min<int64_t>(ROWS, row1 - row);
        const char * rows      = weights + row * row_size;
        const char * next      = rows + n_rows * row_size;
        const size_t next_size = std::min<int64_t>(ROWS, row1 - row - n_rows) * row_size;
        memset(acc, 0, n * ROWS * sizeof(float));
        for (int64_t k0 = 0; k0 < n_in; k0 += CHUNK) {
            const int n_k    = std::min<int64_t>(CHUNK, n_in - k0);
            const int64_t s0 = k0 / L::SUB;
            // while these rows are multiplied, the next ones arrive
            const size_t from = next_size * k0 / n_in;
            prefetch<2>(next + from, next_size * (k0 + n_k) / n_in - from);
            L::unpack(rows, row_size, n_rows, k0, n_k, p);
            for (int t0 = 0; t0 < n; t0 += TILE) {
                const int n_tile = std::min(TILE, n - t0);
                const int64_t i  = t0 * n_sub + s0 * n_tile;
                const tile x     = activations_from<L>(ws, i);
                multiply<L>(n_tile, p, n_k / L::SUB, x, acc + t0 * ROWS);
            }
        }
        for (int t = 0; t < n; ++t) {
            memcpy(job.output(job.slot(first + t)) + row, acc + t * ROWS, n_rows * sizeof(float));
        }
    }
}

#if defined(ALLOCMOE_AMX)
// Copies the activations of n slots for AMX: 64 columns of a tile's tokens are a tile.
template <typename F>
static void gather_amx(const job & job, int64_t first, int n, workspace & ws) {
    const int64_t n_in = job.src0->ne[0], n_blocks = n_in / QK_K;
    const int size        = amx_tile_size(n);
    const int64_t n_lines = (n + size - 1) / size * size;
    constexpr int N_SUMS  = QK_K / F::SUB / 2;
    ws.q.resize(n_lines * n_in);
    ws.d.resize(n_lines * n_blocks);
    ws.init.resize(n_lines * n_blocks * N_SUMS);
    ws.out.resize(n);
    for (int i = 0; i < n; ++i) {
        const int t = i % size, t0 = i - t;
        const auto * x = (const block_q8_K *) job.input(job.slot(first + i));
        ws.out[i]      = job.output(job.slot(first + i));
        for (int64_t b = 0; b < n_blocks; ++b) {
            const int64_t line = t0 * n_blocks + b * size; // of blocks
            for (int k = 0; k < QK_K; k += TILE_COLUMNS) {
                memcpy(ws.q.data() + line * QK_K + k * size + t * TILE_COLUMNS, x[b].qs + k, TILE_COLUMNS);
            }
            ws.d[line + t] = x[b].d;
            if (F::MIN) {
                __m256i sums = load_32(x[b].bsums);
                if (F::SUB == 32) {
                    sums = _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
                    sums = _mm256_permute4x64_epi64(_mm256_packs_epi32(sums, sums), 0xd8);
                }
                alignas(32) int32_t pairs[QK_K / 32];
                store_32(sums, pairs);
                for (int s = 0; s < N_SUMS; ++s) {
                    ws.init[line * N_SUMS + s * size + t] = pairs[s];
                }
            }
        }
    }
}

// multiply_rows() with AMX.
template <typename L>
ALLOCMOE_USES_AMX static void multiply_rows_amx(
    const job & job, const char * weights, int64_t row0, int64_t row1, int64_t, int n, workspace & ws) {
    const int64_t n_in    = job.src0->ne[0];
    const int64_t n_sub   = n_in / L::SUB;
    const size_t row_size = job.src0->nb[1];
    panel & p             = ws.fixed->p;
    amx_panel & amx       = ws.fixed->amx;
    const int size = amx_tile_size(n), n_tiles = (n + size - 1) / size, n_steps = (n_tiles + 1) / 2 * STEPS;
    int64_t n_started = 0, n_finished = 0, n_blocks = 0, n_pairs = 0;
    const amx_shapes shapes(size);

    for (int64_t row = row0; row < row1; row += ROWS) {
        const int n_rows       = std::min<int64_t>(ROWS, row1 - row);
        const char * rows      = weights + row * row_size;
        const char * next      = rows + n_rows * row_size;
        const size_t next_size = std::min<int64_t>(ROWS, row1 - row - n_rows) * row_size;
        for (int64_t k0 = 0; k0 < n_in; k0 += CHUNK) {
            block_scaling & by = amx.by[n_blocks++ % 3];
            L::unpack(rows, row_size, n_rows, k0, CHUNK, p);
            multiply_scales<L>(p, amx, by);
            // while these rows are multiplied, the next ones arrive
            size_t asked     = next_size * k0 / n_in;
            const size_t end = next_size * (k0 + CHUNK) / n_in, each = (end - asked + n_steps - 1) / n_steps;
            for (int i = 0; i < n_tiles; i += 2) {
                tile_sums * sums     = amx.sums[n_pairs++ % 2];
                const auto x_of      = [&](int tile) { return activations_from<L>(ws, tile * size * n_sub + k0 / L::SUB * size); };
                const tile x[2]      = { x_of(i), x_of(std::min(i + 1, n_tiles - 1)) };
                const auto meanwhile = [&](int step) {
                    const size_t n_bytes = std::min(each, end - asked);
                    prefetch<2>(next + asked, n_bytes);
                    asked += n_bytes;
                    if (n_started - n_finished == LAG) {
                        finish<L>(amx.queue[n_finished++ % MAX_UNFINISHED]);
                    }
                    // half a tile
                    const int second = step / 2, first = (i + second) * size, n_tokens = std::max(0, std::min(size, n - first));
                    const int t0 = step % 2 ? n_tokens / 2 : 0, t1 = step % 2 ? n_tokens : n_tokens / 2;
                    float ** out = k0 + CHUNK == n_in && n_tokens ? ws.out.data() + first : nullptr;
                    for (int t = t0; out && t < t1; ++t) {
                        __builtin_prefetch(out[t] + row, 1);
                    }
                    amx.queue[n_started++ % MAX_UNFINISHED] = { &by, x[second], size, t0, t1, sums + 2 * second, k0 == 0,
                        ws.fixed->acc + first * ROWS, out, row, (__mmask16) ((1 << n_rows) - 1) };
                };
                if (i + 1 < n_tiles) {
                    multiply_block_amx<L, 2>(amx, x[0].q, x[1].q, size, sums, meanwhile);
                } else {
                    multiply_block_amx<L, 1>(amx, x[0].q, nullptr, size, sums, meanwhile);
                }
            }
        }
    }
    while (n_finished < n_started) {
        finish<L>(amx.queue[n_finished++ % MAX_UNFINISHED]);
    }
}
#endif

// The same for fewer tokens than make a panel worth it, one after the other.
template <typename L>
static void multiply_rows_by_one(
    const job & job, const char * weights, int64_t row0, int64_t row1, int64_t first, int n, workspace & ws) {
    const int64_t n_in     = job.src0->ne[0];
    const int64_t n_sub    = n_in / L::SUB;
    const int64_t n_groups = (row1 - row0) / one_token<L>::GROUP;
    const int64_t n_each   = (n_groups + STREAMS - 1) / STREAMS;
    const bool neighbours  = place_after_place<L> && !allocmoe_cpu_streams;

    for (int64_t i = 0; i < n_each; ++i) {
        for (int t = 0; t < n; ++t) {
            float * result = job.output(job.slot(first + t));
            const tile x   = activations_from<L>(ws, t * n_sub);
            const char * rows[STREAMS];
            float * out[STREAMS];
            for (int s = 0; s < STREAMS; ++s) {
                // where there are fewer, the last one again
                const int64_t row = row0 + std::min(neighbours ? i * STREAMS + s : s * n_each + i, n_groups - 1) * one_token<L>::GROUP;
                rows[s]           = weights + row * job.src0->nb[1];
                out[s]            = result + row;
            }
            one_token<L>::multiply(rows, n_in, x, out);
        }
    }
}

#if defined(__AVX2__)
template <typename F, typename X>
using repacked_8x8 = repacked_nibbles<F, X>;
#else
template <typename F, typename X>
using repacked_8x8 = repacked<F, X, 8, 8>;
#endif

// The functions for a type in a layout.
struct method {
    void (*gather)(const job &, int64_t, int, workspace &)                                        = nullptr;
    void (*multiply_rows)(const job &, const char *, int64_t, int64_t, int64_t, int, workspace &) = nullptr;
};
struct kernel {
    method one_by_one, panels, amx;
};

template <typename L, typename X>
static kernel kernel_for() {
    kernel k;
    k.one_by_one = { gather<L, X>, multiply_rows_by_one<L> };
    k.panels     = { gather<L, X>, multiply_rows<L> };
#if defined(ALLOCMOE_AMX)
    if constexpr (whole_blocks<L> && !L::SIGNED) { // IQ4_XS: its scales lie otherwise, and its codes take all 8 bits
        k.amx = { gather_amx<L>, multiply_rows_amx<L> };
    }
#endif
    return k;
}

static kernel find_kernel(ggml_type type, int n_rows, int step) {
    switch (n_rows * 16 + step) {
        case 0:
            switch (type) {
                case GGML_TYPE_Q4_0: return kernel_for<plain<format_q4_0>, block_q8_0>();
                case GGML_TYPE_Q4_1: return kernel_for<plain<format_q4_1>, block_q8_1>();
                case GGML_TYPE_Q5_0: return kernel_for<plain<format_q5_0>, block_q8_0>();
                case GGML_TYPE_Q5_1: return kernel_for<plain<format_q5_1>, block_q8_1>();
                case GGML_TYPE_Q8_0: return kernel_for<plain<format_q8_0>, block_q8_0>();
                case GGML_TYPE_IQ4_NL: return kernel_for<plain<format_iq4_nl>, block_q8_0>();
                case GGML_TYPE_MXFP4: return kernel_for<plain<format_mxfp4>, block_q8_0>();
                case GGML_TYPE_Q2_K: return kernel_for<plain<format_q2_K>, block_q8_K>();
                case GGML_TYPE_Q3_K: return kernel_for<plain<format_q3_K>, block_q8_K>();
                case GGML_TYPE_Q4_K: return kernel_for<plain<format_q4_K>, block_q8_K>();
                case GGML_TYPE_Q5_K: return kernel_for<plain<format_q5_K>, block_q8_K>();
                case GGML_TYPE_Q6_K: return kernel_for<plain<format_q6_K>, block_q8_K>();
                case GGML_TYPE_IQ4_XS: return kernel_for<plain<format_iq4_xs>, block_q8_K>();
                default: return {};
            }
        case 8 * 16 + 8:
            switch (type) {
                case GGML_TYPE_Q4_0: return kernel_for<repacked_8x8<format_q4_0, block_q4_0x8>, block_q8_0>();
                case GGML_TYPE_Q4_K: return kernel_for<repacked_k4<format_q4_K, block_q4_Kx8, 8>, block_q8_K>();
#if defined(__AVX2__)
                case GGML_TYPE_IQ4_NL: return kernel_for<repacked_8x8<format_iq4_nl, block_iq4_nlx8>, block_q8_0>();
                case GGML_TYPE_MXFP4: return kernel_for<repacked_8x8<format_mxfp4, block_mxfp4x8>, block_q8_0>();
#if defined(__AVX512F__) // llama.cpp repacks it for no other
                case GGML_TYPE_Q2_K: return kernel_for<repacked<format_q2_K, block_q2_Kx8, 8, 8>, block_q8_K>();
#endif
#else
                case GGML_TYPE_Q5_K: return kernel_for<repacked_k4<format_q5_K, block_q5_Kx8, 8>, block_q8_K>();
                case GGML_TYPE_Q6_K: return kernel_for<repacked<format_q6_K, block_q6_Kx8, 8, 8>, block_q8_K>();
#endif
                default: return {};
            }
#if !defined(__AVX2__)
        case 8 * 16 + 4:
            switch (type) {
                case GGML_TYPE_Q4_K: return kernel_for<repacked_k4<format_q4_K, block_q4_Kx8, 4>, block_q8_K>();
                case GGML_TYPE_Q5_K: return kernel_for<repacked_k4<format_q5_K, block_q5_Kx8, 4>, block_q8_K>();
                case GGML_TYPE_Q6_K: return kernel_for<repacked<format_q6_K, block_q6_Kx8, 8, 4>, block_q8_K>();
                default: return {};
            }
        case 4 * 16 + 8:
            switch (type) {
                case GGML_TYPE_Q4_0: return kernel_for<repacked<format_q4_0, block_q4_0x4, 4, 8>, block_q8_0>();
                case GGML_TYPE_Q8_0: return kernel_for<repacked<format_q8_0, block_q8_0x4, 4, 8>, block_q8_0>();
                default: return {};
            }
        case 4 * 16 + 4:
            switch (type) {
                case GGML_TYPE_Q4_0: return kernel_for<repacked<format_q4_0, block_q4_0x4, 4, 4>, block_q8_0>();
                case GGML_TYPE_Q8_0: return kernel_for<repacked<format_q8_0, block_q8_0x4, 4, 4>, block_q8_0>();
                case GGML_TYPE_IQ4_NL: return kernel_for<repacked<format_iq4_nl, block_iq4_nlx4, 4, 4>, block_q8_0>();
                case GGML_TYPE_MXFP4: return kernel_for<repacked<format_mxfp4, block_mxfp4x4, 4, 4>, block_q8_0>();
                default: return {};
            }
#endif
        default: return {};
    }
}

#endif // ALLOCMOE_KERNEL

} // namespace allocmoe

#if defined(__x86_64__) && defined(__GNUC__)
static bool is_amd() noexcept {
    __builtin_cpu_init();
    return __builtin_cpu_is("amd");
}
#else
static bool is_amd() noexcept { return false; }
#endif

bool allocmoe_cpu_kernels = true;
bool allocmoe_cpu_amx     = true;
bool allocmoe_cpu_streams = !is_amd();

void allocmoe_use_cpu_kernels(bool use) {
    allocmoe_cpu_kernels = use;
}

bool allocmoe_mul_mat(const ggml_compute_params * params, ggml_tensor * dst, int n_rows_together, int step) {
#if defined(ALLOCMOE_KERNEL)
    using namespace allocmoe;

    if (!allocmoe_cpu_kernels) {
        return false;
    }
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    const ggml_tensor * ids  = dst->op == GGML_OP_MUL_MAT_ID ? dst->src[2] : nullptr;
    const int64_t n_expert   = src0->ne[2]; // without ids: matrices side by side, each with its own tokens
    const int64_t n_out      = src0->ne[1];
    const int64_t n_slots    = ids ? ids->ne[0] * ids->ne[1] : src1->ne[1] * src1->ne[2];
    const int ith            = params->ith;
    const int nth            = params->nth;

    const kernel run = find_kernel(src0->type, n_rows_together, step);
    if (!run.panels.gather || params->use_ref ||
        src1->type != GGML_TYPE_F32 || src1->nb[0] != sizeof(float) || src1->ne[3] != 1 || src0->ne[3] != 1 ||
        src0->nb[1] != ggml_row_size(src0->type, src0->ne[0]) || (!ids && src0->ne[2] != src1->ne[2])) {
        return false;
    }

    // llama.cpp sizes wdata for its own path: src1 quantised, and for experts at least 8 bytes for each and each of its tokens
    const ggml_type x_type = ggml_get_type_traits_cpu(src0->type)->vec_dot_type;
    const size_t x_size    = ggml_row_size(x_type, src1->ne[0]);
    const int64_t n_rows   = src1->ne[1] * src1->ne[2];
    char * x               = (char *) params->wdata;
    auto * slots           = (int32_t *) (x + GGML_PAD(n_rows * x_size, sizeof(int64_t))); // [n_slots], expert by expert
    auto * first           = slots + n_slots;                                              // [n_expert + 1]: of each expert's slots
    auto * slabs           = first + n_expert + 1;                                         // [1 + n_expert + n_slots/SLAB]: how many,
    auto * owner           = slabs + 1 + n_expert + n_slots / SLAB;                        //   and where they begin; whose they are
    char * end             = ids ? (char *) (owner + n_expert + n_slots / SLAB) : x + n_rows * x_size;
    if (params->wsize < (size_t) (end - x)) {
        return false;
    }

    const int64_t n_used = ids ? ids->ne[0] : 1;
    const auto id_of     = [&](int64_t slot) {
        return *(const int32_t *) ((const char *) ids->data + slot / n_used * ids->nb[1] + slot % n_used * ids->nb[0]);
    };

    auto quantise = ggml_get_type_traits_cpu(x_type)->from_float;
#if defined(__AVX2__)
    if (x_type == GGML_TYPE_Q8_K) {
        quantise = quantise_q8_K;
    }
#endif
    for (int64_t r = ith; r < n_rows; r += nth) {
        if (ids && n_rows == n_slots && id_of(r) < 0) {
            continue;
        }
        const char * row = (const char *) src1->data + r % src1->ne[1] * src1->nb[1] + r / src1->ne[1] * src1->nb[2];
        quantise((const float *) row, x + r * x_size, src1->ne[0]);
    }
    if (ids) {
        allocmoe_zero_skipped_rows(ids, dst, ith, nth);
    }
    if (ids && ith == 0) {
        std::fill(first, first + n_expert + 1, 0);
        for (int64_t i = 0; i < n_slots; ++i) {
            const int32_t id = id_of(i);
            GGML_ASSERT(id < n_expert);
            if (id >= 0) {
                first[id + 1]++;
            }
        }
        for (int64_t e = 0; e < n_expert; ++e) {
            first[e + 1] += first[e];
        }
        int32_t * next = owner;
        std::copy(first, first + n_expert, next);
        for (int64_t i = 0; i < n_slots; ++i) {
            const int32_t id = id_of(i);
            if (id >= 0) {
                slots[next[id]++] = i;
            }
        }
        slabs[0] = 0;
        // experts that have to be waited for come last
        const auto * experts = allocmoe_experts_of(dst);
        std::vector<int64_t> late;
        const auto add = [&](int64_t e) {
            for (int32_t i = first[e]; i < first[e + 1]; i += SLAB) {
                owner[slabs[0]++] = e;
                slabs[slabs[0]]   = i;
            }
        };
        for (int64_t e = 0; e < n_expert; ++e) {
            if (experts && first[e] < first[e + 1] && !experts->ready(experts, e)) {
                late.push_back(e);
            } else {
                add(e);
            }
        }
        std::for_each(late.begin(), late.end(), add);
    }
    if (ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, nth);
    }
    ggml_barrier(params->threadpool);

    // Threads take parts of slabs in turns: few enough that gathering the activations is not repeated much, and enough that
    // nobody waits long for the last one.
    const int64_t n_dense   = (src1->ne[1] + SLAB - 1) / SLAB; // slabs of a matrix
    const int64_t n_slabs   = ids ? slabs[0] : n_expert * n_dense;
    const int64_t n_parts   = std::max<int64_t>(1, std::min(std::max<int64_t>(2, 4 * nth / std::max<int64_t>(n_slabs, 1)), n_out / 64));
    const int64_t part_rows = GGML_PAD((n_out + n_parts - 1) / n_parts, ROWS);

    thread_local workspace ws;
    const job job    = { src0, src1, dst, n_used, dst->nb[ids ? 2 : 1], ids ? slots : nullptr, x, x_size };
    int64_t gathered = -1;
    for (int64_t part = ith; part < n_slabs * n_parts; part = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t slab  = part / n_parts;
        const int64_t e     = ids ? owner[slab] : slab / n_dense;
        const int64_t begin = ids ? slabs[1 + slab] : e * src1->ne[1] + slab % n_dense * SLAB;
        const int n         = std::min<int64_t>(SLAB, (ids ? first[e + 1] : (e + 1) * src1->ne[1]) - begin);
        const int64_t row0  = part % n_parts * part_rows;
        const int64_t row1  = std::min(row0 + part_rows, n_out);
        if (row0 >= row1) {
            continue;
        }
        const bool amx        = n >= AMX_TOKENS && run.amx.gather && allocmoe_cpu_amx && has_amx();
        const method & chosen = amx ? run.amx : n < PANEL_TOKENS ? run.one_by_one
                                                                 : run.panels;
        if (gathered != slab) {
            chosen.gather(job, begin, n, ws);
            gathered = slab;
        }
        chosen.multiply_rows(job, allocmoe_expert(dst, e), row0, row1, begin, n, ws);
    }
    return true;
#else
    GGML_UNUSED(params);
    GGML_UNUSED(dst);
    GGML_UNUSED(n_rows_together);
    GGML_UNUSED(step);
    return false;
#endif
}
