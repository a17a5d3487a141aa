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

// [cffi end]

#ifdef __cplusplus
}
#endif
