// In the shaders of MUL_MAT_ID for up to 8 tokens: an expert id of -1 is a slot without work, and its row of the result is
// zero. Included at the end of mul_mat_vec_base.glsl, so that what follows as `main` runs for slots with an expert alone.
#ifdef MUL_MAT_ID
void allocmoe_main();

void main() {
    const uint slot = gl_WorkGroupID.y;
    if (data_ids[slot + p.expert_i1 * p.nbi1] >= 0) {
        allocmoe_main();
        return;
    }
    const uint first_row = NUM_ROWS * (gl_WorkGroupID.x + gl_NumWorkGroups.x * gl_WorkGroupID.z);
    for (uint row = first_row + gl_LocalInvocationID.x; row < min(first_row + NUM_ROWS, p.stride_d); row += BLOCK_SIZE) {
        data_d[slot * p.stride_d + p.expert_i1 * p.batch_stride_d + row] = D_TYPE(0);
    }
}

#define main allocmoe_main
#endif
