// The token rules as one block of threads runs them: the same results as allocmoe_apply_token_rule, bit for bit.
//
// `Block` is a thread's view of its block: rank(), size(), sync(), count(condition) (how many threads it holds for, a
// barrier), and add(address, value) (atomic). On a GPU that is a CUDA block; tests run the same code on CPU threads.
#pragma once

#include "allocmoe-custom.h"

#include <math.h>

#if defined(__CUDACC__) || defined(__HIPCC__) || defined(__MUSACC__)
#define ALLOCMOE_DIV(a, b) __fdiv_rn(a, b)
#define ALLOCMOE_SUB(a, b) __fsub_rn(a, b)
#else
#define ALLOCMOE_DIV(a, b) ((a)/(b))
#define ALLOCMOE_SUB(a, b) ((a) - (b))
#endif

static constexpr int ALLOCMOE_MAX_BLOCK = 1024;

struct allocmoe_route_args {
    const int32_t * ids;           // [n_tokens][n_used], by falling score
    const float   * scores;        // [n_tokens][n_expert]
    const int32_t * positions;     // [n_tokens], null where the node has none
    int32_t       * routed;        // [n_tokens][n_used], contiguous
    int64_t         stride_ids;    // between tokens, in elements
    int64_t         stride_scores;
    int32_t         n_used;
    int32_t         n_tokens;
    allocmoe_node   node;
};

// one block's shared memory
struct allocmoe_route_shared {
    int32_t  histogram[256];
    int32_t  taken[ALLOCMOE_MAX_BLOCK];
    uint32_t cut;
    int32_t  n_left;
    int32_t  total;
};

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

ALLOCMOE_FN float allocmoe_ranked_score(const allocmoe_route_args & a, int32_t t, int32_t r) {
    return a.scores[t*a.stride_scores + a.ids[t*a.stride_ids + r]];
}

// as allocmoe_to_values, rounded as on the CPU whatever the compiler's flags for fast math
ALLOCMOE_FN float allocmoe_ranked_value(const allocmoe_route_args & a, int32_t t, int32_t r) {
    const float score = allocmoe_ranked_score(a, t, r);
    if (a.node.value == ALLOCMOE_NODE_VALUE_RELATIVE) {
        const float best = allocmoe_ranked_score(a, t, 0);
        return best > 0.0f ? ALLOCMOE_DIV(score, best) : 0.0f;
    }
    if (a.node.value == ALLOCMOE_NODE_VALUE_REMAINING) {
        float remaining = 1.0f;
        for (int32_t i = 0; i < r; ++i) {
            remaining = ALLOCMOE_SUB(remaining, allocmoe_ranked_score(a, t, i));
        }
        return remaining;
    }
    return score;
}

// as in apply_batch, a NaN is the lowest value
ALLOCMOE_FN uint32_t allocmoe_pool_key(const allocmoe_route_args & a, int32_t t, int32_t r) {
    const float value = allocmoe_ranked_value(a, t, r);
    return allocmoe_is_nan(value) ? 0x007fffffu /* -infinity */ : allocmoe_key(value);
}

// What is left over before token t, given what is after token t - 1: read only where a sequence begins or goes on, since the
// memory may be the host's.
ALLOCMOE_FN float allocmoe_left(const allocmoe_spent & spent, const int32_t * positions, int32_t t, float left) {
    if (!positions) {
        return 0.0f;
    }
    return t > 0 && positions[t] == positions[t - 1] + 1 ? left : allocmoe_left_before(spent, positions[t]);
}

// Below, a token's first place in `routed` holds how many experts it keeps; all of a token is one thread's.

template <class Block>
ALLOCMOE_FN void allocmoe_keep_by_threshold(Block & block, const allocmoe_route_args & a, allocmoe_route_shared & s) {
    const uint32_t threshold = allocmoe_key(a.node.threshold);
    for (int32_t t = block.rank(); t < a.n_tokens; t += block.size()) {
        int32_t n = a.node.k_base;
        while (n < a.n_used) {
            const float value = allocmoe_ranked_value(a, t, n);
            if (allocmoe_is_nan(value) || allocmoe_key(value) < threshold) {
                break;
            }
            n++;
        }
        a.routed[(int64_t) t*a.n_used] = n;
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
            left = allocmoe_left(*a.node.spent, a.positions, t, left);
            int32_t & kept = a.routed[(int64_t) t*a.n_used];
            int32_t allowed = left + a.node.k < a.n_used ? (int32_t) (left + a.node.k) : a.n_used;
            allowed = allowed > a.node.k_base ? allowed : a.node.k_base;
            kept    = kept < allowed ? kept : allowed;
            left   += a.node.k - kept;
            s.total += kept;
            if (a.positions) {
                allocmoe_leave(*a.node.spent, a.positions[t], left);
            }
        }
    }
}

// The n_chosen highest of the pool, by radix selection of the lowest key that is chosen; of equal ones the better rank, then
// the earlier token.
template <class Block>
ALLOCMOE_FN void allocmoe_keep_by_batch(Block & block, const allocmoe_route_args & a, allocmoe_route_shared & s) {
    const int32_t k_base   = a.node.k_base;
    const int32_t n_chosen = a.n_tokens*(a.node.k - k_base);
    if (block.rank() == 0) {
        s.cut    = 0;
        s.n_left = n_chosen;
        s.total  = a.n_tokens*a.node.k;
    }
    for (int shift = 24; shift >= 0 && n_chosen > 0; shift -= 8) {
        for (int i = block.rank(); i < 256; i += block.size()) {
            s.histogram[i] = 0;
        }
        block.sync();
        const uint32_t above = shift == 24 ? 0 : s.cut >> (shift + 8);
        for (int32_t t = block.rank(); t < a.n_tokens; t += block.size()) {
            for (int32_t r = k_base; r < a.n_used; ++r) {
                const uint32_t key = allocmoe_pool_key(a, t, r);
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

    const uint32_t cut    = n_chosen > 0 ? s.cut    : 0xffffffffu;
    int32_t        n_left = n_chosen > 0 ? s.n_left : 0;
    for (int32_t t = block.rank(); t < a.n_tokens; t += block.size()) {
        int32_t n = k_base;
        for (int32_t r = k_base; r < a.n_used; ++r) {
            n += allocmoe_pool_key(a, t, r) > cut;
        }
        a.routed[(int64_t) t*a.n_used] = n;
    }
    for (int32_t r = k_base; r < a.n_used && n_left > 0; ++r) {
        for (int32_t t0 = 0; t0 < a.n_tokens && n_left > 0; t0 += block.size()) {
            const int32_t t = t0 + block.rank();
            bool take = t < a.n_tokens && allocmoe_pool_key(a, t, r) == cut;
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
                a.routed[(int64_t) t*a.n_used]++;
            }
            n_left -= n_equal;
        }
    }
}

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
        int32_t     * out    = a.routed + (int64_t) t*a.n_used;
        const int32_t n_kept = out[0];
        for (int32_t r = 0; r < a.n_used; ++r) {
            out[r] = r < n_kept ? a.ids[t*a.stride_ids + r] : -1;
        }
    }
    if (block.rank() == 0) {
        a.node.spent->activations[a.node.phase] += s.total;
    }
}

// Of a node under ALLOCMOE_RULE_ESTIMATE.
struct allocmoe_estimate_args {
    const int32_t * ids;      // [n_tokens][n_used], by falling score
    const float   * weights;  // [n_tokens][n_used]
    const float   * reduced;  // [n_tokens][n_down], u
    const float   * table;    // [n_expert][n_down + 1], log_norm; or [n_expert][rank], output
    const int32_t * positions; // [n_tokens], null where the node has none
    int32_t       * routed;   // [n_tokens][n_used], contiguous; written by allocmoe_route_by_size, read by the other
    float         * skipped;  // [n_tokens][n_columns], contiguous; written by allocmoe_sum_skipped
    int64_t         stride_ids; // between tokens, in elements
    int64_t         stride_weights;
    int64_t         stride_weights_rank; // between ranks
    int64_t         stride_reduced;
    int64_t         stride_table; // between experts
    int32_t         n_used;
    int32_t         n_tokens;
    int32_t         n_down;
    int32_t         rank;
    int32_t         n_columns;
    allocmoe_node   node;
};

ALLOCMOE_FN float allocmoe_weight(const allocmoe_estimate_args & a, int32_t t, int32_t r) {
    return a.weights[t*a.stride_weights + r*a.stride_weights_rank];
}

struct allocmoe_estimate_shared {
    int32_t total;
    float   parts[ALLOCMOE_MAX_BLOCK];
};

// What one of n_lanes threads adds to v_e.
ALLOCMOE_FN float allocmoe_size_part(const allocmoe_estimate_args & a, int32_t t, int32_t r, int32_t lane, int32_t n_lanes) {
    const float * u            = a.reduced + t*a.stride_reduced;
    const float * coefficients = a.table + a.ids[t*a.stride_ids + r]*a.stride_table;
    float part = 0.0f;
    if (lane == 0) {
        const float weight = allocmoe_weight(a, t, r);
        part = logf(weight > 1e-20f ? weight : 1e-20f) + coefficients[a.n_down];
    }
    for (int32_t i = lane; i < a.n_down; i += n_lanes) {
        part += coefficients[i]*allocmoe_rectified(u, i, a.n_down, a.node.n_relu);
    }
    return part;
}

// v_e of all experts, ordered as integers, 0 for NaN, which is below all: in the places of the ids.
template <class Block>
ALLOCMOE_FN void allocmoe_to_size_keys(Block & block, const allocmoe_estimate_args & a, allocmoe_estimate_shared & s) {
    // a single token's experts are few, so each of them has several threads
    const int32_t n = a.n_tokens*a.n_used;
    int32_t n_lanes = 1;
    while (n_lanes < 32 && 2*n_lanes*n <= block.size() && block.size() % (2*n_lanes) == 0) {
        n_lanes *= 2;
    }
    const int32_t lane = block.rank() % n_lanes;
    for (int32_t i0 = 0; i0 < n; i0 += block.size()/n_lanes) {
        const int32_t i = i0 + block.rank()/n_lanes;
        s.parts[block.rank()] = i < n ? allocmoe_size_part(a, i/a.n_used, i%a.n_used, lane, n_lanes) : 0.0f;
        block.sync();
        if (lane == 0 && i < n) {
            float size = 0.0f;
            for (int32_t j = 0; j < n_lanes; ++j) {
                size += s.parts[block.rank() + j];
            }
            a.routed[i] = (int32_t) (allocmoe_is_nan(size) ? 0 : allocmoe_key(size));
        }
        block.sync();
    }
}

// allocmoe_apply_estimate for a token whose keys are in `out`, which becomes its ids. Returns how many it keeps.
ALLOCMOE_FN int32_t allocmoe_keep_by_size(const allocmoe_estimate_args & a, int32_t t, float at_least) {
    const uint32_t threshold = allocmoe_key(at_least);
    int32_t * out = a.routed + (int64_t) t*a.n_used;
    int32_t   n   = 0;
    for (int32_t r = 0; r < a.n_used; ++r) {
        n += (uint32_t) out[r] >= threshold;
    }
    for (; n < a.node.k_base; ++n) {
        int32_t best = -1;
        for (int32_t r = 0; r < a.n_used; ++r) {
            if ((uint32_t) out[r] < threshold && (best < 0 || (uint32_t) out[r] > (uint32_t) out[best])) {
                best = r;
            }
        }
        out[best] = -1; // the highest key
    }
    for (int32_t r = 0; r < a.n_used; ++r) {
        out[r] = (uint32_t) out[r] >= threshold ? a.ids[t*a.stride_ids + r] : -1;
    }
    return n;
}

// One block's work: compute_routed_by_size.
template <class Block>
ALLOCMOE_FN void allocmoe_route_by_size(Block & block, const allocmoe_estimate_args & a, allocmoe_estimate_shared & s) {
    if (block.rank() == 0) {
        s.total = 0;
    }
    allocmoe_to_size_keys(block, a, s);

    if (!a.node.strict) {
        for (int32_t t = block.rank(); t < a.n_tokens; t += block.size()) {
            block.add(&s.total, allocmoe_keep_by_size(a, t, a.node.threshold));
        }
        block.sync();
    } else if (block.rank() == 0) {
        // what a token may spend depends on all tokens before it
        float left = 0.0f;
        for (int32_t t = 0; t < a.n_tokens; ++t) {
            left = allocmoe_left(*a.node.spent, a.positions, t, left);
            const int32_t n = allocmoe_keep_by_size(a, t, ALLOCMOE_SUB(a.node.threshold, ALLOCMOE_STRICT_STEP*left));
            left  += a.node.k - n;
            left   = left < -ALLOCMOE_STRICT_LEFT ? -ALLOCMOE_STRICT_LEFT : left > ALLOCMOE_STRICT_LEFT ? ALLOCMOE_STRICT_LEFT : left;
            s.total += n;
            if (a.positions) {
                allocmoe_leave(*a.node.spent, a.positions[t], left);
            }
        }
    }
    if (block.rank() == 0) {
        a.node.spent->activations[a.node.phase] += s.total;
    }
}

// One block's work for one token, of n_columns threads: compute_skipped.
template <class Block>
ALLOCMOE_FN void allocmoe_sum_skipped(Block & block, const allocmoe_estimate_args & a, int32_t t) {
    const int32_t i = block.rank();
    float sum = 0.0f;
    if (i < a.rank) {
        const float u = a.reduced[t*a.stride_reduced + i];
        for (int32_t r = 0; r < a.n_used; ++r) {
            if (a.routed[(int64_t) t*a.n_used + r] < 0) {
                sum += allocmoe_weight(a, t, r)*(a.table[a.ids[t*a.stride_ids + r]*a.stride_table + i] + u);
            }
        }
    }
    const bool too_large = (allocmoe_bits(sum) & 0x7fffffffu) >= 0x477fe000u; // 65504, float16's highest
    a.skipped[(int64_t) t*a.n_columns + i] = block.count(too_large) ? 0.0f : sum;
}
