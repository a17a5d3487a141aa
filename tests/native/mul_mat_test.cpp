// MUL_MAT and MUL_MAT_ID of the CPU backend against the same product in double precision, for every type and layout that
// native/allocmoe-mul-mat.cpp has a kernel for. Prints a line for each, and ends with 1 if one of them failed.
//
// Inputs are whole numbers times a power of two, with a 127 in every block: rounding them to 8 bits loses nothing, so that
// what is left to differ is the order in which floats are added.

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

// Of |row of weights|*|input|. Up to 32 sub-blocks, each rounded to 24 bits a few times.
constexpr double MAX_ERROR = 1e-6;
// Where llama.cpp's own kernels run: for Q4_1 and Q5_1 they round the sums of the inputs to half precision.
constexpr double MAX_ERROR_UPSTREAM = 1e-3;

constexpr int N_EXPERT   = 5; // at most
constexpr int N_TOKENS[] = { 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 15, 16, 17, 33, 127, 128, 129, 257 };

struct shape {
    int n_in, n_out, max_tokens;
};
// whole and broken panels and chunks; the last one is shared by several threads
constexpr shape SHAPES_32[] = { { 32, 40, 257 }, { 96, 8, 257 }, { 256, 24, 257 }, { 288, 16, 257 }, { 32, 520, 17 } };
constexpr shape SHAPES_K[]  = { { 256, 40, 257 }, { 512, 8, 257 }, { 256, 24, 257 }, { 1280, 16, 33 }, { 256, 520, 17 } };

constexpr ggml_type TYPES[] = {
    GGML_TYPE_Q4_0,
    GGML_TYPE_Q4_1,
    GGML_TYPE_Q5_0,
    GGML_TYPE_Q5_1,
    GGML_TYPE_Q8_0,
    GGML_TYPE_IQ4_NL,
    GGML_TYPE_MXFP4,
    GGML_TYPE_Q2_K,
    GGML_TYPE_Q3_K,
    GGML_TYPE_Q4_K,
    GGML_TYPE_Q5_K,
    GGML_TYPE_Q6_K,
    GGML_TYPE_IQ4_XS,
};

// whether those of our kernels that can use AMX do, and whether a single token's read several places at once
extern "C" bool allocmoe_cpu_amx, allocmoe_cpu_streams;
extern "C" void allocmoe_use_cpu_kernels(bool use);

static ggml_backend_t backend;
static ggml_backend_buffer_type_t repack_buffer_type;
static std::mt19937 rng;

static int random_below(int n) { return rng() % n; }

// Blocks of any bits, of ones alone, of zeros alone, of the least numbers of 8 bits; their scales are finite numbers of either sign.
static void fill_with_extremes(ggml_type type, std::vector<char> & weights, int n_rows) {
    static const std::map<ggml_type, std::vector<int>> HALVES = { // where the blocks have them
        { GGML_TYPE_Q4_0, { 0 } }, { GGML_TYPE_Q4_1, { 0, 2 } }, { GGML_TYPE_Q5_0, { 0 } }, { GGML_TYPE_Q5_1, { 0, 2 } },
        { GGML_TYPE_Q8_0, { 0 } }, { GGML_TYPE_IQ4_NL, { 0 } }, { GGML_TYPE_MXFP4, {} }, { GGML_TYPE_Q2_K, { 80, 82 } },
        { GGML_TYPE_Q3_K, { 108 } }, { GGML_TYPE_Q4_K, { 0, 2 } }, { GGML_TYPE_Q5_K, { 0, 2 } }, { GGML_TYPE_Q6_K, { 208 } },
        { GGML_TYPE_IQ4_XS, { 0 } }
    };
    constexpr unsigned char BYTES[] = { 0xff, 0x00, 0x80 };
    const size_t row_size = weights.size() / n_rows, block_size = ggml_type_size(type);
    for (int r = 0; r < n_rows; ++r) {
        for (size_t i = 0; i < row_size; ++i) {
            weights[r * row_size + i] = char(r % 4 ? BYTES[r % 4 - 1] : random_below(256));
        }
        for (size_t block = r * row_size; block < (r + 1) * row_size; block += block_size) {
            for (int half : HALVES.at(type)) {
                const ggml_fp16_t scale = ggml_fp32_to_fp16((random_below(2) ? 1 : -1) * std::ldexp(1.0f, random_below(4) - 8));
                memcpy(&weights[block + half], &scale, sizeof(scale));
            }
            if (type == GGML_TYPE_MXFP4) { // a power of two, and 127 is one
                weights[block] = char(119 + random_below(4));
            }
        }
    }
}

// What is the same for all ops of one type and shape. extreme: the largest products that the type can have, all of one sign
struct data {
    ggml_type type;
    shape size;
    std::vector<char> weights;    // [N_EXPERT][n_out][n_in], quantised
    std::vector<float> x;         // [max_tokens][2][n_in]: where an op has one input for a token, it is the first
    std::vector<double> expected; // [N_EXPERT][max_tokens][2][n_out]
    std::vector<double> scale;    // the same: |row|*|input|
    std::vector<float> seen;      // the same: what the first op gave, NaN before

    data(ggml_type type, shape size, bool extreme = false) : type(type), size(size) {
        const int n_in = size.n_in, n_rows = N_EXPERT * size.n_out, n_x = 2 * size.max_tokens;
        std::vector<float> w(n_rows * n_in);
        for (auto & v : w) {
            v = (random_below(65536) + random_below(65536) - 65536) / 20000.0f;
        }
        weights.resize(ggml_row_size(type, n_in) * n_rows);
        if (extreme) {
            fill_with_extremes(type, weights, n_rows);
        } else {
            ggml_quantize_chunk(type, w.data(), weights.data(), 0, n_rows, n_in, nullptr);
        }
        ggml_get_type_traits(type)->to_float(weights.data(), w.data(), w.size());

        x.resize(n_x * n_in);
        float factor = 1;
        for (size_t i = 0; i < x.size(); ++i) {
            if (i % n_in % 256 == 0) {
                factor = std::ldexp(1.0f, random_below(5) - 2);
            }
            x[i] = factor * (i % 32 == 7 ? (random_below(2) ? 127 : -127) : random_below(255) - 127);
            if (n_in > 256 && i / n_in % 4 == 2 && i % n_in < 256) {
                x[i] = 0; // a block of nothing else
            }
            if (extreme) {
                x[i] = factor * (i / n_in % 2 ? 127 : -127);
            }
        }

        expected.resize(size_t(n_rows) * n_x);
        scale.resize(expected.size());
        seen.assign(expected.size(), NAN);
        std::vector<double> xd(x.begin(), x.end()), wd(w.begin(), w.end());
        const auto dot = [n_in](const double * a, const double * b) {
            double sums[8] = {};
            for (int i = 0; i < n_in; ++i) {
                sums[i % 8] += a[i] * b[i];
            }
            return sums[0] + sums[1] + sums[2] + sums[3] + sums[4] + sums[5] + sums[6] + sums[7];
        };
        std::vector<double> wn(n_rows), xn(n_x);
        for (int r = 0; r < n_rows; ++r) {
            wn[r] = std::sqrt(dot(&wd[r * n_in], &wd[r * n_in]));
        }
        for (int t = 0; t < n_x; ++t) {
            xn[t] = std::sqrt(dot(&xd[t * n_in], &xd[t * n_in]));
        }
        for (int r = 0; r < n_rows; ++r) {
            for (int t = 0; t < n_x; ++t) {
                const size_t i = at(r / size.n_out, t) + r % size.n_out;
                expected[i]    = dot(&wd[r * n_in], &xd[t * n_in]);
                scale[i]       = wn[r] * xn[t];
            }
        }
    }

    size_t at(int expert, int input) const { return (size_t(expert) * 2 * size.max_tokens + input) * size.n_out; }
};

// One graph of one op. n_expert 0: MUL_MAT with the first expert's weights; -n: n of them side by side, as latent attention
// has one for each head, all with n_tokens. n_inputs: of a token, 1 or n_used.
struct op {
    ggml_context * ctx;
    ggml_tensor *w, *x, *ids = nullptr, *out;
    ggml_cgraph * graph;
    ggml_backend_buffer_t weights_buffer = nullptr, buffer = nullptr;

    op(const data & d, bool repack, int n_expert, int n_used, int n_inputs, int n_tokens) {
        ctx = ggml_init({ 1 << 20, nullptr, true });
        if (n_expert == 0) {
            w   = ggml_new_tensor_2d(ctx, d.type, d.size.n_in, d.size.n_out);
            x   = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, d.size.n_in, n_tokens);
            out = ggml_mul_mat(ctx, w, x);
        } else if (n_expert < 0) {
            w   = ggml_new_tensor_3d(ctx, d.type, d.size.n_in, d.size.n_out, -n_expert);
            x   = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, d.size.n_in, n_tokens, -n_expert);
            out = ggml_mul_mat(ctx, w, x);
        } else {
            w   = ggml_new_tensor_3d(ctx, d.type, d.size.n_in, d.size.n_out, n_expert);
            x   = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, d.size.n_in, n_inputs, n_tokens);
            ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_used, n_tokens);
            out = ggml_mul_mat_id(ctx, w, x, ids);
        }
        graph = ggml_new_graph(ctx);
        ggml_build_forward_expand(graph, out);
        if (repack) {
            const size_t size = ggml_backend_buft_get_alloc_size(repack_buffer_type, w);
            weights_buffer    = ggml_backend_buft_alloc_buffer(repack_buffer_type, size);
            ggml_backend_tensor_alloc(weights_buffer, w, ggml_backend_buffer_get_base(weights_buffer));
        }
        buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
    }
    op(const op &) = delete;
    ~op() {
        ggml_backend_buffer_free(weights_buffer);
        ggml_backend_buffer_free(buffer);
        ggml_free(ctx);
    }

    std::vector<float> run(int n_threads) {
        memset(out->data, 0xff, ggml_nbytes(out)); // NaN
        ggml_backend_cpu_set_n_threads(backend, n_threads);
        if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) {
            printf("ggml_backend_graph_compute failed\n");
            exit(1);
        }
        return { (const float *) out->data, (const float *) out->data + ggml_nelements(out) };
    }
};

static bool is_repacked(ggml_type type) {
    ggml_context * ctx           = ggml_init({ 1 << 20, nullptr, true });
    ggml_tensor * w              = ggml_new_tensor_2d(ctx, type, 256, 16);
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(repack_buffer_type, ggml_nbytes(w));
    ggml_backend_tensor_alloc(buffer, w, ggml_backend_buffer_get_base(buffer));
    const bool result = w->extra != nullptr;
    ggml_backend_buffer_free(buffer);
    ggml_free(ctx);
    return result;
}

// Expert 0 for the first n_first tokens, others and -1 elsewhere; of three and more experts, the last gets no token.
static std::vector<int32_t> random_ids(int n_expert, int n_used, int n_tokens, int n_first) {
    std::vector<int32_t> ids(n_tokens * n_used, -1);
    for (int t = 0; t < n_tokens; ++t) {
        const int first = random_below(n_used);
        if (t < n_first) {
            ids[t * n_used + first] = 0;
        }
        if (n_used > 1 && random_below(4)) {
            ids[t * n_used + 1 - first] = 1 + random_below(std::max(1, n_expert - 2));
        }
    }
    return ids;
}

struct result {
    int n_ops        = 0;
    double max_error = 0;
    std::string failure;
};

// Runs one op with 1 to 3 threads, without AMX, and for single tokens the way that other CPUs read weights. ours: it has a kernel,
// whose results equal, bit for bit, those of any other op in any layout for the same weights and input.
static void check(
    data & d, bool repack, bool ours, int n_expert, int n_used, int n_inputs, int n_tokens, int n_first, result & result) {
    op op(d, repack, n_expert, n_used, n_inputs, n_tokens);
    const int n_in = d.size.n_in, n_out = d.size.n_out;
    ggml_backend_tensor_set(op.w, d.weights.data(), 0, ggml_nbytes(op.w));
    const int n_side = std::max(1, -n_expert);
    for (int t = 0; t < n_tokens * n_side; ++t) {
        const int64_t at = t * n_inputs * n_in * sizeof(float);
        ggml_backend_tensor_set(op.x, &d.x[2 * (t % n_tokens) * n_in], at, n_inputs * n_in * sizeof(float));
    }
    std::vector<int32_t> ids(n_tokens * n_used * n_side, 0);
    for (size_t i = 0; i < ids.size(); ++i) {
        ids[i] = i / (n_tokens * n_used);
    }
    if (n_expert > 0) {
        ids = random_ids(n_expert, n_used, n_tokens, n_first);
        ggml_backend_tensor_set(op.ids, ids.data(), 0, ggml_nbytes(op.ids));
    }
    const bool can_use_amx    = ggml_cpu_has_avx512_vnni() && ggml_blck_size(d.type) == 256 && n_tokens >= 12;
    const bool other_way      = can_use_amx || n_tokens <= 3;
    static const bool streams = allocmoe_cpu_streams;
    for (int run = 0; run <= 3; ++run) {
        const int n_threads  = std::max(1, run);
        allocmoe_cpu_amx     = run > 0;
        allocmoe_cpu_streams = streams == (run > 0);
        // more threads only where they share work differently: on few cores, waiting for each other takes long
        if ((run == 0 && !other_way) || (n_threads == 2 && n_expert != N_EXPERT) || (n_threads == 3 && n_out < 64)) {
            continue;
        }
        const std::vector<float> out = op.run(n_threads);
        result.n_ops++;
        for (size_t slot = 0; slot < ids.size(); ++slot) {
            const int token = slot / n_used % n_tokens, input = 2 * token + slot % n_used % n_inputs;
            for (int r = 0; r < n_out; ++r) {
                const float y      = out[slot * n_out + r];
                const char * wrong = nullptr;
                if (ids[slot] < 0) {
                    wrong = y == 0 ? nullptr : "a skipped slot is not zero";
                } else {
                    const size_t i     = d.at(ids[slot], input) + r;
                    const double error = std::abs(y - d.expected[i]) / std::max(d.scale[i], DBL_MIN);
                    if (ours && std::isnan(d.seen[i])) {
                        d.seen[i] = y;
                    }
                    if (!(error <= (ours ? MAX_ERROR : MAX_ERROR_UPSTREAM))) {
                        wrong = "wrong result";
                    } else if (ours && memcmp(&y, &d.seen[i], sizeof(y)) != 0) {
                        wrong = "the result depends on the op, its batch or the threads";
                    }
                    if (ours) {
                        result.max_error = std::max(result.max_error, error);
                    }
                }
                if (wrong && result.failure.empty()) {
                    char text[256];
                    snprintf(text, sizeof(text), "%s: weights %dx%dx%d, %d tokens (%d for expert 0), %d of %d inputs, %d threads; "
                                                 "token %d, expert %d, row %d: %g",
                        wrong, n_in, n_out, n_expert, n_tokens, n_first, n_inputs, n_used,
                        n_threads, token, ids[slot], r, y);
                    result.failure = text;
                }
            }
        }
    }
}

static void check_all(data & d, bool repack, bool ours, result & result) {
    for (int n : N_TOKENS) {
        if (n > d.size.max_tokens) {
            break;
        }
        check(d, repack, ours, 0, 1, 1, n, n, result);
        check(d, repack, ours, 1, 1, 1, n, n, result);
        if (!repack) { // llama.cpp repacks what MUL_MAT takes as a matrix, and what MUL_MAT_ID takes
            check(d, repack, ours, -3, 1, 1, n, n, result);
        }
        const int n_tokens = std::min(d.size.max_tokens, std::max(n, 32));
        for (int n_expert : { 2, 3, N_EXPERT }) {
            check(d, repack, ours, n_expert, 2, 1 + (n + n_expert) % 2, n_tokens, n, result);
        }
    }
    check(d, repack, ours, 1, 1, 1, std::min(d.size.max_tokens, 33), 0, result); // nothing but -1
    check(d, repack, ours, N_EXPERT, 2, 2, 1, 1, result);
    check(d, repack, ours, N_EXPERT, 2, 1, 2, 2, result);
}

// Whether inputs that 8 bits do not hold are rounded as llama.cpp rounds them: by the results of its kernels. A single one that is
// rounded to its neighbour changes some result by 1e-5 and more.
static bool check_rounding(ggml_type type) {
    data d(type, { 512, 40, 16 });
    const auto size_of = [&](const float * x) {
        double square = 0;
        for (int k = 0; k < d.size.n_in; ++k) {
            square += double(x[k]) * x[k];
        }
        return std::sqrt(square);
    };
    const double row_size = d.scale[0] / size_of(d.x.data()); // of weights: all are of about the same
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < d.x.size(); ++i) {
        const int kind = i / d.size.n_in % 4, k = i % 256;
        if (kind == 0) {
            d.x[i] = normal(rng);
        } else if (kind == 1) { // halves, and several of the largest size, with either sign
            d.x[i] = k % 50 == 7 ? (random_below(2) ? 127 : -127) : random_below(253) - 126 + 0.5f;
        } else if (kind == 2) { // next to nothing
            d.x[i] = std::ldexp(normal(rng), -100);
        } else { // one that is far larger than the others
            d.x[i] = k == 100 ? -1e3f : normal(rng);
        }
    }
    op op(d, false, 0, 1, 1, 2 * d.size.max_tokens);
    ggml_backend_tensor_set(op.w, d.weights.data(), 0, ggml_nbytes(op.w));
    ggml_backend_tensor_set(op.x, d.x.data(), 0, ggml_nbytes(op.x));
    const std::vector<float> ours = op.run(1);
    allocmoe_use_cpu_kernels(false);
    const std::vector<float> theirs = op.run(1);
    allocmoe_use_cpu_kernels(true);
    for (size_t i = 0; i < ours.size(); ++i) {
        if (!(std::abs(ours[i] - theirs[i]) <= MAX_ERROR * row_size * size_of(&d.x[i / d.size.n_out * d.size.n_in]))) {
            printf("%s: input %d is not rounded as by llama.cpp: %g, %g\n", ggml_type_name(type), int(i / d.size.n_out), ours[i], theirs[i]);
            return false;
        }
    }
    return true;
}

// An argument limits the tokens: under emulation all of them take hours.
int main(int argc, char ** argv) {
    const int max_tokens = argc > 1 ? atoi(argv[1]) : 257;
    // llama.cpp notes every tensor that it repacks
    ggml_log_set([](ggml_log_level level, const char * text, void *) {
        if (level >= GGML_LOG_LEVEL_WARN) {
            fputs(text, stderr);
        }
    },
        nullptr);
    backend                = ggml_backend_cpu_init();
    const auto extra_bufts = (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(
        ggml_backend_cpu_reg(), "ggml_backend_dev_get_extra_bufts");
    for (auto * found = extra_bufts(ggml_backend_get_device(backend)); found && *found; ++found) {
        if (strcmp(ggml_backend_buft_name(*found), "CPU_REPACK") == 0) {
            repack_buffer_type = *found;
        }
    }
    const bool has_kernel = (ggml_cpu_has_avx2() && ggml_cpu_has_fma()) || ggml_cpu_has_dotprod();
    bool failed           = false;
    for (ggml_type type : TYPES) {
        const bool is_k = ggml_blck_size(type) == 256;
        result results[2];
        const bool layouts[2] = { true, repack_buffer_type && is_repacked(type) };
        for (shape size : is_k ? SHAPES_K : SHAPES_32) {
            size.max_tokens = std::min(size.max_tokens, max_tokens);
            data d(type, size), extreme(type, { size.n_in, size.n_out, std::min(size.max_tokens, 17) }, true);
            for (int repack = 0; repack < 2; ++repack) {
                if (layouts[repack]) {
                    check_all(d, repack, has_kernel, results[repack]);
                    check_all(extreme, repack, has_kernel, results[repack]);
                }
            }
        }
        failed |= has_kernel && is_k && !check_rounding(type);
        for (int repack = 0; repack < 2; ++repack) {
            if (layouts[repack]) {
                const result & r = results[repack];
                printf("%-6s %-8s %5d ops, largest error %.1e  %s\n", ggml_type_name(type), repack ? "repacked" : "plain", r.n_ops,
                    r.max_error, r.failure.empty() ? "ok" : r.failure.c_str());
                fflush(stdout);
                failed |= !r.failure.empty();
            }
        }
    }
    ggml_backend_free(backend);
    return failed;
}
