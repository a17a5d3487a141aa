#version 450

// Zeroes the rows of MUL_MAT_ID's result whose expert id is -1, before the shaders for many tokens write the others. A
// workgroup for each slot of a token.

layout(push_constant) uniform parameter {
    uint n_tokens;
    uint n_rows;     // of a slot
    uint ids_offset; // in elements, as the rest
    uint ids_stride; // between tokens
    uint ids_stride_slot;
    uint dst_stride; // between tokens
} p;

layout(local_size_x = 256, local_size_y = 1, local_size_z = 1) in;

layout(binding = 0) readonly buffer Ids { int ids[]; };
layout(binding = 1) writeonly buffer Dst { float dst[]; };

void main() {
    const uint slot = gl_WorkGroupID.x;
    for (uint t = gl_WorkGroupID.y; t < p.n_tokens; t += gl_NumWorkGroups.y) {
        if (ids[p.ids_offset + t * p.ids_stride + slot * p.ids_stride_slot] >= 0) {
            continue;
        }
        for (uint i = gl_LocalInvocationID.x; i < p.n_rows; i += gl_WorkGroupSize.x) {
            dst[t * p.dst_stride + slot * p.n_rows + i] = 0.0;
        }
    }
}
