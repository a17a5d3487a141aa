#version 450

// ALLOCMOE_NODE_IDS: ids by rank, -1 where a rule that goes by scores skips.

layout(push_constant) uniform parameter {
    uint n_used;
    uint n_tokens;
    uint ids_offset; // in elements, as the rest
    uint ids_stride; // between tokens
    uint scores_offset;
    uint scores_stride;
    uint limits_offset; // of this layer
    uint places_offset;
    uint routed_offset;
    uint activations_offset; // of this layer and phase
    uint left_offset;
    uint kept_offset;
    int rule;
    int value;
    int k_base;
    int strict;
} p;

#include "allocmoe-rules.glsl"

layout(binding = 0) readonly buffer Ids { int ids[]; };
layout(binding = 1) readonly buffer Scores { uint scores[]; }; // floats
layout(binding = 2) readonly buffer Limits { vec2 limits[]; };
layout(binding = 3) readonly buffer Places { ivec2 places[]; };
layout(binding = 4) buffer Routed { int routed[]; };
#define SPENT_BINDING 5
#include "allocmoe-spent.glsl"

const int MAX_USED = 1024;

shared int histogram[256];
shared int taken[BLOCK];
shared int sharing[MAX_USED]; // tokens that share, by their count
shared uint cut;
shared int n_left;
shared int total;
shared int counter;

// a token's line of what strict rules leave over, see scan_strict()
shared float added[2][BLOCK];
shared float least[2][BLOCK];
shared float carried;
shared bool in_order;
shared int wanted[BLOCK];
shared int counts[BLOCK];
shared ivec2 own_places[BLOCK];

#define rank gl_LocalInvocationID.x

uint row_of(uint t) {
    return p.routed_offset + t * p.n_used;
}

int block_count(bool condition) {
    if (rank == 0u) {
        counter = 0;
    }
    barrier();
    if (condition) {
        atomicAdd(counter, 1);
    }
    barrier();
    const int n = counter;
    barrier();
    return n;
}

uint next_value(uint score, bool first, inout uint state) {
    if (p.value == VALUE_RELATIVE) {
        state = first ? score : state;
        return int(state) > 0 && !is_nan(state) ? divided(score, state) : 0u;
    }
    if (p.value == VALUE_REMAINING) {
        const uint remaining = first ? FLOAT_ONE : state;
        state                = subtracted(remaining, score);
        return remaining;
    }
    return score;
}

void to_keys(uint t, uint nan) {
    uint state = 0u;
    for (uint r = 0u; r < p.n_used; ++r) {
        const int id     = ids[p.ids_offset + t * p.ids_stride + r];
        const uint value = next_value(scores[p.scores_offset + t * p.scores_stride + uint(id)], r == 0u, state);
        routed[row_of(t) + r] = int(is_nan(value) ? nan : key_of(value));
    }
}

void finish(uint t, int n_kept, int place) {
    for (uint r = 0u; r < p.n_used; ++r) {
        routed[row_of(t) + r] = int(r) < n_kept ? ids[p.ids_offset + t * p.ids_stride + r] : -1;
    }
    note_kept(place, n_kept);
}

// What token t keeps by its threshold alone.
int above_threshold(uint t, vec2 limit, int k) {
    to_keys(t, KEY_NAN);
    const uint threshold = key_of(floatBitsToUint(limit.y));
    int n                = min(k, p.k_base);
    while (n < int(p.n_used) && uint(routed[row_of(t) + uint(n)]) >= threshold) {
        ++n;
    }
    return n;
}

int allowed_of(float left, int k) {
    const int allowed = left + float(k) < float(p.n_used) ? int(left + float(k)) : int(p.n_used);
    return max(allowed, min(k, p.k_base));
}

float left_before(int place) {
    return p.strict == STRICT_ALONE || place < 0 ? 0.0 : left_at[p.left_offset + uint(place)];
}

// The tokens of a workgroup's width, from t0 on: what each wants, and may have by what the tokens before it have left over.
// One after the other it would be left' = max(left + k - wanted, 0), or the same from what a sequence has left over where
// one begins or goes on. Such functions add up to such functions: that many steps become log of it.
void scan_strict(uint t0) {
    const uint t      = t0 + rank;
    const bool here   = t < p.n_tokens;
    const vec2 limit  = here ? limit_of(t) : vec2(0.0);
    const int k       = here ? count_of(limit) : 0;
    const ivec2 place = here ? place_of(t) : ivec2(-1);
    const int want    = here ? above_threshold(t, limit, k) : 0;
    own_places[rank]  = place;
    wanted[rank]      = want;
    counts[rank]      = k;
    if (rank == 0u) {
        in_order = true;
    }
    barrier();
    const bool goes_on = here && t > 0u && place.x >= 0 && p.strict != STRICT_ALONE &&
                         place.x == (rank > 0u ? own_places[max(rank, 1u) - 1u] : place_of(t - 1u)).y;
    if (!goes_on && place.x >= 0 && p.strict != STRICT_ALONE && t != 0u) {
        in_order = false; // from memory, where an earlier token may write
    }
    barrier();

    float left_then;
    if (in_order) {
        const float change  = float(k - want);
        const float start   = here && t == 0u ? left_before(place.x) : 0.0;
        added[0][rank]      = goes_on ? change : -1e9;
        least[0][rank]      = goes_on ? 0.0 : start + float(k) - float(min(want, allowed_of(start, k)));
        uint from           = 0u;
        for (uint step = 1u; step < BLOCK; step *= 2u, from = 1u - from) {
            barrier();
            const float a = added[from][rank];
            const float c = least[from][rank];
            if (rank >= step) {
                added[1u - from][rank] = max(added[from][rank - step] + a, -1e9);
                least[1u - from][rank] = max(least[from][rank - step] + a, c);
            } else {
                added[1u - from][rank] = a;
                least[1u - from][rank] = c;
            }
        }
        barrier();
        const float first = carried;
        left_then         = max(first + added[from][rank], least[from][rank]);
        if (here) {
            const float before = rank > 0u ? max(first + added[from][max(rank, 1u) - 1u], least[from][max(rank, 1u) - 1u]) : first;
            const int n_kept   = min(want, allowed_of(goes_on ? before : start, k));
            atomicAdd(total, n_kept);
            finish(t, n_kept, place.y);
        }
        barrier();
        if (t == min(t0 + BLOCK, p.n_tokens) - 1u) {
            carried = left_then;
        }
    } else {
        if (rank == 0u) {
            for (uint i = 0u; i < BLOCK && t0 + i < p.n_tokens; ++i) {
                const ivec2 at   = own_places[i];
                const int before = i > 0u ? own_places[max(i, 1u) - 1u].y : t0 > 0u ? place_of(t0 - 1u).y
                                                                                    : -2;
                const float left = at.x >= 0 && at.x == before ? carried : left_before(at.x);
                const int n_kept = min(wanted[i], allowed_of(left, counts[i]));
                carried          = left + float(counts[i] - n_kept);
                wanted[i]        = n_kept;
                total += n_kept;
                if (at.y >= 0) {
                    left_at[p.left_offset + uint(at.y)] = carried;
                }
            }
        }
        barrier();
        if (here) {
            finish(t, wanted[rank], place.y);
        }
    }
    if (in_order && here && p.strict != STRICT_ALONE && place.y >= 0) {
        left_at[p.left_offset + uint(place.y)] = left_then;
    }
    memoryBarrierBuffer();
    barrier();
}

void by_threshold() {
    if (p.strict != 0) {
        if (rank == 0u) {
            carried = 0.0;
        }
        for (uint t0 = 0u; t0 < p.n_tokens; t0 += BLOCK) {
            scan_strict(t0);
        }
        return;
    }
    for (uint t = rank; t < p.n_tokens; t += BLOCK) {
        const vec2 limit = limit_of(t);
        const int n      = above_threshold(t, limit, count_of(limit));
        atomicAdd(total, n);
        finish(t, n, place_of(t).y);
    }
}

bool shares(int k) {
    return k > p.k_base && k < int(p.n_used);
}

// For the tokens with count k: the n_chosen highest of their pool, by radix selection of the lowest key that is chosen; of
// equal ones the better rank, then the earlier token.
void choose(int k, int n_chosen) {
    barrier();
    if (rank == 0u) {
        cut    = 0u;
        n_left = n_chosen;
    }
    for (int shift = 24; shift >= 0; shift -= 8) {
        histogram[rank] = 0;
        barrier();
        const uint above = shift == 24 ? 0u : cut >> (shift + 8);
        for (uint t = rank; t < p.n_tokens; t += BLOCK) {
            if (count_of(limit_of(t)) != k) {
                continue;
            }
            for (int r = p.k_base; r < int(p.n_used); ++r) {
                const uint key = uint(routed[row_of(t) + uint(r)]);
                if (shift == 24 || key >> (shift + 8) == above) {
                    atomicAdd(histogram[key >> shift & 255u], 1);
                }
            }
        }
        barrier();
        if (rank == 0u) {
            int digit = 255;
            while (n_left > histogram[digit]) {
                n_left -= histogram[digit--];
            }
            cut |= uint(digit) << shift;
        }
        barrier();
    }

    const uint lowest = cut;
    int n_equal_left  = n_left;
    for (uint t = rank; t < p.n_tokens; t += BLOCK) {
        if (count_of(limit_of(t)) != k) {
            continue;
        }
        int n = p.k_base;
        for (int r = p.k_base; r < int(p.n_used); ++r) {
            n += int(uint(routed[row_of(t) + uint(r)]) > lowest);
        }
        routed[row_of(t)] = n;
    }
    for (int r = p.k_base; r < int(p.n_used) && n_equal_left > 0; ++r) {
        for (uint t0 = 0u; t0 < p.n_tokens && n_equal_left > 0; t0 += BLOCK) {
            const uint t      = t0 + rank;
            bool take         = t < p.n_tokens && count_of(limit_of(t)) == k && uint(routed[row_of(t) + uint(r)]) == lowest;
            const int n_equal = block_count(take);
            if (n_equal > n_equal_left) {
                taken[rank] = int(take);
                barrier();
                if (rank == 0u) {
                    int n = n_equal_left;
                    for (int i = 0; i < BLOCK; ++i) {
                        taken[i] = int(taken[i] != 0 && n-- > 0);
                    }
                }
                barrier();
                take = taken[rank] != 0;
                barrier();
            }
            if (take) {
                ++routed[row_of(t)];
            }
            n_equal_left -= n_equal;
        }
    }
}

// Until all are chosen, a token's first place, whose expert every rule keeps, holds how many it keeps.
void by_batch() {
    if (p.n_tokens == 1u) { // with nobody to share
        if (rank == 0u) {
            total = count_of(limit_of(0u));
            finish(0u, total, place_of(0u).y);
        }
        return;
    }
    for (uint k = rank; k < p.n_used; k += BLOCK) {
        sharing[k] = 0;
    }
    barrier();
    for (uint t = rank; t < p.n_tokens; t += BLOCK) {
        const int k = count_of(limit_of(t));
        atomicAdd(total, k);
        if (shares(k)) {
            atomicAdd(sharing[k], 1);
            to_keys(t, KEY_LOWEST);
        } else {
            routed[row_of(t)] = k;
        }
    }
    barrier();
    for (int k = p.k_base + 1; k < int(p.n_used); ++k) {
        if (sharing[k] > 0) {
            choose(k, sharing[k] * (k - p.k_base));
        }
    }
    for (uint t = rank; t < p.n_tokens; t += BLOCK) {
        finish(t, routed[row_of(t)], place_of(t).y);
    }
}

void main() {
    if (rank == 0u) {
        total = 0;
    }
    barrier();
    if (p.rule == RULE_BATCH) {
        by_batch();
    } else {
        by_threshold();
    }
    barrier();
    if (rank == 0u) {
        add_activations(uint(total));
    }
}
