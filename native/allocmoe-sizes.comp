#version 450

// ALLOCMOE_NODE_IDS_BY_SIZE: ids by rank, -1 where the estimated size is too small.

layout(push_constant) uniform parameter {
    uint n_used;
    uint n_tokens;
    uint ids_offset; // in elements, as the rest
    uint ids_stride; // between tokens
    uint weights_offset;
    uint weights_stride;
    uint weights_stride_rank;
    uint reduced_offset;
    uint reduced_stride;
    uint table_offset;
    uint table_stride;  // between experts
    uint limits_offset; // of this layer
    uint places_offset;
    uint routed_offset;
    uint activations_offset; // of this layer and phase
    uint left_offset;
    uint kept_offset;
    uint n_down;
    int n_relu;
    int k_base;
    int strict;
} p;

#include "allocmoe-rules.glsl"

layout(binding = 0) readonly buffer Ids { int ids[]; };
layout(binding = 1) readonly buffer Weights { float weights[]; };
layout(binding = 2) readonly buffer Reduced { float reduced[]; };
layout(binding = 3) readonly buffer Table { float table[]; };
layout(binding = 4) readonly buffer Limits { vec2 limits[]; };
layout(binding = 5) readonly buffer Places { ivec2 places[]; };
layout(binding = 6) coherent buffer Routed { int routed[]; };
#define SPENT_BINDING 7
#include "allocmoe-spent.glsl"

shared float parts[BLOCK];
shared int total;
shared int n_kept; // by one token

#define rank gl_LocalInvocationID.x

int id_of(uint t, uint r) {
    return ids[p.ids_offset + t * p.ids_stride + r];
}

// log_norm_e . (u, 1) without the 1, lane by lane
float part_of(uint t, uint r, uint lane, uint n_lanes) {
    const uint u            = p.reduced_offset + t * p.reduced_stride;
    const uint coefficients = p.table_offset + uint(id_of(t, r)) * p.table_stride;
    const uint n_plain      = p.n_down - uint(p.n_relu);
    float sum               = 0.0;
    for (uint j = lane; j < p.n_down; j += n_lanes) {
        const float x        = reduced[u + j];
        const bool rectified = j >= n_plain && !is_nan(floatBitsToUint(x)) && x < 0.0;
        sum += rectified ? 0.0 : table[coefficients + j] * x;
    }
    return sum;
}

// The key of v_e.
int key_of_size(uint t, uint r, float sum) {
    const float weight = weights[p.weights_offset + t * p.weights_stride + r * p.weights_stride_rank];
    const float last   = table[p.table_offset + uint(id_of(t, r)) * p.table_stride + p.n_down];
    const bool lowest  = !is_nan(floatBitsToUint(weight)) && weight < 1e-20;
    const float size   = log(lowest ? 1e-20 : weight) + last + sum;
    const bool nan     = is_nan(floatBitsToUint(weight)) || is_nan(floatBitsToUint(last)) || is_nan(floatBitsToUint(sum)) || is_nan(floatBitsToUint(size));
    return int(nan ? KEY_NAN : key_of(floatBitsToUint(size)));
}

// The keys of all experts' sizes, in the places of the ids.
void to_keys() {
    // a single token's experts are few, so each of them has several threads
    const uint n = p.n_tokens * p.n_used;
    uint n_lanes = 1u;
    while (n_lanes < 32u && 2u * n_lanes * n <= BLOCK) {
        n_lanes *= 2u;
    }
    const uint lane = rank % n_lanes;
    for (uint i0 = 0u; i0 < n; i0 += BLOCK / n_lanes) {
        const uint i = i0 + rank / n_lanes;
        parts[rank]  = i < n ? part_of(i / p.n_used, i % p.n_used, lane, n_lanes) : 0.0;
        barrier();
        if (lane == 0u && i < n) {
            float sum = 0.0;
            for (uint j = 0u; j < n_lanes; ++j) {
                sum += parts[rank + j];
            }
            routed[p.routed_offset + i] = key_of_size(i / p.n_used, i % p.n_used, sum);
        }
        barrier();
    }
}

// Whether an expert is among the k_base largest of its token; of equal ones the better rank is larger.
bool in_base(uint t, uint r, uint key) {
    int larger = 0;
    for (uint other = 0u; other < p.n_used && larger < p.k_base; ++other) {
        const uint its = uint(routed[p.routed_offset + t * p.n_used + other]);
        larger += int(its > key || (its == key && other < r));
    }
    return larger < p.k_base;
}

// The experts of token t, whose keys become ids; returns how many it keeps. A thread does it alone.
int route_alone(uint t, uint threshold) {
    const uint row = p.routed_offset + t * p.n_used;
    int n          = 0;
    for (uint r = 0u; r < p.n_used; ++r) {
        n += int(uint(routed[row + r]) >= threshold);
    }
    for (; n < p.k_base && n < int(p.n_used); ++n) {
        int best = -1;
        for (int r = 0; r < int(p.n_used); ++r) {
            const uint key = uint(routed[row + uint(r)]);
            if (key < threshold && (best < 0 || key > uint(routed[row + uint(best)]))) {
                best = r;
            }
        }
        routed[row + uint(best)] = -1; // the highest key
    }
    for (uint r = 0u; r < p.n_used; ++r) {
        routed[row + r] = uint(routed[row + r]) >= threshold ? id_of(t, r) : -1;
    }
    return n;
}

// The threshold of a token before which so much is left over.
uint strict_threshold(float threshold, float left) {
    precise float moved = STRICT_STEP * left;
    moved               = threshold - moved;
    const uint bits     = floatBitsToUint(threshold);
    return key_of((bits & 0x7fffffffu) >= FLOAT_INF ? bits : floatBitsToUint(moved));
}

// What a token may spend depends on all tokens before it; its experts, one a thread, are looked at together.
void route_strict() {
    float left = 0.0; // the same in every thread
    int before = -2;
    for (uint t = 0u; t < p.n_tokens; ++t) {
        const ivec2 place = places[p.places_offset + t];
        const vec2 limit  = limit_of(t);
        if (p.strict == STRICT_ALONE || place.x < 0) {
            left = 0.0;
        } else if (place.x != before) {
            left = left_at[p.left_offset + uint(place.x)];
        }
        const uint threshold = strict_threshold(limit.y, left);
        if (rank == 0u) {
            n_kept = 0;
        }
        barrier();
        const uint at   = p.routed_offset + t * p.n_used + rank;
        const uint key  = rank < p.n_used ? uint(routed[at]) : 0u;
        const bool keep = rank < p.n_used && (key >= threshold || in_base(t, rank, key));
        if (keep) {
            atomicAdd(n_kept, 1);
        }
        memoryBarrierBuffer();
        barrier(); // every key has been compared, and becomes an id
        if (rank < p.n_used) {
            routed[at] = keep ? id_of(t, rank) : -1;
        }
        const int n = n_kept;
        left   = clamp(left + float(count_of(limit) - n), -STRICT_LEFT, STRICT_LEFT);
        before = place.y;
        if (rank == 0u) {
            total += n;
            note_kept(place.y, n);
            if (p.strict != STRICT_ALONE && place.y >= 0) {
                left_at[p.left_offset + uint(place.y)] = left;
            }
        }
        memoryBarrierBuffer();
        barrier();
    }
}

void main() {
    if (rank == 0u) {
        total = 0;
    }
    barrier();
    to_keys();
    memoryBarrierBuffer();
    barrier();
    if (p.strict != 0) {
        route_strict();
    } else {
        for (uint t = rank; t < p.n_tokens; t += BLOCK) {
            const int n = route_alone(t, key_of(floatBitsToUint(limit_of(t).y)));
            atomicAdd(total, n);
            note_kept(places[p.places_offset + t].y, n);
        }
        barrier();
    }
    if (rank == 0u) {
        add_activations(uint(total));
    }
}
