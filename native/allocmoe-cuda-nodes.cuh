// Included by ggml-cuda.cu alone: the kernels and launches behind its hooks.
#pragma once

#include "ggml-cuda/common.cuh"

#include "allocmoe-cuda.cuh"
#include "allocmoe-token-rule.h"

static __global__ void allocmoe_zero_skipped_rows_kernel(
    const char * ids, char * dst, const int64_t ne0, const int n_used, const int64_t nb0_ids, const int64_t nb1_ids, const int64_t nb1, const int64_t nb2) {
    const int i = blockIdx.x % n_used;
    const int t = blockIdx.x / n_used;
    if (*(const int32_t *) (ids + t * nb1_ids + i * nb0_ids) >= 0) {
        return;
    }
    float * row = (float *) (dst + t * nb2 + i * nb1);
    for (int64_t j = threadIdx.x; j < ne0; j += blockDim.x) {
        row[j] = 0.0f;
    }
}

// Zeroes the rows of dst whose id is negative, where the ids are not fresh from a top-k, which has none.
static void allocmoe_cuda_zero_skipped_rows(cudaStream_t stream, const ggml_tensor * ids, ggml_tensor * dst) {
    const bool from_top_k = ids->op == GGML_OP_VIEW && ids->view_src->op == GGML_OP_ARGSORT;
    if (from_top_k || ggml_is_empty(dst)) {
        return;
    }
    allocmoe_zero_skipped_rows_kernel<<<ids->ne[0] * ids->ne[1], 256, 0, stream>>>(
        (const char *) ids->data, (char *) dst->data, dst->ne[0], ids->ne[0], ids->nb[0], ids->nb[1], dst->nb[1], dst->nb[2]);
    CUDA_CHECK(cudaGetLastError());
}

struct allocmoe_cuda_block {
    __device__ int rank() const { return threadIdx.x; }
    __device__ int size() const { return blockDim.x; }
    __device__ void sync() const { __syncthreads(); }
    __device__ int count(bool condition) const { return __syncthreads_count(condition); }
    __device__ void add(int32_t * address, int32_t value) const { atomicAdd(address, value); }
};

// one block: at decode there is one token, and the batch rule ranks all of them together
static __global__ void __launch_bounds__(ALLOCMOE_MAX_BLOCK) allocmoe_route_kernel(const allocmoe_route_args args) {
    __shared__ allocmoe_route_shared shared;
    allocmoe_cuda_block block;
    allocmoe_route(block, args, shared);
}

static __global__ void __launch_bounds__(ALLOCMOE_MAX_BLOCK) allocmoe_route_by_size_kernel(const allocmoe_estimate_args args) {
    __shared__ allocmoe_estimate_shared shared;
    allocmoe_cuda_block block;
    allocmoe_route_by_size(block, args, shared);
}

// a block a token
static __global__ void __launch_bounds__(ALLOCMOE_MAX_BLOCK) allocmoe_sum_skipped_kernel(const allocmoe_estimate_args args) {
    allocmoe_cuda_block block;
    allocmoe_sum_skipped(block, args, blockIdx.x);
}

static __global__ void allocmoe_mask_weights_kernel(const float * weights, const int32_t * routed, float * dst, const int64_t n, const float skipped) {
    const int64_t i = (int64_t) blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        dst[i] = routed[i] >= 0 ? weights[i] : skipped;
    }
}

// What ALLOCMOE_NODE_IDS and _BY_SIZE read of each token.
static bool allocmoe_cuda_has_values(const ggml_tensor * limits, const ggml_tensor * places) {
    return limits->type == GGML_TYPE_F32 && ggml_is_contiguous(limits) && places->type == GGML_TYPE_I32 && ggml_is_contiguous(places);
}

static bool allocmoe_cuda_has_rows_of(const ggml_tensor * tensor, ggml_type type) {
    return tensor->type == type && tensor->nb[0] == ggml_type_size(type);
}

// Whether a custom node is one of ours that runs here.
static bool allocmoe_cuda_supports(const ggml_tensor * node) {
    allocmoe_node params;
    if (!allocmoe_get_node(node, params) || !ggml_is_contiguous(node)) {
        return false;
    }
    const ggml_tensor * a = node->src[0];
    const ggml_tensor * b = node->src[1];
    switch (params.kind) {
        case ALLOCMOE_NODE_IDS:
            // a rule or value that is not known here stays on the CPU
            return (params.rule == ALLOCMOE_NODE_RULE_BATCH || params.rule == ALLOCMOE_NODE_RULE_THRESHOLD) &&
                   allocmoe_cuda_has_values(node->src[2], node->src[3]) &&
                   params.value >= ALLOCMOE_NODE_VALUE_SCORE && params.value <= ALLOCMOE_NODE_VALUE_REMAINING &&
                   allocmoe_cuda_has_rows_of(a, GGML_TYPE_I32) && allocmoe_cuda_has_rows_of(b, GGML_TYPE_F32) && node->type == GGML_TYPE_I32;
        case ALLOCMOE_NODE_WEIGHTS:
            return a->type == GGML_TYPE_F32 && ggml_is_contiguous(a) && b->type == GGML_TYPE_I32 && ggml_is_contiguous(b);
        case ALLOCMOE_NODE_IDS_BY_SIZE:
        case ALLOCMOE_NODE_SKIPPED:
            if (params.kind == ALLOCMOE_NODE_SKIPPED && (node->ne[0] > ALLOCMOE_MAX_BLOCK || node->ne[0] % WARP_SIZE != 0 || !ggml_is_contiguous(node->src[3]))) {
                return false;
            }
            if (params.kind == ALLOCMOE_NODE_IDS_BY_SIZE && !allocmoe_cuda_has_values(node->src[4], node->src[5])) {
                return false;
            }
            return allocmoe_cuda_has_rows_of(a, GGML_TYPE_I32) && b->type == GGML_TYPE_F32 && allocmoe_cuda_has_rows_of(node->src[2], GGML_TYPE_F32) &&
                   allocmoe_cuda_has_rows_of(node->src[params.kind == ALLOCMOE_NODE_SKIPPED ? 4 : 3], GGML_TYPE_F32);
    }
    return false;
}

// ALLOCMOE_PROC_TOKEN_RULES. Nobody has run this through HIP or MUSA.
static void * allocmoe_cuda_proc(const char * name) {
#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)
    if (strcmp(name, ALLOCMOE_PROC_TOKEN_RULES) == 0) {
        return (void *) allocmoe_cuda_supports;
    }
#endif
    GGML_UNUSED(name);
    return nullptr;
}

static void allocmoe_cuda_compute_estimate(cudaStream_t stream, ggml_tensor * node, const allocmoe_node & params) {
    const bool skipped = params.kind == ALLOCMOE_NODE_SKIPPED;
    const auto args    = allocmoe_estimate_args_of(node, params);
    if (skipped) {
        allocmoe_sum_skipped_kernel<<<args.n_tokens, args.n_columns, 0, stream>>>(args);
    } else {
        GGML_ASSERT(params.spent);
        const int n_threads = std::min<int>(args.n_tokens * args.n_used * WARP_SIZE, ALLOCMOE_MAX_BLOCK);
        allocmoe_route_by_size_kernel<<<1, n_threads, 0, stream>>>(args);
    }
}

static void allocmoe_cuda_compute(cudaStream_t stream, ggml_tensor * node) {
    allocmoe_node params;
    GGML_ASSERT(allocmoe_get_node(node, params));
    const ggml_tensor * a = node->src[0];
    const ggml_tensor * b = node->src[1];
    if (ggml_is_empty(node)) {
        return;
    }
    if (params.kind == ALLOCMOE_NODE_IDS_BY_SIZE || params.kind == ALLOCMOE_NODE_SKIPPED) {
        allocmoe_cuda_compute_estimate(stream, node, params);
    } else if (params.kind == ALLOCMOE_NODE_IDS) {
        GGML_ASSERT(params.spent);
        const auto args     = allocmoe_route_args_of(node, params);
        const int n_threads = std::min<int>(GGML_PAD(args.n_tokens, WARP_SIZE), ALLOCMOE_MAX_BLOCK);
        allocmoe_route_kernel<<<1, n_threads, 0, stream>>>(args);
    } else {
        constexpr int n_threads = 256;
        const int64_t n         = ggml_nelements(node);
        allocmoe_mask_weights_kernel<<<(n + n_threads - 1) / n_threads, n_threads, 0, stream>>>(
            (const float *) a->data, (const int32_t *) b->data, (float *) node->data, n, params.skipped);
    }
    CUDA_CHECK(cudaGetLastError());
}
