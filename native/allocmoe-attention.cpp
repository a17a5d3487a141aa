// Flash attention on the CPU. Heads that share keys and values (grouped queries; with latent attention, all of them), of all tokens, are
// computed together: a line of the key-value cache is read and converted to floats once for several of them. llama.cpp does it
// once for each.
//
// A token's result is the same, bit for bit, whether it comes alone or with others: so a draft is verified by the numbers that
// plain decoding would have.

#include "allocmoe-cpu.h"
#include "allocmoe-floats.h"

#include "common.h"

#include <algorithm>
#include <array>
#include <cfloat>
#include <vector>

namespace {

#if defined(ALLOCMOE_SIMD)
using namespace allocmoe;

constexpr int64_t MAX_TOKENS = 32; // whose threads divide the cache: a draft and the token before it

// A tile of the cache after the other (Dao et al., 2022), with the running maximum of the scores and the sum of their exponentials
// (Milakov and Gimelshein, 2018).

constexpr int64_t TILE = 64; // lines of the cache; rows, of which each is a head of a token

// vectors of products kept in registers, and of them side by side
constexpr int N_PRODUCTS = LANES == 8 ? 12 : 16, ACROSS = LANES == 8 ? 2 : 4;

constexpr int64_t CHUNK = 256; // elements of a key that are floats at a time: whole blocks of any type

static_assert(TILE == ggml_fa_tile_config::Q && TILE == ggml_fa_tile_config::KV, "llama.cpp plans params->wdata for its tiles");

struct flash {
    const ggml_tensor *q, *k, *v, *mask;
    ggml_tensor * dst;
    const float * sinks;                     // [n_head], or null
    int64_t n_k, n_v;                        // elements of a key, of a value
    int64_t n_head, n_group, n_kv, n_tokens; // n_group heads share keys and values
    float scale, softcap, max_bias;

    explicit flash(ggml_tensor * node)
        : q(node->src[0]), k(node->src[1]), v(node->src[2]), mask(node->src[3]), dst(node), sinks(node->src[4] ? (const float *) node->src[4]->data : nullptr),
          n_k(k->ne[0]), n_v(v->ne[0]), n_head(q->ne[2]), n_group(q->ne[2] / k->ne[2]), n_kv(k->ne[1]), n_tokens(q->ne[1]) {
        const auto * numbers = (const float *) node->op_params;
        scale = numbers[0], max_bias = numbers[1], softcap = numbers[2];
        if (softcap != 0.0f) {
            scale /= softcap;
        }
    }

    // what the mask is multiplied by (ALiBi)
    float slope(int64_t head) const {
        if (max_bias <= 0.0f) {
            return 1.0f;
        }
        const int64_t n = int64_t(1) << int(floor(log2(double(n_head))));
        return head < n ? powf(powf(2.0f, -max_bias / n), float(head + 1)) : powf(powf(2.0f, -max_bias / 2.0f / n), float(2 * (head - n) + 1));
    }

    const float * query(int64_t stream, int64_t head, int64_t token) const {
        return (const float *) ((const char *) q->data + token * q->nb[1] + head * q->nb[2] + stream * q->nb[3]);
    }
    const char * line(const ggml_tensor * cache, int64_t stream, int64_t head, int64_t i) const {
        const int64_t i2 = head / (n_head / cache->ne[2]), i3 = stream / (q->ne[3] / cache->ne[3]);
        return (const char *) cache->data + i * cache->nb[1] + i2 * cache->nb[2] + i3 * cache->nb[3];
    }
    const ggml_fp16_t * mask_row(int64_t stream, int64_t token) const {
        return (const ggml_fp16_t *) ((const char *) mask->data + token * mask->nb[1] + stream % mask->ne[3] * mask->nb[3]);
    }
    // What a row has found, [n_v] values by their weights, to what the node gives. The sink has a weight and no value.
    void finish(int64_t stream, int64_t head, int64_t token, float max, float sum, const float * values) const {
        float factor = 1.0f;
        if (sinks) {
            const float most = std::max(max, sinks[head]);
            factor           = expf(max - most);
            sum              = sum * factor + expf(sinks[head] - most);
        }
        factor     = sum == 0.0f ? 0.0f : factor / sum;
        auto * out = (float *) ((char *) dst->data + head * dst->nb[1] + token * dst->nb[2] + stream * dst->nb[3]);
        for (int64_t i = 0; i < n_v; ++i) {
            out[i] = values[i] * factor;
        }
    }
};

// Rows of one stream whose heads share keys and values: every head of head0 to head0 + n_heads of each token.
struct row_block {
    int64_t stream, head0, n_heads, token0, n_tokens;
    const int32_t * lines; // where they are scattered, those that the last token sees, in their order; null: all of the cache
    int64_t n_lines;
    int64_t n_rows() const { return n_heads * n_tokens; } // at most TILE
    int64_t head(int64_t row) const { return head0 + row % n_heads; }
    int64_t token(int64_t row) const { return token0 + row / n_heads; }
    bool same_lines(const row_block & other) const { // for other heads
        return stream == other.stream && token0 == other.token0 && n_tokens == other.n_tokens && lines == other.lines;
    }
};

// Of one thread, in params->wdata.
struct scratch {
    float * scores;      // [TILE lines][TILE rows]
    float * keys;        // [N_PRODUCTS lines][CHUNK], or [n_k][TILE lines]
    float * values;      // [TILE lines][n_v]
    float * queries;     // [TILE][n_k] and a vector more, see pack()
    ggml_fp16_t * lines; // [LANES][n_k]

    static int64_t n_keys(const flash & f) { return std::max(N_PRODUCTS * CHUNK, TILE * f.n_k); }
    static int64_t size(const flash & f) { return TILE * (TILE + f.n_v + f.n_k) + n_keys(f) + LANES + LANES * f.n_k / 2; }
    scratch(const flash & f, float * work) {
        scores  = work;
        keys    = scores + TILE * TILE;
        values  = keys + n_keys(f);
        queries = values + TILE * f.n_v;
        lines   = (ggml_fp16_t *) (queries + TILE * f.n_k + LANES);
    }
};

// What a row has found in some of the cache: the largest score, the sum of weights, and that of values by their weights.
struct found {
    float *max, *sum, *values;

    static int64_t size(const flash & f, int64_t n_rows) { return n_rows * (f.n_v + 2); }
    found(float * memory, int64_t n_rows) : max(memory), sum(max + n_rows), values(sum + n_rows) {}
    void clear(const flash & f, int64_t row, int64_t n_rows) {
        std::fill(max + row, max + row + n_rows, -INFINITY);
        std::fill(sum + row, sum + row + n_rows, 0.0f);
        memset(values + row * f.n_v, 0, n_rows * f.n_v * sizeof(float));
    }
    void add(const flash & f, int64_t row, const found & other, int64_t row_of_other) {
        if (other.sum[row_of_other] == 0.0f) {
            return;
        }
        const float most = std::max(max[row], other.max[row_of_other]);
        const float mine = expf(max[row] - most), its = expf(other.max[row_of_other] - most);
        max[row]           = most;
        sum[row]           = sum[row] * mine + other.sum[row_of_other] * its;
        float * to         = values + row * f.n_v;
        const float * from = other.values + row_of_other * f.n_v;
        for (int64_t i = 0; i < f.n_v; i += LANES) {
            store(to + i, multiply_add(load(to + i), broadcast(mine), times(load(from + i), broadcast(its))));
        }
    }
};

void line_to_float(ggml_type type, const char * line, int64_t n, float * out) {
    if (type == GGML_TYPE_F32) {
        memcpy(out, line, n * sizeof(float));
    } else if (type == GGML_TYPE_F16) {
        const auto * half = (const ggml_fp16_t *) line;
        int64_t i         = 0;
        for (; i + LANES <= n; i += LANES) {
            store(out + i, load(half + i));
        }
        for (; i < n; ++i) {
            out[i] = GGML_CPU_FP16_TO_FP32(half[i]);
        }
    } else {
        ggml_get_type_traits(type)->to_float(line, out, n);
    }
}

// scores[line][row] of LINES keys [CHUNK] by VECTORS of queries[element][row], n elements; `more`: added to what is there.
template <typename V, int LINES, int VECTORS>
void score(const float * keys, int64_t n, const float * queries, int64_t n_rows, float * scores, bool more) {
    constexpr int N = sizeof(V) / sizeof(float);
    V sum[LINES][VECTORS];
    for (int i = 0; i < LINES; ++i) {
        for (int j = 0; j < VECTORS; ++j) {
            sum[i][j] = more ? load_as<V>(scores + i * TILE + j * N) : broadcast_as<V>(0.0f);
        }
    }
    for (int64_t e = 0; e < n; ++e) {
        V query[VECTORS];
        for (int j = 0; j < VECTORS; ++j) {
            query[j] = load_as<V>(queries + e * n_rows + j * N);
            in_register(query[j]);
        }
        for (int i = 0; i < LINES; ++i) {
            const V key = broadcast_as<V>(keys[i * CHUNK + e]);
            for (int j = 0; j < VECTORS; ++j) {
                sum[i][j] = multiply_add(key, query[j], sum[i][j]);
            }
        }
    }
    for (int i = 0; i < LINES; ++i) {
        for (int j = 0; j < VECTORS; ++j) {
            store(scores + i * TILE + j * N, sum[i][j]);
        }
    }
}

template <typename V, int VECTORS>
void score_lines(const float * keys, int64_t n_lines, int64_t n, const float * queries, int64_t n_rows, float * scores, bool more) {
    constexpr int LINES = N_PRODUCTS / VECTORS;
    int64_t i           = 0;
    for (; i + LINES <= n_lines; i += LINES) {
        score<V, LINES, VECTORS>(keys + i * CHUNK, n, queries, n_rows, scores + i * TILE, more);
    }
    for (; i < n_lines; ++i) {
        score<V, 1, VECTORS>(keys + i * CHUNK, n, queries, n_rows, scores + i * TILE, more);
    }
}

// out[row][element] += weights[line][row] * values[line][element], of ROWS rows and VECTORS * LANES elements. steps: from a line to
// the next, from a row of weights to the next
template <int ROWS, int VECTORS, typename T>
void add_values(const float * weights, int64_t line_step, int64_t row_step, const T * values, int64_t step, int64_t n_lines, float * out, int64_t n) {
    vec sum[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r) {
        for (int j = 0; j < VECTORS; ++j) {
            sum[r][j] = load(out + r * n + j * LANES);
        }
    }
    for (int64_t i = 0; i < n_lines; ++i) {
        vec value[VECTORS];
        for (int j = 0; j < VECTORS; ++j) {
            value[j] = load(values + i * step + j * LANES);
            in_register(value[j]);
        }
        for (int r = 0; r < ROWS; ++r) {
            const vec weight = broadcast(weights[i * line_step + r * row_step]);
            for (int j = 0; j < VECTORS; ++j) {
                sum[r][j] = multiply_add(weight, value[j], sum[r][j]);
            }
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int j = 0; j < VECTORS; ++j) {
            store(out + r * n + j * LANES, sum[r][j]);
        }
    }
}

template <int ROWS, int VECTORS, typename T>
void add_values_to(const float * weights, int64_t line_step, int64_t row_step, const T * values, int64_t step, int64_t n_lines, float * out, int64_t n) {
    int64_t e = 0;
    for (; e + VECTORS * LANES <= n; e += VECTORS * LANES) {
        add_values<ROWS, VECTORS>(weights, line_step, row_step, values + e, step, n_lines, out + e, n);
    }
    for (; e < n; e += LANES) {
        add_values<ROWS, 1>(weights, line_step, row_step, values + e, step, n_lines, out + e, n);
    }
}

template <typename T>
void add_values_to(const float * weights, int64_t line_step, int64_t row_step, const T * values, int64_t step, int64_t n_lines, float * out, int64_t n, int64_t n_rows) {
    constexpr int ROWS = N_PRODUCTS / ACROSS;
    int64_t r          = 0;
    for (; r + ROWS <= n_rows; r += ROWS) {
        add_values_to<ROWS, ACROSS>(weights + r * row_step, line_step, row_step, values, step, n_lines, out + r * n, n);
    }
    for (; r < n_rows; ++r) {
        add_values_to<1, N_SUMS / 2>(weights + r * row_step, line_step, row_step, values, step, n_lines, out + r * n, n);
    }
}

constexpr ggml_fp16_t MINUS_INFINITY = 0xfc00;

// The lines of a tile that the mask leaves to any of the block's rows, in their order. To leave out the others changes no bit: they
// have weights of zero.
struct open_lines {
    int64_t n = 0;
    int64_t line[TILE];
    bool changed = false; // whether the mask adds anything to the others

    open_lines(const flash & f, const row_block & block, int64_t line0, int64_t n_lines) {
        if (block.lines) {
            look(f, block, n_lines, [&](int64_t i) { return int64_t(block.lines[line0 + i]); });
        } else {
            look(f, block, n_lines, [&](int64_t i) { return line0 + i; });
        }
    }
    bool in_one_piece() const { return line[n - 1] - line[0] == n - 1; }

private:
    template <typename T>
    void look(const flash & f, const row_block & block, int64_t n_lines, const T & line_of) {
        ggml_fp16_t open[TILE], any = 0; // not zero where it is so, for many at once
        std::fill(open, open + TILE, f.mask ? 0 : 1);
        for (int64_t t = 0; f.mask && t < block.n_tokens; ++t) {
            const ggml_fp16_t * mask = f.mask_row(block.stream, block.token0 + t);
            for (int64_t i = 0; i < n_lines; ++i) {
                any |= mask[line_of(i)];
                open[i] |= mask[line_of(i)] ^ MINUS_INFINITY;
            }
        }
        changed = any != 0;
        for (int64_t i = 0; i < n_lines; ++i) {
            if (open[i]) {
                line[n++] = line_of(i);
            }
        }
    }
};

// scores[line][row] of a tile: keys by queries [element][row], the rows side by side in a vector. A few lines' elements at a time are
// made floats, which are then in the first-level cache, CHUNK apart: a distance that the compiler puts into addresses.
void score_rows(const flash & f, const row_block & block, const float * queries, const open_lines & lines, const scratch & work) {
    const int64_t n_rows = block.n_rows();
    for (int64_t i = 0; i < lines.n; i += N_PRODUCTS) {
        const int64_t n_lines = std::min<int64_t>(N_PRODUCTS, lines.n - i);
        for (int64_t e = 0; e < f.n_k; e += CHUNK) {
            const int64_t n = std::min(CHUNK, f.n_k - e);
            for (int64_t j = 0; j < n_lines; ++j) {
                line_to_float(f.k->type, f.line(f.k, block.stream, block.head0, lines.line[i + j]) + ggml_row_size(f.k->type, e), n, work.keys + j * CHUNK);
            }
            const float * of_rows = queries + e * n_rows;
            float * scores        = work.scores + i * TILE;
            int64_t row           = 0;
            for (; row + (ACROSS - 1) * LANES < n_rows; row += ACROSS * LANES) {
                score_lines<vec, ACROSS>(work.keys, n_lines, n, of_rows + row, n_rows, scores + row, e > 0);
            }
            for (; row + HALF_LANES < n_rows; row += LANES) {
                score_lines<vec, 1>(work.keys, n_lines, n, of_rows + row, n_rows, scores + row, e > 0);
            }
            if (row < n_rows) {
                score_lines<half_vec, 1>(work.keys, n_lines, n, of_rows + row, n_rows, scores + row, e > 0);
            }
        }
    }
}

// The same of one row, scores[line], the lines side by side; a product's terms are added in the same order. keys[element][line]
void score_row(const float * keys, int64_t n, const float * queries, int64_t n_rows, float * scores) {
    constexpr int SUMS = 4;
    for (int64_t line = 0; line < TILE; line += SUMS * LANES) {
        vec sum[SUMS];
        for (int j = 0; j < SUMS; ++j) {
            sum[j] = zero();
        }
        for (int64_t e = 0; e < n; ++e) {
            const vec query = broadcast(queries[e * n_rows]);
            for (int j = 0; j < SUMS; ++j) {
                sum[j] = multiply_add(load(keys + e * TILE + line + j * LANES), query, sum[j]);
            }
        }
        for (int j = 0; j < SUMS; ++j) {
            store(scores + line + j * LANES, sum[j]);
        }
    }
}

// work.keys[element][line], of n elements, a multiple of LANES
void transpose_lines(const char * lines, int64_t step, int64_t n_lines, int64_t n, const scratch & work) {
    for (int64_t line = 0; line < TILE; line += LANES) {
        // together first: lines are often a multiple of 4096 bytes apart, which the first-level cache has few places for
        for (int i = 0; i < LANES; ++i) {
            memcpy(work.lines + i * n, lines + std::min(line + i, n_lines - 1) * step, n * sizeof(ggml_fp16_t));
        }
        for (int64_t e = 0; e < n; e += LANES) {
            vec x[LANES];
            for (int i = 0; i < LANES; ++i) {
                x[i] = load(work.lines + i * n + e);
            }
            transpose(x);
            for (int i = 0; i < LANES; ++i) {
                store(work.keys + (e + i) * TILE + line, x[i]);
            }
        }
    }
}

// steps: from the score of a line to the next, from a row to the next
void finish_scores(const flash & f, const row_block & block, float * scores, int64_t line_step, int64_t row_step, const open_lines & lines) {
    for (int64_t r = 0; f.softcap != 0.0f && r < block.n_rows(); ++r) {
        for (int64_t i = 0; i < lines.n; ++i) {
            float & score = scores[i * line_step + r * row_step];
            score         = f.softcap * tanhf(score);
        }
    }
    for (int64_t r = 0; lines.changed && r < block.n_rows(); ++r) {
        const ggml_fp16_t * mask = f.mask_row(block.stream, block.token(r));
        const float slope        = f.slope(block.head(r));
        for (int64_t i = 0; i < lines.n; ++i) {
            float & score = scores[i * line_step + r * row_step];
            score         = std::fma(slope, GGML_CPU_FP16_TO_FP32(mask[lines.line[i]]), score);
        }
    }
}

// Scores become weights; what the rows have found so far is scaled to the new maximum. max, sum, values: of the block's rows.
void weigh(const flash & f, const scratch & work, int64_t n_lines, int64_t n_rows, float * max, float * sum, float * values) {
    for (int64_t r = 0; r < n_rows; r += LANES) {
        float * column = work.scores + r;
        float old[LANES], factor[LANES], total[LANES];
        const int64_t n_here = std::min<int64_t>(LANES, n_rows - r);
        std::fill(std::copy(max + r, max + r + n_here, old), old + LANES, 0.0f);
        std::fill(std::copy(sum + r, sum + r + n_here, total), total + LANES, 0.0f);
        vec most = load(old);
        for (int64_t i = 0; i < n_lines; ++i) {
            most = maximum(most, load(column + i * TILE));
        }
        const vec base = maximum(most, broadcast(-FLT_MAX)); // of a row that the mask has left nothing so far
        vec here       = zero();
        for (int64_t i = 0; i < n_lines; ++i) {
            const vec weight = exponential(minus(load(column + i * TILE), base));
            store(column + i * TILE, weight);
            here = plus(here, weight);
        }
        const vec scale = exponential(minus(load(old), base));
        store(factor, scale);
        store(total, multiply_add(load(total), scale, here));
        store(old, most);
        std::copy(old, old + n_here, max + r);
        std::copy(total, total + n_here, sum + r);
        for (int64_t i = 0; i < n_here; ++i) {
            if (factor[i] != 1.0f) {
                ggml_vec_scale_f32(int(f.n_v), values + (r + i) * f.n_v, factor[i]);
            }
        }
    }
}

// The same of one row whose scores lie side by side. The sum is taken in the same order.
void weigh_row(const flash & f, float * scores, int64_t n_lines, float & max, float & sum, float * values) {
    std::fill(scores + n_lines, scores + TILE, -INFINITY);
    const float old  = max;
    max              = std::max(max, *std::max_element(scores, scores + n_lines));
    const float base = std::max(max, -FLT_MAX);
    for (int64_t i = 0; i < TILE; i += LANES) {
        store(scores + i, exponential(minus(load(scores + i), broadcast(base))));
    }
    float here = 0.0f;
    for (int64_t i = 0; i < n_lines; ++i) {
        here += scores[i];
    }
    float factor[LANES];
    store(factor, exponential(minus(broadcast(old), broadcast(base))));
    sum = std::fma(sum, factor[0], here);
    if (factor[0] != 1.0f) {
        ggml_vec_scale_f32(int(f.n_v), values, factor[0]);
    }
}

// The cache is divided into parts, always in the same way: pieces of PIECE lines take turns. What a row finds in each is put
// together in their order. So its result depends neither on how many threads there are, nor on the tokens that are evaluated
// together, nor on how much of the cache is still empty.
constexpr int64_t PARTS = 24, PIECE = 2 * TILE;

// The most rows for which keys lie side by side in vectors, not rows; and for which values are made floats each time they are used.
constexpr int64_t FEW_ROWS = 3, ROWS_OF_HALF = 16;

// The tiles of one of the parts, in their order: do_tile(first line, lines)
template <typename T>
void each_tile(int64_t n_lines, int64_t part, const T & do_tile) {
    for (int64_t piece = part * PIECE; piece < n_lines; piece += PARTS * PIECE) {
        const int64_t end = std::min(piece + PIECE, n_lines);
        for (int64_t line = piece; line < end; line += TILE) {
            do_tile(line, std::min(TILE, end - line));
        }
    }
}

// The queries of blocks: of each [n_k][its rows], times the scale. A vector ends with those of the next element, or after the last with zeros.
void pack(const flash & f, const row_block * blocks, size_t n_blocks, float * queries) {
    for (size_t i = 0; i < n_blocks; ++i) {
        const int64_t n_rows = blocks[i].n_rows();
        for (int64_t r = 0; r < n_rows; ++r) {
            const float * query = f.query(blocks[i].stream, blocks[i].head(r), blocks[i].token(r));
            for (int64_t e = 0; e < f.n_k; ++e) {
                queries[e * n_rows + r] = query[e] * f.scale;
            }
        }
        queries += f.n_k * n_rows;
    }
    std::fill(queries, queries + LANES, 0.0f);
}

// Asks for the lines of a tile, of all heads of the blocks. What lies in one piece is read from its beginning to its end, all heads'
// lines together, so that the hardware fetches ahead, which it does not where each head reads its own: that took half of the time
// where the cache is larger than those of the processor.
void fetch(const flash & f, const row_block * blocks, size_t n_blocks, const open_lines & lines) {
    for (const ggml_tensor * cache : { f.k, f.v }) {
        const int64_t size = ggml_row_size(cache->type, cache->ne[0]);
        for (int64_t i = 0; i < lines.n; ++i) {
            for (size_t j = 0; j < n_blocks; ++j) {
                const char * line = f.line(cache, blocks[j].stream, blocks[j].head0, lines.line[i]);
                for (int64_t byte = 0; byte < size; byte += 64) {
                    if (blocks->lines) {
                        __builtin_prefetch(line + byte);
                    } else {
                        (void) *(const volatile char *) (line + byte);
                    }
                }
            }
        }
    }
}

// A block's rows, whose queries are packed, over the open lines of one tile.
void attend(const flash & f, const row_block & block, const float * queries, const open_lines & lines, const scratch & work, const found & into) {
    const int64_t n_rows = block.n_rows();
    // side by side they would leave most of a vector empty
    if (n_rows <= FEW_ROWS && f.k->type == GGML_TYPE_F16 && f.v->type == GGML_TYPE_F16 && f.n_k % LANES == 0 && lines.in_one_piece()) {
        const char * keys   = f.line(f.k, block.stream, block.head0, lines.line[0]);
        const char * values = f.line(f.v, block.stream, block.head0, lines.line[0]);
        transpose_lines(keys, f.k->nb[1], lines.n, f.n_k, work);
        for (int64_t r = 0; r < n_rows; ++r) {
            score_row(work.keys, f.n_k, queries + r, n_rows, work.scores + r * TILE);
        }
        finish_scores(f, block, work.scores, 1, TILE, lines);
        for (int64_t r = 0; r < n_rows; ++r) {
            weigh_row(f, work.scores + r * TILE, lines.n, into.max[r], into.sum[r], into.values + r * f.n_v);
        }
        add_values_to(work.scores, 1, TILE, (const ggml_fp16_t *) values, f.v->nb[1] / sizeof(ggml_fp16_t), lines.n, into.values, f.n_v, n_rows);
        return;
    }
    score_rows(f, block, queries, lines, work);
    finish_scores(f, block, work.scores, TILE, 1, lines);
    weigh(f, work, lines.n, n_rows, into.max, into.sum, into.values);
    if (n_rows <= ROWS_OF_HALF && f.v->type == GGML_TYPE_F16 && lines.in_one_piece()) {
        const char * values = f.line(f.v, block.stream, block.head0, lines.line[0]);
        add_values_to(work.scores, TILE, 1, (const ggml_fp16_t *) values, f.v->nb[1] / sizeof(ggml_fp16_t), lines.n, into.values, f.n_v, n_rows);
        return;
    }
    for (int64_t i = 0; i < lines.n; ++i) {
        line_to_float(f.v->type, f.line(f.v, block.stream, block.head0, lines.line[i]), f.n_v, work.values + i * f.n_v);
    }
    add_values_to(work.scores, TILE, 1, work.values, f.n_v, lines.n, into.values, f.n_v, n_rows);
}

// Blocks that are alike but for their heads, over one part of the cache. Not inlined in two places: GCC's code for a few tokens took up
// to 1.7 times as long.
[[gnu::noinline]] void attend_together(const flash & f, const row_block * blocks, size_t n_blocks, int64_t part, const float * queries, const scratch & work, found * into) {
    for (size_t i = 0; i < n_blocks; ++i) {
        into[i].clear(f, 0, blocks[i].n_rows());
    }
    each_tile(blocks->n_lines, part, [&](int64_t line0, int64_t n_lines) {
        const open_lines lines(f, *blocks, line0, n_lines);
        if (lines.n == 0) {
            return;
        }
        fetch(f, blocks, n_blocks, lines);
        const float * of_block = queries;
        for (size_t i = 0; i < n_blocks; of_block += f.n_k * blocks[i++].n_rows()) {
            attend(f, blocks[i], of_block, lines, work, into[i]);
        }
    });
}

bool all_finite(const flash & f, const found & x, int64_t n_rows) {
    constexpr int N = 4;
    vec zeros[N]    = { zero(), zero(), zero(), zero() }; // no zero where a number is not finite
    for (int64_t i = 0; i < n_rows * f.n_v / LANES; ++i) {
        zeros[i % N] = multiply_add(load(x.values + i * LANES), zero(), zeros[i % N]);
    }
    float lanes[N * LANES];
    for (int i = 0; i < N; ++i) {
        store(lanes + i * LANES, zeros[i]);
    }
    return std::all_of(lanes, lanes + N * LANES, [](float lane) { return lane == 0.0f; }) &&
           std::all_of(x.sum, x.sum + n_rows, [](float sum) { return std::isfinite(sum); }) &&
           std::all_of(x.max, x.max + n_rows, [](float max) { return max < INFINITY; });
}

// The same. An infinite key or value reaches rows that do not see its line, for zero times infinity is no number: where there is
// one, each token is computed by itself.
void attend_part(const flash & f, const row_block * blocks, size_t n_blocks, int64_t part, const float * queries, const scratch & work, found * into) {
    attend_together(f, blocks, n_blocks, part, queries, work, into);
    for (size_t i = 0; i < n_blocks; ++i) {
        if (blocks[i].n_tokens == 1 || all_finite(f, into[i], blocks[i].n_rows())) {
            continue;
        }
        std::vector<float> packed(blocks[i].n_heads * f.n_k + LANES);
        for (int64_t t = 0; t < blocks[i].n_tokens; ++t) {
            row_block one = blocks[i];
            one.token0 += t;
            one.n_tokens = 1;
            found its    = into[i];
            its.max += t * one.n_heads;
            its.sum += t * one.n_heads;
            its.values += t * one.n_heads * f.n_v;
            pack(f, &one, 1, packed.data());
            attend_together(f, &one, 1, part, packed.data(), work, &its);
        }
    }
}

// All rows, in blocks of TILE at most. A token whose lines are scattered, as in a cache that many sequences share, is in a block
// with those alone that see a first part of its lines, as the tokens of its prompt do: of other sequences' lines it needs hardly any.
struct row_blocks {
    std::vector<row_block> blocks;

    // Of one thread, until it asks again.
    static const std::vector<row_block> & of(const flash & f) {
        thread_local row_blocks all;
        all.find_lines(f);
        all.cut(f);
        return all.blocks;
    }

private:
    // lines[begin], lines[begin + 1], ...
    struct scattered {
        size_t begin, n; // 0 where they are not
    };

    std::vector<int32_t> lines, own;
    std::vector<scattered> of_tokens; // of the mask's streams, one after the other

    // A token's lines are scattered where they are fewer than a quarter of those between the first and the last.
    void find_own(const flash & f, const ggml_fp16_t * mask) {
        const auto is_open = [](ggml_fp16_t x) { return x != MINUS_INFINITY; };
        const auto * first = std::find_if(mask, mask + f.n_kv, is_open);
        const auto * end   = mask + f.n_kv;
        for (; end > first && !is_open(end[-1]); --end) {
        }
        own.clear();
        if (4 * std::count_if(first, end, is_open) >= end - first) {
            return;
        }
        for (const auto * x = first; x < end; ++x) {
            if (is_open(*x)) {
                own.push_back(int32_t(x - mask));
            }
        }
    }

    void find_lines(const flash & f) {
        lines.clear();
        of_tokens.clear();
        for (int64_t stream = 0; f.mask && stream < f.mask->ne[3]; ++stream) {
            for (int64_t token = 0; token < f.n_tokens; ++token) {
                find_own(f, f.mask_row(stream, token));
                scattered last  = token > 0 ? of_tokens.back() : scattered{ 0, 0 };
                const auto seen = lines.begin() + last.begin;
                if (last.n == 0 || own.size() < last.n || !std::equal(seen, seen + last.n, own.begin())) {
                    last = { lines.size(), 0 };
                }
                lines.insert(lines.end(), own.begin() + last.n, own.end());
                of_tokens.push_back({ last.begin, own.size() });
            }
        }
    }

    void cut(const flash & f) {
        blocks.clear();
        const int64_t most_heads = std::min(f.n_group, TILE), most_tokens = TILE / most_heads;
        for (int64_t stream = 0; stream < f.q->ne[3]; ++stream) {
            const auto of_token = [&](int64_t token) { return f.mask ? of_tokens[stream % f.mask->ne[3] * f.n_tokens + token] : scattered{ 0, 0 }; };
            const auto together = [](const scattered & a, const scattered & b) { return a.n == 0 ? b.n == 0 : b.n > 0 && a.begin == b.begin; };
            // the last tokens of a text see most of it: they come first. Heads that see the same lines are neighbours, see attend_part()
            for (int64_t end = f.n_tokens, begin; end > 0; end = begin) {
                const scattered last = of_token(end - 1);
                for (begin = end - 1; begin > 0 && end - begin < most_tokens && together(of_token(begin - 1), last); --begin) {
                }
                const int32_t * seen = last.n > 0 ? lines.data() + last.begin : nullptr;
                for (int64_t head = 0, n_heads; head < f.n_head; head += n_heads) {
                    n_heads = std::min(most_heads, f.n_group - head % f.n_group);
                    blocks.push_back({ stream, head, n_heads, begin, end - begin, seen, seen ? int64_t(last.n) : f.n_kv });
                }
            }
        }
    }
};

// A thread takes one block after the other: all heads together, whose number is the same for all tokens, where that leaves all threads
// enough to take. More heads than MOST would not stay in the second-level cache.
void attend_by_blocks(const flash & f, const ggml_compute_params * params, const scratch & work) {
    constexpr size_t MOST                 = 8;
    const std::vector<row_block> & blocks = row_blocks::of(f);
    size_t n                              = 1;
    for (; n < blocks.size() && blocks[n].same_lines(blocks[0]); ++n) {
    }
    if (n > MOST || blocks.size() < 4 * params->nth * n) {
        n = 1;
    }
    thread_local std::vector<float> memory;
    memory.resize(n * (2 * found::size(f, TILE) + TILE * f.n_k) + LANES);
    std::vector<found> all, here;
    float * queries = memory.data();
    for (size_t i = 0; i < n; ++i) {
        all.emplace_back(queries, TILE);
        here.emplace_back(queries + found::size(f, TILE), TILE);
        queries += 2 * found::size(f, TILE);
    }
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);
    for (size_t first = params->ith * n; first < blocks.size(); first = ggml_threadpool_chunk_add(params->threadpool, 1) * n) {
        pack(f, &blocks[first], n, queries);
        for (size_t j = 0; j < n; ++j) {
            all[j].clear(f, 0, blocks[first + j].n_rows());
        }
        for (int64_t part = 0; part < PARTS && part * PIECE < blocks[first].n_lines; ++part) {
            attend_part(f, &blocks[first], n, part, queries, work, here.data());
            for (size_t j = 0; j < n; ++j) {
                for (int64_t r = 0; r < blocks[first + j].n_rows(); ++r) {
                    all[j].add(f, r, here[j], r);
                }
            }
        }
        for (size_t j = 0; j < n; ++j) {
            const row_block & block = blocks[first + j];
            for (int64_t r = 0; r < block.n_rows(); ++r) {
                f.finish(block.stream, block.head(r), block.token(r), all[j].max[r], all[j].sum[r], all[j].values + r * f.n_v);
            }
        }
    }
}

// One part of the cache for one block.
struct share {
    const row_block * block;
    int64_t column; // the first of its packed rows
    int64_t part;
    int64_t thread, row; // whose it is, and which of that thread's rows its first is
};

// How many pieces of each part the mask leaves to any of the block's rows.
std::array<int64_t, PARTS> open_pieces(const flash & f, const row_block & block) {
    std::array<int64_t, PARTS> n = {};
    for (int64_t piece = 0; piece * PIECE < block.n_lines; ++piece) {
        bool open = !f.mask || block.lines;
        for (int64_t t = block.n_tokens; !open && t-- > 0;) { // the last one sees most
            const ggml_fp16_t * mask = f.mask_row(block.stream, block.token0 + t);
            ggml_fp16_t any          = 0; // not zero where it is so, for many at once
            for (int64_t i = piece * PIECE; i < std::min((piece + 1) * PIECE, block.n_lines); ++i) {
                any |= mask[i] ^ MINUS_INFINITY;
            }
            open = any != 0;
        }
        n[piece % PARTS] += open;
    }
    return n;
}

// Blocks of TILE rows at most, divided among threads, all heads of a part of the cache together where that leaves each thread four
// of these or so: their lines are neighbours in memory. What comes next is taken by who has least to do.
void divide(const flash & f, const row_block * begin, const row_block * end, int64_t n_threads, std::vector<share> & shares) {
    struct alike { // but for their heads
        const row_block *begin, *end;
        int64_t column;
        std::array<int64_t, PARTS> n_pieces;
    };
    std::vector<alike> tokens;
    int64_t column = 0, n_together = 0;
    for (const row_block * block = begin; block < end; column += block++->n_rows()) {
        if (block == begin || !block->same_lines(block[-1])) {
            tokens.push_back({ block, block, column, open_pieces(f, *block) });
            n_together += PARTS - std::count(tokens.back().n_pieces.begin(), tokens.back().n_pieces.end(), 0);
        }
        ++tokens.back().end;
    }
    shares.clear();
    std::vector<int64_t> load(n_threads), n_rows(n_threads);
    for (int64_t part = 0; part < PARTS; ++part) {
        for (const alike & blocks : tokens) {
            if (blocks.n_pieces[part] == 0) {
                continue;
            }
            const int64_t n = blocks.end - blocks.begin, n_takers = std::min(n, (4 * n_threads + n_together - 1) / n_together);
            column = blocks.column;
            for (int64_t taker = 0, i = 0; taker < n_takers; ++taker) {
                const int64_t thread = std::min_element(load.begin(), load.end()) - load.begin();
                for (; i < (taker + 1) * n / n_takers; ++i) {
                    const row_block & block = blocks.begin[i];
                    shares.push_back({ &block, column, part, thread, n_rows[thread] });
                    column += block.n_rows();
                    n_rows[thread] += block.n_rows();
                    load[thread] += blocks.n_pieces[part] * block.n_rows();
                }
            }
        }
    }
}

// Each thread takes its share of the cache, for TILE rows at most; then what all have found is put together.
void attend_by_parts(const flash & f, const ggml_compute_params * params, const scratch & work, float ** found_of) {
    const int ith = params->ith, nth = params->nth;
    thread_local std::vector<float> memory;
    thread_local std::vector<share> shares;
    thread_local std::vector<found> mine;

    const std::vector<row_block> & blocks = row_blocks::of(f);
    for (size_t i = 0, end; i < blocks.size(); i = end) {
        int64_t n_rows = 0, n_found = 0;
        for (end = i; end < blocks.size() && n_rows + blocks[end].n_rows() <= TILE; n_rows += blocks[end++].n_rows()) {
        }
        pack(f, &blocks[i], end - i, work.queries);
        divide(f, &blocks[i], &blocks[i] + (end - i), nth, shares);
        for (const share & s : shares) {
            n_found += s.thread == ith ? s.block->n_rows() : 0;
        }
        memory.resize(found::size(f, TILE + n_found));
        found all(memory.data(), TILE);
        found_of[ith]       = memory.data() + found::size(f, TILE);
        const auto found_in = [&](const share & s) { return found(found_of[s.thread] + found::size(f, s.row), s.block->n_rows()); };

        for (auto first = shares.begin(); first < shares.end();) {
            if (first->thread != ith) {
                ++first;
                continue;
            }
            mine.clear();
            auto last = first;
            for (; last < shares.end() && last->thread == ith && last->part == first->part && last->block->same_lines(*first->block); ++last) {
                mine.push_back(found_in(*last));
            }
            attend_part(f, first->block, mine.size(), first->part, work.queries + f.n_k * first->column, work, mine.data());
            first = last;
        }
        ggml_barrier(params->threadpool);
        for (int64_t r = ith; r < n_rows; r += nth) {
            all.clear(f, r, 1);
        }
        for (const share & s : shares) {
            const found from = found_in(s);
            for (int64_t r = 0; r < s.block->n_rows(); ++r) {
                if ((s.column + r) % nth == ith) {
                    all.add(f, s.column + r, from, r);
                }
            }
        }
        int64_t row = 0;
        for (size_t j = i; j < end; ++j) {
            for (int64_t r = 0; r < blocks[j].n_rows(); ++r, ++row) {
                if (row % nth == ith) {
                    f.finish(blocks[j].stream, blocks[j].head(r), blocks[j].token(r), all.max[row], all.sum[row], all.values + row * f.n_v);
                }
            }
        }
        if (end < blocks.size()) {
            ggml_barrier(params->threadpool);
        }
    }
}

bool can_attend(const flash & f) {
    const auto readable = [](ggml_type type) { return type == GGML_TYPE_F32 || ggml_get_type_traits(type)->to_float; };
    return f.q->type == GGML_TYPE_F32 && readable(f.k->type) && readable(f.v->type) && f.k->nb[0] == ggml_type_size(f.k->type) &&
           f.v->nb[0] == ggml_type_size(f.v->type) && f.q->nb[0] == sizeof(float) && f.k->ne[2] == f.v->ne[2] && f.k->ne[3] == f.v->ne[3] &&
           f.n_v % LANES == 0 && (!f.mask || (f.mask->type == GGML_TYPE_F16 && f.mask->ne[2] == 1));
}
#endif

} // namespace

bool allocmoe_flash_attention(const ggml_compute_params * params, ggml_tensor * dst) {
#if defined(ALLOCMOE_SIMD)
    const flash f(dst);
    auto ** pointers = (float **) params->wdata; // of each thread
    auto * work      = (float *) (pointers + params->nth) + params->ith * scratch::size(f);
    if (!allocmoe_cpu_kernels || params->use_ref || !can_attend(f) ||
        params->nth * (sizeof(float *) + scratch::size(f) * sizeof(float)) > params->wsize) {
        return false;
    }
    if (f.n_tokens > MAX_TOKENS) {
        attend_by_blocks(f, params, scratch(f, work));
    } else {
        attend_by_parts(f, params, scratch(f, work), pointers);
    }
    return true;
#else
    GGML_UNUSED(params);
    GGML_UNUSED(dst);
    return false;
#endif
}
