// Functions that libllama exports for tests/ alone; not installed. Bound as allocmoe.h is.
#pragma once

#include "allocmoe.h"

#ifdef __cplusplus
extern "C" {
#endif

// [cffi begin]

// The token rule by itself, as the graph runs it: how many of its n_used experts, ranked by falling score, each token
// keeps. scores: [n_tokens][n_used]. left: the activations left over by tokens before, under a strict rule; updated.
LLAMA_API void allocmoe_select(const struct allocmoe_rule * rule, int32_t k, const float * scores, int64_t n_used, int64_t n_tokens, int32_t * n_kept, float * left);

// Has the CPU run the nodes that a device with token rules of its own would get, in graphs built from now on.
LLAMA_API void allocmoe_build_as_for_devices(struct llama_context * ctx, bool on);

// Gives a sequence counts and thresholds of its own, [block_count], under the context's plan; threshold: NULL for rules that
// go by none. expert_used_count: NULL to end that.
LLAMA_API void allocmoe_set_plan_seq(struct llama_context * ctx, int32_t seq_id, const int32_t * expert_used_count, const float * threshold);

// The limit on the experts of a verification by itself, see allocmoe-union.h.
LLAMA_API void allocmoe_select_union(const float * sizes, int32_t n_used, int32_t n_tokens, int32_t n_expert, double share, int32_t * routed, int32_t * n_dropped);

// [cffi end]

#ifdef __cplusplus
}
#endif
