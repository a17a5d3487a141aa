#version 450

// ALLOCMOE_NODE_SKIPPED: the estimate of what a token skips, in the rows of `up`. A workgroup a token.

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
    uint routed_offset;
    uint table_offset;
    uint table_stride; // between experts
    uint dst_offset;
    uint n_columns;
    uint n_rank;
} p;

layout(local_size_x = 256, local_size_y = 1, local_size_z = 1) in;

layout(binding = 0) readonly buffer Ids { int ids[]; };
layout(binding = 1) readonly buffer Weights { float weights[]; };
layout(binding = 2) readonly buffer Reduced { float reduced[]; };
layout(binding = 3) readonly buffer Routed { int routed[]; };
layout(binding = 4) readonly buffer Table { float table[]; };
layout(binding = 5) writeonly buffer Dst { float dst[]; };

const uint FLOAT16_HIGHEST = 0x477fe000u; // 65504

shared bool too_large;

float sum_of(uint t, uint i) {
    float sum = 0.0;
    for (uint r = 0u; r < p.n_used; ++r) {
        if (routed[p.routed_offset + t * p.n_used + r] < 0) {
            const uint id = uint(ids[p.ids_offset + t * p.ids_stride + r]);
            sum += weights[p.weights_offset + t * p.weights_stride + r * p.weights_stride_rank] *
                   (table[p.table_offset + id * p.table_stride + i] + reduced[p.reduced_offset + t * p.reduced_stride + i]);
        }
    }
    return sum;
}

void main() {
    const uint first = gl_LocalInvocationID.x;
    for (uint t = gl_WorkGroupID.x; t < p.n_tokens; t += gl_NumWorkGroups.x) {
        if (first == 0u) {
            too_large = false;
        }
        barrier();
        for (uint i = first; i < p.n_columns; i += gl_WorkGroupSize.x) {
            const float sum = i < p.n_rank ? sum_of(t, i) : 0.0;
            // what float16 cannot hold may have become infinite already: then no estimate
            if ((floatBitsToUint(sum) & 0x7fffffffu) >= FLOAT16_HIGHEST) {
                too_large = true;
            }
            dst[p.dst_offset + t * p.n_columns + i] = sum;
        }
        barrier();
        if (too_large) {
            for (uint i = first; i < p.n_columns; i += gl_WorkGroupSize.x) {
                dst[p.dst_offset + t * p.n_columns + i] = 0.0;
            }
        }
        barrier();
    }
}
