// For ggml's CUDA backend: an expert id of -1 in MUL_MAT_ID is a slot without work, and its row of the result is zero; in
// ADD_ID nothing is added to that row.
// Included by the patched files, which only call these.
#pragma once

#include "ggml.h"

#include <climits>
#include <vector>

// In a kernel whose block or warp computes rows row0 to row0 + n_rows of one slot: whether the slot is skipped; then those
// of its rows that exist, n_rows_total in all, are zeroed.
static __device__ __forceinline__ bool allocmoe_skip_slot(
    const int32_t expert, float * dst, const int row0, const int n_rows, const int n_rows_total, const int tid) {
    if (expert >= 0) {
        return false;
    }
    if (tid < n_rows && row0 + tid < n_rows_total) {
        dst[row0 + tid] = 0.0f;
    }
    return true;
}

// In ADD_ID: what is added to element i for this expert, whose row of biases is not there for a skipped slot.
static __device__ __forceinline__ float allocmoe_bias(const int32_t expert, const float * row, const int64_t i) {
    return expert < 0 ? 0.0f : row[i];
}

// In mm_ids_helper, which counts what sorts before each expert: skipped slots sort behind all.
static __device__ __forceinline__ int32_t allocmoe_sort_last(const int32_t expert) {
    return expert < 0 ? INT_MAX : expert;
}

// In mm_ids_helper, by one whole warp, with the number of slots that are not skipped: marks what no expert has written, so
// that the quantisation of src1 passes over it.
static __device__ __forceinline__ void allocmoe_mark_skipped(
    const int32_t * ids, int32_t * ids_src1, const int n_valid, const int n_tokens, const int n_expert_used, const int stride_ids,
    const bool write_inverse) {
    const int n_slots = n_tokens * n_expert_used;
    if (n_valid == n_slots) {
        return;
    }
    if (write_inverse) {
        for (int i = threadIdx.x; i < n_slots; i += blockDim.x) {
            if (ids[(i / n_expert_used) * stride_ids + i % n_expert_used] < 0) {
                ids_src1[i] = -1;
            }
        }
    } else {
        for (int i = n_valid + threadIdx.x; i < n_slots; i += blockDim.x) {
            ids_src1[i] = -1;
        }
    }
}

// Where the ids are sorted on the host: skipped slots take row n_valid of the sorted result, which is returned.
static inline int64_t allocmoe_pad_skipped(
    const ggml_tensor * ids, const std::vector<char> & ids_host, std::vector<int32_t> & ids_to_sorted, std::vector<int32_t> & ids_from_sorted) {
    const int64_t n_valid = ids_to_sorted.size();
    for (int64_t t = 0; t < ids->ne[1]; ++t) {
        for (int64_t i = 0; i < ids->ne[0]; ++i) {
            if (*(const int32_t *) (ids_host.data() + t * ids->nb[1] + i * ids->nb[0]) < 0) {
                ids_from_sorted[t * ids->ne[0] + i] = n_valid;
                ids_to_sorted.push_back(0);
            }
        }
    }
    return n_valid;
}
