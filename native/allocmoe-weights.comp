#version 450

// ALLOCMOE_NODE_WEIGHTS: the weights, and `skipped` where the ids are -1.

layout(push_constant) uniform parameter {
    uint n;
    uint skipped; // a float's bits
    uint weights_offset; // in elements, as the rest
    uint routed_offset;
    uint dst_offset;
} p;

layout(local_size_x = 256, local_size_y = 1, local_size_z = 1) in;

layout(binding = 0) readonly buffer Weights { uint weights[]; }; // floats
layout(binding = 1) readonly buffer Routed { int routed[]; };
layout(binding = 2) writeonly buffer Dst { uint dst[]; };

void main() {
    const uint i = gl_GlobalInvocationID.x;
    if (i < p.n) {
        dst[p.dst_offset + i] = routed[p.routed_offset + i] >= 0 ? weights[p.weights_offset + i] : p.skipped;
    }
}
