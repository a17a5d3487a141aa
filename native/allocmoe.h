// Public C API of allocmoe-edge, exported by libllama next to llama.h.
// Python binds it with cffi from the lines between the two marks below, so keep those plain C.
#pragma once

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

// version of the allocmoe.* GGUF keys that this library reads
#define ALLOCMOE_PLAN_VERSION 1

// [cffi begin]

// Return values of the functions below that return int32_t.
enum {
    ALLOCMOE_OK            =  0,
    ALLOCMOE_ERR_N_LAYER   = -1, // n_layer is not the model's block count
    ALLOCMOE_ERR_K         = -2, // an entry is below 0 or above the number of experts
    ALLOCMOE_ERR_PHASE     = -3, // unknown phase
};

enum {
    ALLOCMOE_PHASE_PREFILL = 0, // micro-batches with more than one token of some sequence
    ALLOCMOE_PHASE_DECODE  = 1, // micro-batches with one token a sequence
};

// Version of the allocmoe.* GGUF keys that the library reads.
LLAMA_API int32_t allocmoe_plan_version(void);

// Block count of the context's model: the length of every array below.
LLAMA_API int32_t allocmoe_n_layer(const struct llama_context * ctx);

// Experts used per token in each layer from the next decode on. 0 leaves a layer as the model has it;
// an entry above the model's own count is lowered to it. Setting the plan that is already set changes
// nothing: the graphs built for it stay valid.
LLAMA_API int32_t allocmoe_set_plan(struct llama_context * ctx, const int32_t * expert_used_count, int32_t n_layer);

// Back to the model's own expert counts.
LLAMA_API void allocmoe_clear_plan(struct llama_context * ctx);

LLAMA_API bool allocmoe_has_plan(const struct llama_context * ctx);

// What the next decode will use: experts per token in each layer, 0 where a layer routes none.
LLAMA_API int32_t allocmoe_get_plan(const struct llama_context * ctx, int32_t * expert_used_count, int32_t n_layer);

// The same for the model itself, as if no plan were set: the upper bound of every plan.
LLAMA_API int32_t allocmoe_get_full(const struct llama_context * ctx, int32_t * expert_used_count, int32_t n_layer);

// Since the context was made or the counts were reset: expert activations in each layer, and tokens that
// reached its router (the last layer sees only tokens whose logits were asked for).
LLAMA_API int32_t allocmoe_get_counts(const struct llama_context * ctx, int32_t phase, int64_t * activations, int64_t * tokens, int32_t n_layer);

LLAMA_API void allocmoe_reset_counts(struct llama_context * ctx);

// [cffi end]

#ifdef __cplusplus
}
#endif
