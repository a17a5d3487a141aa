// What a layer's token rule has spent, in memory that the host sees: allocmoe_spent. Included by shaders that have named
// their push constants `p` and the bindings SPENT_BINDING and the two after it.

layout(binding = SPENT_BINDING) buffer Activations { uint activations[]; };                // a number of 64 bits
layout(binding = SPENT_BINDING + 1) coherent buffer Left { float left_at[]; };
layout(binding = SPENT_BINDING + 2) writeonly buffer Kept { uint16_t kept_at[]; };

int count_of(vec2 limit) {
    return limit.x < float(p.n_used) ? int(limit.x) : int(p.n_used);
}

vec2 limit_of(uint t) {
    return limits[p.limits_offset + t];
}

// .x: before, .y: own
ivec2 place_of(uint t) {
    return places[p.places_offset + t];
}

void note_kept(int place, int n_kept) {
    if (place >= 0) {
        kept_at[p.kept_offset + uint(place)] = uint16_t(uint(n_kept + 1));
    }
}

void add_activations(uint total) {
    const uint low                       = activations[p.activations_offset];
    activations[p.activations_offset]    = low + total;
    activations[p.activations_offset + 1u] += uint(low + total < low);
}
