// For ggml's Vulkan backend: what its hooks call. Included by ggml-vulkan.cpp alone, behind its own headers.
#pragma once

#include "allocmoe-custom.h"

enum {
    ALLOCMOE_VK_ZERO,
    ALLOCMOE_VK_ROUTE,
    ALLOCMOE_VK_WEIGHTS,
    ALLOCMOE_VK_SIZES,
    ALLOCMOE_VK_SKIPPED,
    ALLOCMOE_VK_COUNT,
};

// The push constants of the shaders, where they say what each is.
struct allocmoe_vk_zero_args {
    uint32_t n_tokens, n_rows, ids_offset, ids_stride, ids_stride_slot, dst_stride;
};

struct allocmoe_vk_route_args {
    uint32_t n_used, n_tokens, ids_offset, ids_stride, scores_offset, scores_stride, limits_offset, places_offset, routed_offset, activations_offset, left_offset, kept_offset;
    int32_t rule, value, k_base, strict;
};

struct allocmoe_vk_weights_args {
    uint32_t n;
    float skipped;
    uint32_t weights_offset, routed_offset, dst_offset;
};

struct allocmoe_vk_sizes_args {
    uint32_t n_used, n_tokens, ids_offset, ids_stride, weights_offset, weights_stride, weights_stride_rank, reduced_offset, reduced_stride, table_offset, table_stride,
        limits_offset, places_offset, routed_offset, activations_offset, left_offset, kept_offset, n_down;
    int32_t n_relu, k_base, strict;
};

struct allocmoe_vk_skipped_args {
    uint32_t n_used, n_tokens, ids_offset, ids_stride, weights_offset, weights_stride, weights_stride_rank, reduced_offset, reduced_stride, routed_offset, table_offset,
        table_stride, dst_offset, n_columns, n_rank;
};

static constexpr int64_t ALLOCMOE_VK_BLOCK      = 256;  // threads of each shader
static constexpr int64_t ALLOCMOE_VK_MAX_ROUTED = 1024; // experts of a token in allocmoe-route.comp

// every device has to take so many
static_assert(sizeof(allocmoe_vk_sizes_args) <= 128 && sizeof(allocmoe_vk_route_args) <= 128, "push constants");

template <class F>
static void allocmoe_vk_create_pipelines(vk_device & device, const F & create) {
    static_assert(ALLOCMOE_VK_COUNT == std::extent<decltype(vk_device_struct::pipeline_allocmoe)>::value, "a pipeline for each shader");
    auto & pipelines = device->pipeline_allocmoe;
    create(device, pipelines[ALLOCMOE_VK_ZERO], "allocmoe_zero", allocmoe_zero_len, allocmoe_zero_data, "main", 2, sizeof(allocmoe_vk_zero_args), { 1, 1, 1 }, {}, 1);
    create(device, pipelines[ALLOCMOE_VK_ROUTE], "allocmoe_route", allocmoe_route_len, allocmoe_route_data, "main", 8, sizeof(allocmoe_vk_route_args), { 1, 1, 1 }, {}, 1);
    create(device, pipelines[ALLOCMOE_VK_WEIGHTS], "allocmoe_weights", allocmoe_weights_len, allocmoe_weights_data, "main", 3, sizeof(allocmoe_vk_weights_args),
        { ALLOCMOE_VK_BLOCK, 1, 1 }, {}, 1);
    create(device, pipelines[ALLOCMOE_VK_SIZES], "allocmoe_sizes", allocmoe_sizes_len, allocmoe_sizes_data, "main", 10, sizeof(allocmoe_vk_sizes_args), { 1, 1, 1 }, {}, 1);
    create(device, pipelines[ALLOCMOE_VK_SKIPPED], "allocmoe_skipped", allocmoe_skipped_len, allocmoe_skipped_data, "main", 6, sizeof(allocmoe_vk_skipped_args), { 1, 1, 1 }, {}, 1);
}

using allocmoe_vk_bindings = std::initializer_list<vk::DescriptorBufferInfo>;

// A tensor as a binding, which begins where the device can begin one, and where in it the tensor's elements begin.
static vk_subbuffer allocmoe_vk_bind(const ggml_backend_vk_context * ctx, const ggml_tensor * tensor, uint32_t & offset) {
    offset += get_misalign_bytes(ctx, tensor) / ggml_type_size(tensor->type);
    return ggml_vk_tensor_subbuffer(ctx, tensor, true);
}

// The same for memory that the host sees, from an address on.
static vk_subbuffer allocmoe_vk_bind(const ggml_backend_vk_context * ctx, const void * address, size_t element_size, uint32_t & offset) {
    const auto & limits = ctx->device->properties.limits;
    vk_subbuffer result = {};
    size_t begin        = 0;
    ggml_vk_host_get(ctx->device, address, result.buffer, begin);
    GGML_ASSERT(result.buffer != nullptr);
    const size_t surplus = begin % limits.minStorageBufferOffsetAlignment;
    offset += surplus / element_size;
    result.offset = begin - surplus;
    result.size   = std::min<size_t>(result.buffer->size - result.offset, limits.maxStorageBufferRange);
    return result;
}

static uint32_t allocmoe_vk_stride(const ggml_tensor * tensor, int dim) {
    return tensor->nb[dim] / ggml_type_size(tensor->type);
}

// Zeroes the rows of MUL_MAT_ID's result whose id is negative, where the ids are not fresh from a top-k, which has none.
// The product that follows waits for it, since it waits for its own count of the ids.
static void allocmoe_vk_zero_skipped_rows(ggml_backend_vk_context * ctx, vk_context & subctx, const ggml_tensor * ids, const ggml_tensor * dst) {
    const bool from_top_k = ids->op == GGML_OP_VIEW && ids->view_src->op == GGML_OP_ARGSORT;
    if (from_top_k || ggml_is_empty(dst)) {
        return;
    }
    allocmoe_vk_zero_args args = {};
    args.n_tokens              = ids->ne[1];
    args.n_rows                = dst->ne[0];
    args.ids_stride            = allocmoe_vk_stride(ids, 1);
    args.ids_stride_slot       = allocmoe_vk_stride(ids, 0);
    args.dst_stride            = allocmoe_vk_stride(dst, 2);
    const vk_subbuffer bound   = allocmoe_vk_bind(ctx, ids, args.ids_offset);
    const uint32_t n_groups    = std::min<uint32_t>(args.n_tokens, ctx->device->properties.limits.maxComputeWorkGroupCount[1]);
    auto & pipeline            = ctx->device->pipeline_allocmoe[ALLOCMOE_VK_ZERO];
    ggml_pipeline_request_descriptor_sets(ctx, pipeline, 1);
    ggml_vk_dispatch_pipeline(ctx, subctx, pipeline, { bound, ggml_vk_tensor_subbuffer(ctx, dst) }, args, { (uint32_t) ids->ne[0], n_groups, 1 });
}

//
// the token rules
//

static bool allocmoe_vk_has_rows_of(const ggml_tensor * tensor, ggml_type type) {
    return tensor->type == type && tensor->nb[0] == ggml_type_size(type);
}

static bool allocmoe_vk_is(const ggml_tensor * tensor, ggml_type type) {
    return tensor->type == type && ggml_is_contiguous(tensor);
}

// Whether the device sees the memory in which a rule keeps what it spends, which is pinned for one device alone.
static bool allocmoe_vk_sees(const vk_device & device, const void * address) {
    vk_buffer buffer;
    size_t offset;
    ggml_vk_host_get(device, address, buffer, offset);
    return buffer != nullptr;
}

// Whether a custom node is one of ours that the device runs; those that it does not run are the CPU's.
static bool allocmoe_vk_supports(const vk_device & device, const ggml_tensor * node) {
    allocmoe_node params;
    if (!allocmoe_get_node(node, params) || !ggml_is_contiguous(node)) {
        return false;
    }
    const auto & limits = device->properties.limits;
    if (limits.maxComputeWorkGroupInvocations < ALLOCMOE_VK_BLOCK || limits.maxComputeWorkGroupSize[0] < ALLOCMOE_VK_BLOCK) {
        return false;
    }
    const ggml_tensor * a = node->src[0];
    const ggml_tensor * b = node->src[1];
    switch (params.kind) {
        case ALLOCMOE_NODE_IDS:
            // a rule or value that is not known here stays on the CPU
            return (params.rule == ALLOCMOE_NODE_RULE_BATCH || params.rule == ALLOCMOE_NODE_RULE_THRESHOLD) &&
                   params.value >= ALLOCMOE_NODE_VALUE_SCORE && params.value <= ALLOCMOE_NODE_VALUE_REMAINING &&
                   node->type == GGML_TYPE_I32 && node->ne[0] <= ALLOCMOE_VK_MAX_ROUTED &&
                   allocmoe_vk_has_rows_of(a, GGML_TYPE_I32) && allocmoe_vk_has_rows_of(b, GGML_TYPE_F32) &&
                   allocmoe_vk_is(node->src[2], GGML_TYPE_F32) && allocmoe_vk_is(node->src[3], GGML_TYPE_I32) && allocmoe_vk_sees(device, params.spent);
        case ALLOCMOE_NODE_WEIGHTS:
            return allocmoe_vk_is(a, GGML_TYPE_F32) && allocmoe_vk_is(b, GGML_TYPE_I32) &&
                   ggml_nelements(node) <= ALLOCMOE_VK_BLOCK * (int64_t) limits.maxComputeWorkGroupCount[0];
        case ALLOCMOE_NODE_IDS_BY_SIZE:
            return node->ne[0] <= ALLOCMOE_VK_BLOCK && allocmoe_vk_has_rows_of(a, GGML_TYPE_I32) && b->type == GGML_TYPE_F32 &&
                   allocmoe_vk_has_rows_of(node->src[2], GGML_TYPE_F32) && allocmoe_vk_has_rows_of(node->src[3], GGML_TYPE_F32) &&
                   allocmoe_vk_is(node->src[4], GGML_TYPE_F32) && allocmoe_vk_is(node->src[5], GGML_TYPE_I32) && allocmoe_vk_sees(device, params.spent);
        case ALLOCMOE_NODE_SKIPPED:
            return allocmoe_vk_has_rows_of(a, GGML_TYPE_I32) && b->type == GGML_TYPE_F32 && allocmoe_vk_has_rows_of(node->src[2], GGML_TYPE_F32) &&
                   allocmoe_vk_is(node->src[3], GGML_TYPE_I32) && allocmoe_vk_has_rows_of(node->src[4], GGML_TYPE_F32);
    }
    return false;
}

// ALLOCMOE_PROC_TOKEN_RULES; of which nodes run where, each device is asked.
static void * allocmoe_vk_proc(ggml_backend_reg_t reg, const char * name) {
    GGML_UNUSED(reg);
    return strcmp(name, ALLOCMOE_PROC_TOKEN_RULES) == 0 ? (void *) allocmoe_vk_proc : nullptr;
}

// What both nodes that write ids have in common, `limits` and `places` being their sources.
template <class Args>
static void allocmoe_vk_fill(Args & args, const ggml_tensor * node, const allocmoe_node & params, const ggml_tensor * limits) {
    args.n_used             = node->ne[0];
    args.n_tokens           = node->ne[1];
    args.ids_stride         = allocmoe_vk_stride(node->src[0], 1);
    args.limits_offset      = params.il * limits->ne[1];
    args.activations_offset = params.phase * (sizeof(int64_t) / sizeof(uint32_t));
    args.k_base             = params.k_base;
    args.strict             = params.strict;
}

static void allocmoe_vk_compute(ggml_backend_vk_context * ctx, vk_context & subctx, ggml_tensor * node) {
    allocmoe_node params;
    GGML_ASSERT(allocmoe_get_node(node, params));
    ggml_tensor ** src = node->src;
    // a binding of a tensor, and of a place in allocmoe_spent
    const auto of     = [ctx](const ggml_tensor * tensor, uint32_t & offset) { return allocmoe_vk_bind(ctx, tensor, offset); };
    const auto pinned = [ctx](const auto * address, uint32_t & offset) { return allocmoe_vk_bind(ctx, address, sizeof(*address), offset); };
    const auto limits = [ctx](const ggml_tensor * tensor, uint32_t & offset) {
        uint32_t surplus   = 0;
        const auto binding = allocmoe_vk_bind(ctx, tensor, surplus);
        offset += surplus / 2; // the shaders read them in pairs
        return binding;
    };
    auto & pipeline = ctx->device->pipeline_allocmoe[params.kind == ALLOCMOE_NODE_IDS           ? ALLOCMOE_VK_ROUTE
                                                     : params.kind == ALLOCMOE_NODE_WEIGHTS     ? ALLOCMOE_VK_WEIGHTS
                                                     : params.kind == ALLOCMOE_NODE_IDS_BY_SIZE ? ALLOCMOE_VK_SIZES
                                                                                                : ALLOCMOE_VK_SKIPPED];
    ggml_pipeline_request_descriptor_sets(ctx, pipeline, 1);

    if (params.kind == ALLOCMOE_NODE_IDS) {
        allocmoe_vk_route_args args = {};
        allocmoe_vk_fill(args, node, params, src[2]);
        args.scores_stride                  = allocmoe_vk_stride(src[1], 1);
        args.rule                           = params.rule;
        args.value                          = params.value;
        const allocmoe_vk_bindings bindings = { of(src[0], args.ids_offset), of(src[1], args.scores_offset), limits(src[2], args.limits_offset),
            limits(src[3], args.places_offset), of(node, args.routed_offset), pinned((const uint32_t *) params.spent->activations, args.activations_offset),
            pinned(params.spent->left, args.left_offset), pinned(params.spent->kept, args.kept_offset) };
        ggml_vk_dispatch_pipeline(ctx, subctx, pipeline, bindings, args, { 1, 1, 1 });
    } else if (params.kind == ALLOCMOE_NODE_WEIGHTS) {
        allocmoe_vk_weights_args args       = {};
        args.n                              = ggml_nelements(node);
        args.skipped                        = params.skipped;
        const allocmoe_vk_bindings bindings = { of(src[0], args.weights_offset), of(src[1], args.routed_offset), of(node, args.dst_offset) };
        ggml_vk_dispatch_pipeline(ctx, subctx, pipeline, bindings, args, { args.n, 1, 1 });
    } else if (params.kind == ALLOCMOE_NODE_IDS_BY_SIZE) {
        allocmoe_vk_sizes_args args = {};
        allocmoe_vk_fill(args, node, params, src[4]);
        args.weights_stride                 = allocmoe_vk_stride(src[1], 2);
        args.weights_stride_rank            = allocmoe_vk_stride(src[1], 1);
        args.reduced_stride                 = allocmoe_vk_stride(src[2], 1);
        args.table_stride                   = allocmoe_vk_stride(src[3], 1);
        args.n_down                         = src[2]->ne[0];
        args.n_relu                         = params.n_relu;
        const allocmoe_vk_bindings bindings = { of(src[0], args.ids_offset), of(src[1], args.weights_offset), of(src[2], args.reduced_offset),
            of(src[3], args.table_offset), limits(src[4], args.limits_offset), limits(src[5], args.places_offset), of(node, args.routed_offset),
            pinned((const uint32_t *) params.spent->activations, args.activations_offset), pinned(params.spent->left, args.left_offset),
            pinned(params.spent->kept, args.kept_offset) };
        ggml_vk_dispatch_pipeline(ctx, subctx, pipeline, bindings, args, { 1, 1, 1 });
    } else {
        allocmoe_vk_skipped_args args       = {};
        args.n_used                         = src[0]->ne[0];
        args.n_tokens                       = node->ne[1];
        args.ids_stride                     = allocmoe_vk_stride(src[0], 1);
        args.weights_stride                 = allocmoe_vk_stride(src[1], 2);
        args.weights_stride_rank            = allocmoe_vk_stride(src[1], 1);
        args.reduced_stride                 = allocmoe_vk_stride(src[2], 1);
        args.table_stride                   = allocmoe_vk_stride(src[4], 1);
        args.n_columns                      = node->ne[0];
        args.n_rank                         = src[4]->ne[0];
        const allocmoe_vk_bindings bindings = { of(src[0], args.ids_offset), of(src[1], args.weights_offset), of(src[2], args.reduced_offset),
            of(src[3], args.routed_offset), of(src[4], args.table_offset), of(node, args.dst_offset) };
        const uint32_t n_groups             = std::min<uint32_t>(args.n_tokens, ctx->device->properties.limits.maxComputeWorkGroupCount[0]);
        ggml_vk_dispatch_pipeline(ctx, subctx, pipeline, bindings, args, { n_groups, 1, 1 });
    }
}
