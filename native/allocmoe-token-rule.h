// The token rules (Alloc-T): which of a layer's candidate experts each token of a micro-batch activates, and what stands in
// for the others under ALLOCMOE_RULE_ESTIMATE. Written once, as what the threads of one block do: of a GPU, or one of the CPU.
//
// `Block` is a thread's view of its block: rank(), size(), sync(), count(condition) (how many threads it holds for, a
// barrier), and add(address, value) (atomic). On a GPU that is a CUDA block, on the CPU allocmoe_one_thread; tests run
// blocks of CPU threads. Nothing here allocates or throws.
#pragma once

#include "allocmoe-custom.h"

#include <math.h>

#if defined(__CUDACC__) || defined(__HIPCC__) || defined(__MUSACC__)
#define ALLOCMOE_DIV(a, b) __fdiv_rn(a, b)
#define ALLOCMOE_SUB(a, b) __fsub_rn(a, b)
#else
#define ALLOCMOE_DIV(a, b) ((a) / (b))
#define ALLOCMOE_SUB(a, b) ((a) - (b))
#endif

static constexpr int ALLOCMOE_MAX_BLOCK = 1024;

#if !defined(__CUDACC__) && !defined(__HIPCC__) && !defined(__MUSACC__)
struct allocmoe_one_thread {
    static constexpr int rank() { return 0; }
    static constexpr int size() { return 1; }
    static void sync() {}
    static int count(bool condition) { return condition; }
    static void add(int32_t * address, int32_t value) { *address += value; }
};
#endif

//
// numbers
//

ALLOCMOE_FN uint32_t allocmoe_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}

ALLOCMOE_FN bool allocmoe_is_nan(float x) {
    return (allocmoe_bits(x) & 0x7fffffffu) > 0x7f800000u;
}

// Ordered as the floats are. Integers, since a GPU's fast math would take tiny floats for zero.
ALLOCMOE_FN uint32_t allocmoe_key(float x) {
    const uint32_t bits = allocmoe_bits(x) == 0x80000000u ? 0u : allocmoe_bits(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static constexpr uint32_t ALLOCMOE_KEY_NAN    = 0;           // below all floats
static constexpr uint32_t ALLOCMOE_KEY_LOWEST = 0x007fffffu; // of -infinity

// Sum of first(0..n_first - 1) and value(n_first..n - 1), in parts that do not wait for each other.
template <typename F, typename G>
ALLOCMOE_FN auto allocmoe_sum(int64_t n_first, F first, int64_t n, G value) {
    decltype(value(0)) parts[8] = {};
    int64_t i                   = 0;
    for (; i + 8 <= n_first; i += 8) {
        for (int64_t j = 0; j < 8; ++j) {
            parts[j] += first(i + j);
        }
    }
    if (i < n_first && i + 8 <= n) {
        for (int64_t j = 0; j < 8; ++j) {
            parts[j] += i + j < n_first ? first(i + j) : value(i + j);
        }
        i += 8;
    }
    for (; i + 8 <= n; i += 8) {
        for (int64_t j = 0; j < 8; ++j) {
            parts[j] += value(i + j);
        }
    }
    for (; i < n; ++i) {
        parts[0] += i < n_first ? first(i) : value(i);
    }
    decltype(value(0)) sum = 0;
    for (int64_t j = 0; j < 8; ++j) {
        sum += parts[j];
    }
    return sum;
}

template <typename F>
ALLOCMOE_FN auto allocmoe_sum(int64_t n, F value) {
    return allocmoe_sum(n, value, n, value);
}

//
// rules that go by scores
//

struct allocmoe_route_args {
    const int32_t * ids;           // [n_tokens][n_used], by falling score
    const float * scores;          // [n_tokens][n_expert]
    const allocmoe_limit * limits; // [n_tokens]
    const allocmoe_place * places; // [n_tokens]
    int32_t * routed;              // [n_tokens][n_used], contiguous
    int64_t stride_ids;            // between tokens, in elements
    int64_t stride_scores;
    int32_t n_used;
    int32_t n_tokens;
    allocmoe_node node;
};

// one block's shared memory
struct allocmoe_route_shared {
    int32_t histogram[256];
    int32_t taken[ALLOCMOE_MAX_BLOCK];
    int32_t sharing[ALLOCMOE_MAX_BLOCK]; // tokens that share, by their count
    uint32_t cut;
    int32_t n_left;
    int32_t total;
};

// The value of an expert from its score, for a token's experts one after the other by rank. `state` is what the better ones
// leave: the best score, or the probability that remains.
ALLOCMOE_FN float allocmoe_next_value(int32_t value, float score, bool first, float & state) {
    if (value == ALLOCMOE_NODE_VALUE_RELATIVE) {
        state = first ? score : state;
        return state > 0.0f ? ALLOCMOE_DIV(score, state) : 0.0f;
    }
    if (value == ALLOCMOE_NODE_VALUE_REMAINING) {
        const float remaining = first ? 1.0f : state;
        state                 = ALLOCMOE_SUB(remaining, score);
        return remaining;
    }
    return score;
}

// What is left over before token t, given what is after token t - 1: read only where a sequence begins or goes on, since the
// memory may be the host's.
ALLOCMOE_FN float allocmoe_left(const allocmoe_node & node, const allocmoe_place * places, int32_t t, float left) {
    if (node.strict == ALLOCMOE_NODE_STRICT_ALONE || places[t].before < 0) {
        return 0.0f;
    }
    return t > 0 && places[t].before == places[t - 1].own ? left : node.spent->left[places[t].before];
}

ALLOCMOE_FN void allocmoe_leave(const allocmoe_node & node, const allocmoe_place * places, int32_t t, float left) {
    if (node.strict != ALLOCMOE_NODE_STRICT_ALONE && places[t].own >= 0) {
        node.spent->left[places[t].own] = left;
    }
}

// Notes what token t has spent.
ALLOCMOE_FN void allocmoe_note_kept(const allocmoe_node & node, const allocmoe_place * places, int32_t t, int32_t n_kept) {
    if (places[t].own >= 0) {
        node.spent->kept[places[t].own] = (uint16_t) (n_kept + 1);
    }
}

// A token's count, of n_used candidates.
ALLOCMOE_FN int32_t allocmoe_count(const allocmoe_limit & limit, int32_t n_used) {
    return limit.k < n_used ? (int32_t) limit.k : n_used;
}

ALLOCMOE_FN int32_t * allocmoe_row_of(int32_t * routed, int32_t t, int32_t n_used) {
    return routed + (int64_t) t * n_used;
}

// In `routed`, a token's places first hold the keys of its values; then its first place, whose expert every rule keeps, how
// many it keeps. All of a token is one thread's.
ALLOCMOE_FN void allocmoe_to_keys(const allocmoe_route_args & a, int32_t t, uint32_t nan) {
    const int32_t * ids  = a.ids + t * a.stride_ids;
    const float * scores = a.scores + t * a.stride_scores;
    int32_t * keys       = allocmoe_row_of(a.routed, t, a.n_used);
    float state          = 0.0f;
    for (int32_t r = 0; r < a.n_used; ++r) {
        const float value = allocmoe_next_value(a.node.value, scores[ids[r]], r == 0, state);
        keys[r]           = (int32_t) (allocmoe_is_nan(value) ? nan : allocmoe_key(value));
    }
}

template <class Block>
ALLOCMOE_FN void allocmoe_keep_by_threshold(Block & block, const allocmoe_route_args & a, allocmoe_route_shared & s) {
    for (int32_t t = block.rank(); t < a.n_tokens; t += block.size()) {
        allocmoe_to_keys(a, t, ALLOCMOE_KEY_NAN);
        int32_t * keys           = allocmoe_row_of(a.routed, t, a.n_used);
        const int32_t k          = allocmoe_count(a.limits[t], a.n_used);
        const uint32_t threshold = allocmoe_key(a.limits[t].threshold);
        int32_t n                = k < a.node.k_base ? k : a.node.k_base;
        while (n < a.n_used && (uint32_t) keys[n] >= threshold) {
            n++;
        }
        keys[0] = n;
        if (!a.node.strict) {
            block.add(&s.total, n);
        }
    }
    if (!a.node.strict) {
        return;
    }

    // what a token may spend depends on all tokens before it
    block.sync();
    if (block.rank() == 0) {
        float left = 0.0f;
        for (int32_t t = 0; t < a.n_tokens; ++t) {
            left                 = allocmoe_left(a.node, a.places, t, left);
            int32_t & kept       = *allocmoe_row_of(a.routed, t, a.n_used);
            const int32_t k      = allocmoe_count(a.limits[t], a.n_used);
            const int32_t k_base = k < a.node.k_base ? k : a.node.k_base;
            int32_t allowed      = left + k < a.n_used ? (int32_t) (left + k) : a.n_used;
            allowed              = allowed > k_base ? allowed : k_base;
            kept                 = kept < allowed ? kept : allowed;
            left += k - kept;
            s.total += kept;
            allocmoe_leave(a.node, a.places, t, left);
        }
    }
}

// Whether a token with this count shares: with k_base or fewer, or all, it keeps exactly those.
ALLOCMOE_FN bool allocmoe_shares(const allocmoe_route_args & a, int32_t k) {
    return k > a.node.k_base && k < a.n_used;
}

// For the tokens with count k: the n_chosen highest of their pool, by radix selection of the lowest key that is chosen; of
// equal ones the better rank, then the earlier token.
template <class Block>
ALLOCMOE_FN void allocmoe_choose(Block & block, const allocmoe_route_args & a, allocmoe_route_shared & s, int32_t k, int32_t n_chosen) {
    const int32_t k_base = a.node.k_base;
    block.sync();
    if (block.rank() == 0) {
        s.cut    = 0;
        s.n_left = n_chosen;
    }
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = block.rank(); i < 256; i += block.size()) {
            s.histogram[i] = 0;
        }
        block.sync();
        const uint32_t above = shift == 24 ? 0 : s.cut >> (shift + 8);
        for (int32_t t = block.rank(); t < a.n_tokens; t += block.size()) {
            const int32_t * keys = allocmoe_row_of(a.routed, t, a.n_used);
            for (int32_t r = k_base; r < a.n_used && allocmoe_count(a.limits[t], a.n_used) == k; ++r) {
                const uint32_t key = keys[r];
                if (shift == 24 || key >> (shift + 8) == above) {
                    block.add(&s.histogram[key >> shift & 255], 1);
                }
            }
        }
        block.sync();
        if (block.rank() == 0) {
            int digit = 255;
            while (s.n_left > s.histogram[digit]) {
                s.n_left -= s.histogram[digit--];
            }
            s.cut |= (uint32_t) digit << shift;
        }
        block.sync();
    }

    const uint32_t cut = s.cut;
    int32_t n_left     = s.n_left;
    for (int32_t t = block.rank(); t < a.n_tokens; t += block.size()) {
        int32_t * keys = allocmoe_row_of(a.routed, t, a.n_used);
        int32_t n      = k_base;
        if (allocmoe_count(a.limits[t], a.n_used) != k) {
            continue;
        }
        for (int32_t r = k_base; r < a.n_used; ++r) {
            n += (uint32_t) keys[r] > cut;
        }
        keys[0] = n;
    }
    for (int32_t r = k_base; r < a.n_used && n_left > 0; ++r) {
        for (int32_t t0 = 0; t0 < a.n_tokens && n_left > 0; t0 += block.size()) {
            const int32_t t       = t0 + block.rank();
            bool take             = t < a.n_tokens && allocmoe_count(a.limits[t], a.n_used) == k &&
                                    (uint32_t) allocmoe_row_of(a.routed, t, a.n_used)[r] == cut;
            const int32_t n_equal = block.count(take);
            if (n_equal > n_left) {
                s.taken[block.rank()] = take;
                block.sync();
                if (block.rank() == 0) {
                    for (int i = 0, n = n_left; i < block.size(); ++i) {
                        s.taken[i] = s.taken[i] && n-- > 0;
                    }
                }
                block.sync();
                take = s.taken[block.rank()];
            }
            if (take) {
                ++*allocmoe_row_of(a.routed, t, a.n_used);
            }
            n_left -= n_equal;
        }
    }
}

// Tokens with the same count share what it leaves beyond k_base, so that sequences with budgets of their own spend those. A
// NaN counts as -infinity.
template <class Block>
ALLOCMOE_FN void allocmoe_keep_by_batch(Block & block, const allocmoe_route_args & a, allocmoe_route_shared & s) {
    if (a.n_tokens == 1) { // with nobody to share
        if (block.rank() == 0) {
            s.total = a.routed[0] = allocmoe_count(a.limits[0], a.n_used);
        }
        return;
    }
    for (int32_t k = block.rank(); k < a.n_used; k += block.size()) {
        s.sharing[k] = 0;
    }
    block.sync();
    for (int32_t t = block.rank(); t < a.n_tokens; t += block.size()) {
        const int32_t k = allocmoe_count(a.limits[t], a.n_used);
        block.add(&s.total, k);
        if (allocmoe_shares(a, k)) {
            block.add(&s.sharing[k], 1);
            allocmoe_to_keys(a, t, ALLOCMOE_KEY_LOWEST);
        } else {
            *allocmoe_row_of(a.routed, t, a.n_used) = k;
        }
    }
    block.sync();
    for (int32_t k = a.node.k_base + 1; k < a.n_used; ++k) {
        if (s.sharing[k] > 0) {
            allocmoe_choose(block, a, s, k, s.sharing[k] * (k - a.node.k_base));
        }
    }
}

// ALLOCMOE_NODE_IDS, by one block.
template <class Block>
ALLOCMOE_FN void allocmoe_route(Block & block, const allocmoe_route_args & a, allocmoe_route_shared & s) {
    if (block.rank() == 0) {
        s.total = 0;
    }
    block.sync();
    if (a.node.rule == ALLOCMOE_NODE_RULE_BATCH) {
        allocmoe_keep_by_batch(block, a, s);
    } else {
        allocmoe_keep_by_threshold(block, a, s);
    }
    block.sync();
    for (int32_t t = block.rank(); t < a.n_tokens; t += block.size()) {
        int32_t * out        = allocmoe_row_of(a.routed, t, a.n_used);
        const int32_t n_kept = out[0];
        for (int32_t r = 0; r < a.n_used; ++r) {
            out[r] = r < n_kept ? a.ids[t * a.stride_ids + r] : -1;
        }
        allocmoe_note_kept(a.node, a.places, t, n_kept);
    }
    if (block.rank() == 0) {
        a.node.spent->activations[a.node.phase] += s.total;
    }
}

//
// the rule that goes by estimates
//

// One of a token's experts, where those that are not in memory have to be larger than the others.
struct allocmoe_absent {
    bool is;       // not at hand
    bool left_out; // for that alone
};

struct allocmoe_estimate_args {
    const int32_t * ids;           // [n_tokens][n_used], by falling score
    const float * weights;         // [n_tokens][n_used]
    const float * reduced;         // [n_tokens][n_down], u
    const float * table;           // [n_expert][n_down + 1], log_norm; or [n_expert][rank], output
    const allocmoe_limit * limits; // [n_tokens]
    const allocmoe_place * places; // [n_tokens]
    int32_t * routed;              // [n_tokens][n_used], contiguous; written by allocmoe_route_by_size, read by the other
    allocmoe_absent * absent;      // [n_tokens][n_used], or null where all are at hand
    float miss_threshold;          // for experts not at hand, if the token's own is not higher
    float miss_handicap;           // added to either
    int64_t * n_absent;            // skipped for being absent: counted where `absent` is not null, which is by one thread
    float * skipped;               // [n_tokens][n_columns], contiguous; written by allocmoe_sum_skipped
    int64_t stride_ids;            // between tokens, in elements
    int64_t stride_weights;
    int64_t stride_weights_rank; // between ranks
    int64_t stride_reduced;
    int64_t stride_table; // between experts
    int32_t n_used;
    int32_t n_tokens;
    int32_t n_down;
    int32_t rank;
    int32_t n_columns;
    allocmoe_node node;
};

// one block's shared memory
struct allocmoe_estimate_shared {
    int32_t total;
    float parts[ALLOCMOE_MAX_BLOCK];
};

ALLOCMOE_FN float allocmoe_weight_of(const allocmoe_estimate_args & a, int32_t t, int32_t r) {
    return a.weights[t * a.stride_weights + r * a.stride_weights_rank];
}

// log_norm_e . (u, 1) without the 1, lane by lane of n_lanes
ALLOCMOE_FN float allocmoe_size_part(const allocmoe_estimate_args & a, int32_t t, int32_t r, int32_t lane, int32_t n_lanes) {
    const float * u            = a.reduced + t * a.stride_reduced;
    const float * coefficients = a.table + a.ids[t * a.stride_ids + r] * a.stride_table;
    const auto of_lane         = [=](int32_t n) { return (n - lane + n_lanes - 1) / n_lanes; };
    return allocmoe_sum(
        of_lane(a.n_down - a.node.n_relu), [=](int64_t j) { return coefficients[lane + j * n_lanes] * u[lane + j * n_lanes]; },
        of_lane(a.n_down), [=](int64_t j) {
            const float positive = u[lane + j*n_lanes] < 0.0f ? 0.0f : u[lane + j*n_lanes];
            return coefficients[lane + j*n_lanes]*positive; });
}

// v_e from its lanes' parts
ALLOCMOE_FN float allocmoe_size(const allocmoe_estimate_args & a, int32_t t, int32_t r, const float * parts, int32_t n_lanes) {
    const float weight = allocmoe_weight_of(a, t, r);
    const float last   = a.table[a.ids[t * a.stride_ids + r] * a.stride_table + a.n_down];
    float size         = 0.0f;
    for (int32_t i = 0; i < n_lanes; ++i) {
        size += parts[i];
    }
    return logf(weight < 1e-20f ? 1e-20f : weight) + last + size;
}

ALLOCMOE_FN int32_t allocmoe_size_key(float size) {
    return (int32_t) (allocmoe_is_nan(size) ? ALLOCMOE_KEY_NAN : allocmoe_key(size));
}

// The keys of all experts' v_e, in the places of the ids.
template <class Block>
ALLOCMOE_FN void allocmoe_to_size_keys(Block & block, const allocmoe_estimate_args & a, allocmoe_estimate_shared & s) {
    // a single token's experts are few, so each of them has several threads
    const int32_t n = a.n_tokens * a.n_used;
    int32_t n_lanes = 1;
    while (block.size() > 1 && n_lanes < 32 && 2 * n_lanes * n <= block.size() && block.size() % (2 * n_lanes) == 0) {
        n_lanes *= 2;
    }
    const int32_t lane = block.rank() % n_lanes;
    for (int32_t i0 = 0; i0 < n; i0 += block.size() / n_lanes) {
        const int32_t i       = i0 + block.rank() / n_lanes;
        s.parts[block.rank()] = i < n ? allocmoe_size_part(a, i / a.n_used, i % a.n_used, lane, n_lanes) : 0.0f;
        block.sync();
        if (lane == 0 && i < n) {
            const float size = allocmoe_size(a, i / a.n_used, i % a.n_used, s.parts + block.rank(), n_lanes);
            a.routed[i]      = allocmoe_size_key(size);
        }
        block.sync();
    }
}

// For one token, from its experts' keys: whichever are not below allocmoe_key(at_least) afterwards are kept. Those of at
// least that size are, and the largest of the others up to k_base in all. Returns how many.
ALLOCMOE_FN int32_t allocmoe_keep_by_size(int32_t * keys, int32_t n_used, int32_t k_base, float at_least) {
    const uint32_t threshold = allocmoe_key(at_least);
    int32_t n                = 0;
    for (int32_t r = 0; r < n_used; ++r) {
        n += (uint32_t) keys[r] >= threshold;
    }
    for (; n < k_base && n < n_used; ++n) {
        int32_t best = -1;
        for (int32_t r = 0; r < n_used; ++r) {
            if ((uint32_t) keys[r] < threshold && (best < 0 || (uint32_t) keys[r] > (uint32_t) keys[best])) {
                best = r;
            }
        }
        keys[best] = -1; // the highest key
    }
    return n;
}

// The keys of those of token t's experts that are not worth being read become lower than those of all numbers, in the same order.
ALLOCMOE_FN void allocmoe_leave_absent(const allocmoe_estimate_args & a, int32_t t, float at_least) {
    int32_t * keys         = allocmoe_row_of(a.routed, t, a.n_used);
    const uint32_t to_read = allocmoe_key((at_least < a.miss_threshold ? a.miss_threshold : at_least) + a.miss_handicap);
    for (int32_t r = 0; r < a.n_used; ++r) {
        allocmoe_absent & absent = a.absent[(int64_t) t * a.n_used + r];
        if (absent.is && (uint32_t) keys[r] < to_read) {
            absent.left_out = (uint32_t) keys[r] >= allocmoe_key(at_least);
            keys[r]         = (int32_t) ((uint32_t) keys[r] >> 9); // the highest is below ALLOCMOE_KEY_LOWEST then
        }
    }
}

// The same as allocmoe_keep_by_size for token t, whose keys become ids.
ALLOCMOE_FN int32_t allocmoe_route_token_by_size(const allocmoe_estimate_args & a, int32_t t, float at_least) {
    int32_t * out = allocmoe_row_of(a.routed, t, a.n_used);
    if (a.absent) {
        allocmoe_leave_absent(a, t, at_least);
    }
    const int32_t n = allocmoe_keep_by_size(out, a.n_used, a.node.k_base, at_least);
    for (int32_t r = 0; r < a.n_used; ++r) {
        const bool kept = (uint32_t) out[r] >= allocmoe_key(at_least);
        if (a.absent) {
            *a.n_absent += a.absent[(int64_t) t * a.n_used + r].left_out && !kept;
        }
        out[r] = kept ? a.ids[t * a.stride_ids + r] : -1;
    }
    allocmoe_note_kept(a.node, a.places, t, n);
    return n;
}

// ALLOCMOE_NODE_IDS_BY_SIZE, by one block.
template <class Block>
ALLOCMOE_FN void allocmoe_route_by_size(Block & block, const allocmoe_estimate_args & a, allocmoe_estimate_shared & s) {
    if (block.rank() == 0) {
        s.total = 0;
    }
    block.sync();
    allocmoe_to_size_keys(block, a, s);

    if (!a.node.strict) {
        for (int32_t t = block.rank(); t < a.n_tokens; t += block.size()) {
            block.add(&s.total, allocmoe_route_token_by_size(a, t, a.limits[t].threshold));
        }
        block.sync();
    } else if (block.rank() == 0) {
        // what a token may spend depends on all tokens before it
        float left = 0.0f;
        for (int32_t t = 0; t < a.n_tokens; ++t) {
            left            = allocmoe_left(a.node, a.places, t, left);
            const int32_t n = allocmoe_route_token_by_size(a, t, ALLOCMOE_SUB(a.limits[t].threshold, ALLOCMOE_STRICT_STEP * left));
            // without a threshold there is none to move
            left += allocmoe_key(a.limits[t].threshold) > ALLOCMOE_KEY_LOWEST ? allocmoe_count(a.limits[t], a.n_used) - n : 0;
            left = left < -ALLOCMOE_STRICT_LEFT ? -ALLOCMOE_STRICT_LEFT : left > ALLOCMOE_STRICT_LEFT ? ALLOCMOE_STRICT_LEFT
                                                                                                      : left;
            s.total += n;
            allocmoe_leave(a.node, a.places, t, left);
        }
    }
    if (block.rank() == 0) {
        a.node.spent->activations[a.node.phase] += s.total;
    }
}

// ALLOCMOE_NODE_SKIPPED for token t, by one block: the estimate of what it skips, in the rows of `up`.
template <class Block>
ALLOCMOE_FN void allocmoe_sum_skipped(Block & block, const allocmoe_estimate_args & a, int32_t t) {
    const int32_t * ids    = a.ids + t * a.stride_ids;
    const int32_t * routed = a.routed + (int64_t) t * a.n_used;
    const float * u        = a.reduced + t * a.stride_reduced;
    float * out            = a.skipped + (int64_t) t * a.n_columns;
    for (int32_t i = block.rank(); i < a.n_columns; i += block.size()) {
        out[i] = 0.0f;
    }
    for (int32_t r = 0; r < a.n_used; ++r) {
        if (routed[r] >= 0) {
            continue;
        }
        const float weight   = allocmoe_weight_of(a, t, r);
        const float * output = a.table + ids[r] * a.stride_table;
        for (int32_t i = block.rank(); i < a.rank; i += block.size()) {
            out[i] += weight * (output[i] + u[i]);
        }
    }
    // what float16 cannot hold may have become infinite already: then no estimate
    bool too_large = false;
    for (int32_t i = block.rank(); i < a.rank; i += block.size()) {
        too_large = too_large || (allocmoe_bits(out[i]) & 0x7fffffffu) >= 0x477fe000u; // 65504, float16's highest
    }
    if (block.count(too_large)) {
        for (int32_t i = block.rank(); i < a.rank; i += block.size()) {
            out[i] = 0.0f;
        }
    }
}

//
// the same for a node of the graph
//

static inline const allocmoe_limit * allocmoe_limits_of(const ggml_tensor * limits, const allocmoe_node & params) {
    return (const allocmoe_limit *) limits->data + params.il * limits->ne[1];
}

static inline const allocmoe_place * allocmoe_places_of(const ggml_tensor * places) {
    return (const allocmoe_place *) places->data;
}

static inline allocmoe_route_args allocmoe_route_args_of(const ggml_tensor * node, const allocmoe_node & params) {
    const ggml_tensor * ids    = node->src[0];
    const ggml_tensor * scores = node->src[1];
    allocmoe_route_args args   = {};
    args.ids                   = (const int32_t *) ids->data;
    args.scores                = (const float *) scores->data;
    args.limits                = allocmoe_limits_of(node->src[2], params);
    args.places                = allocmoe_places_of(node->src[3]);
    args.routed                = (int32_t *) node->data;
    args.stride_ids            = ids->nb[1] / sizeof(int32_t);
    args.stride_scores         = scores->nb[1] / sizeof(float);
    args.n_used                = node->ne[0];
    args.n_tokens              = node->ne[1];
    args.node                  = params;
    return args;
}

// What both nodes and the instrument go by; `table` is log_norm or output.
static inline allocmoe_estimate_args allocmoe_estimate_args_of(
    const ggml_tensor * ids, const ggml_tensor * weights, const ggml_tensor * reduced, const ggml_tensor * table) {
    allocmoe_estimate_args args = {};
    args.ids                    = (const int32_t *) ids->data;
    args.weights                = (const float *) weights->data;
    args.reduced                = (const float *) reduced->data;
    args.table                  = (const float *) table->data;
    args.stride_ids             = ids->nb[1] / sizeof(int32_t);
    args.stride_weights         = weights->nb[2] / sizeof(float);
    args.stride_weights_rank    = weights->nb[1] / sizeof(float);
    args.stride_reduced         = reduced->nb[1] / sizeof(float);
    args.stride_table           = table->nb[1] / sizeof(float);
    args.n_used                 = ids->ne[0];
    args.n_tokens               = ids->ne[1];
    args.n_down                 = reduced->ne[0];
    args.rank                   = table->ne[0];
    return args;
}

static inline allocmoe_estimate_args allocmoe_estimate_args_of(const ggml_tensor * node, const allocmoe_node & params) {
    const bool skipped = params.kind == ALLOCMOE_NODE_SKIPPED;
    auto args          = allocmoe_estimate_args_of(node->src[0], node->src[1], node->src[2], node->src[skipped ? 4 : 3]);
    args.routed        = (int32_t *) (skipped ? node->src[3] : node)->data;
    args.skipped       = (float *) (skipped ? node->data : nullptr);
    args.limits        = skipped ? nullptr : allocmoe_limits_of(node->src[4], params);
    args.places        = skipped ? nullptr : allocmoe_places_of(node->src[5]);
    args.n_columns     = node->ne[0];
    args.node          = params;
    return args;
}
