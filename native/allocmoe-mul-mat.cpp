// MUL_MAT_ID and MUL_MAT on the CPU for quantised weights: the tokens of an expert multiply its weights together, as a matrix.
//
// Each thread unpacks 16 rows by 256 columns of the weights at a time into a panel (allocmoe-panel.h) that stays in its
// first-level cache, and multiplies it with the 8-bit activations of all tokens of that expert. Activations are quantised
// by llama.cpp's own functions, and every product is exact in 32-bit integers as in its kernels: results differ from those
// by the order in which the floats of sub-blocks, or of blocks, are added. That order is the same for any number of tokens.

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined operands inside its own AVX-512 intrinsics for ours
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

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

constexpr int TILE = 8; // tokens at a time: as many as their sums fit into registers
// an expert's tokens from which on making panels is worth it
#if defined(ALLOCMOE_AVX512)
constexpr int PANEL_TOKENS = 2;
#else
constexpr int PANEL_TOKENS = 4;
#endif

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
                // two sums: each waits for its previous addition
                vi even = broadcast(x.init + i), odd = zero();
#pragma GCC unroll 4
                for (int k = 0; k < F::SUB; k += 8) {
                    even = dot<F::SIGNED>(even, load_bytes(w + k * ROWS), broadcast_4(x.q + i * F::SUB + k));
                    odd  = dot<F::SIGNED>(odd, load_bytes(w + (k + 4) * ROWS), broadcast_4(x.q + i * F::SUB + k + 4));
                }
                sum[t] = fma(to_float(add(even, odd)), mul(d, broadcast(x.d + i)), sum[t]);
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

#if defined(ALLOCMOE_WHOLE_BLOCKS)
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
            const __m256i scale = load_32(p.whole.scale[s] + v);
            __m256i w[GROUPS];
#pragma GCC unroll 8
            for (int i = 0; i < GROUPS; ++i) {
                w[i] = load_32(p.q + (s * F::SUB + 4 * i) * ROWS + v * 4);
            }
#pragma GCC unroll 8
            for (int t = 0; t < N; ++t) {
                sum[t] = multiply_sub_block<F::LARGEST, F::SUB>(sum[t], w, x.q + (s * N + t) * F::SUB, scale);
            }
        }
        for (int s = 0; s < CHUNK / F::SUB / 2; ++s) {
            const __m256i pairs = load_32(p.whole.pairs[s] + v);
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
#endif

template <typename F, int N>
static void multiply(const panel & p, int n_sub, const tile & x, float * acc) {
#if defined(ALLOCMOE_WHOLE_BLOCKS)
    if constexpr (whole_blocks<F>) {
        return multiply_block<F, N>(p, x, acc);
    } else
#endif
        multiply_sub_blocks<F, N>(p, n_sub, x, acc);
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
    };
    std::unique_ptr<buffers, free_aligned> fixed{ (buffers *) ggml_aligned_malloc(sizeof(buffers)) };
    std::vector<int8_t> q;
    std::vector<float> d, sum;
    std::vector<int32_t> init;
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
            const int64_t slot = job.slot(first + t0 + t), rank = slot % job.n_used, token = slot / job.n_used;
            const auto * x = (const X *) (job.x + (job.slots ? rank % job.src1->ne[1] + token * job.src1->ne[1] : token) * job.x_size);
            for (int64_t b = 0; b < n_sub; ++b) {
                const int64_t i = t0 * n_sub + b * n_tile + t;
                int8_t * q      = ws.q.data() + i * F::SUB;
                int32_t sum;
                const float d = read_activations<F::SUB>(x[b * F::SUB / X_BLOCK], b * F::SUB % X_BLOCK, q, sum);
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
    return { ws.q.data() + i * F::SUB, ws.d.data() + i_d, ws.sum.data() + i, ws.init.data() + (whole_blocks<F> ? i / 2 : i) };
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
            const int64_t slot = job.slot(first + t);
            char * out         = (char *) job.dst->data + slot % job.n_used * job.dst->nb[1] + slot / job.n_used * job.dst_stride;
            memcpy(out + row * sizeof(float), acc + t * ROWS, n_rows * sizeof(float));
        }
    }
}

// The same for fewer tokens than make a panel worth it, one after the other.
template <typename L>
static void multiply_rows_by_one(
    const job & job, const char * weights, int64_t row0, int64_t row1, int64_t first, int n, workspace & ws) {
    const int64_t n_in     = job.src0->ne[0];
    const int64_t n_sub    = n_in / L::SUB;
    const int64_t n_groups = (row1 - row0) / one_token<L>::GROUP;
    const int64_t n_each   = (n_groups + STREAMS - 1) / STREAMS;

    for (int64_t i = 0; i < n_each; ++i) {
        for (int t = 0; t < n; ++t) {
            const int64_t slot = job.slot(first + t);
            float * result     = (float *) ((char *) job.dst->data + slot % job.n_used * job.dst->nb[1] + slot / job.n_used * job.dst_stride);
            const tile x       = activations_from<L>(ws, t * n_sub);
            const char * rows[STREAMS];
            float * out[STREAMS];
            for (int s = 0; s < STREAMS; ++s) {
                // where there are fewer, the last one again
                const int64_t row = row0 + std::min(s * n_each + i, n_groups - 1) * one_token<L>::GROUP;
                rows[s]           = weights + row * job.src0->nb[1];
                out[s]            = result + row;
            }
            one_token<L>::multiply(rows, n_in, x, out);
        }
    }
}

#if defined(__AVX512F__)
template <typename F, typename X>
using repacked_8x8 = repacked_nibbles<F, X>;
#else
template <typename F, typename X>
using repacked_8x8 = repacked<F, X, 8, 8>;
#endif

// The functions for a type in a layout.
struct kernel {
    void (*gather)(const job &, int64_t, int, workspace &)                                               = nullptr;
    void (*multiply_rows)(const job &, const char *, int64_t, int64_t, int64_t, int, workspace &)        = nullptr;
    void (*multiply_rows_by_one)(const job &, const char *, int64_t, int64_t, int64_t, int, workspace &) = nullptr;
    bool for_few                                                                                         = false; // of types with blocks of 256: as fast as llama.cpp's for 2 or 3 tokens
};

template <typename L, typename X>
static kernel kernel_for() {
    return { gather<L, X>, multiply_rows<L>, multiply_rows_by_one<L>, PANEL_TOKENS == 2 || whole_blocks<L> };
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

bool allocmoe_cpu_kernels = true;

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

    // with 2 and 3 tokens for each, llama.cpp's kernels for blocks of 256 are the faster ones, where there is no better one here
    const int64_t n_busy = std::min(n_expert, n_slots);
    const bool few       = n_rows_together == 0 && ggml_blck_size(src0->type) == QK_K && n_slots > n_busy && n_slots < PANEL_TOKENS * n_busy;
    const kernel run     = find_kernel(src0->type, n_rows_together, step);
    if (!run.gather || params->use_ref || (few && !run.for_few) ||
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

    const auto quantise = ggml_get_type_traits_cpu(x_type)->from_float;
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
        if (gathered != slab) {
            run.gather(job, begin, n, ws);
            gathered = slab;
        }
        const auto multiply = n < PANEL_TOKENS ? run.multiply_rows_by_one : run.multiply_rows;
        multiply(job, allocmoe_expert(dst, e), row0, row1, begin, n, ws);
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
