// C API of the instrument: what allocmoe-convert measures models with, exported by libllama too. Not for anything that
// only runs models. Python binds it from the lines between the two marks, as it does allocmoe.h.
#pragma once

#include "allocmoe.h"

#ifdef __cplusplus
extern "C" {
#endif

// [cffi begin]

// What ALLOCMOE_RULE_ESTIMATE goes by: for every expert e a small model of its output y_e, and of the size of that, on a few
// directions u = down x of the layer's input x. With w_e the weight of e among all of the token's experts,
//   estimated size:    v_e  = log w_e + log_norm_e . (u, 1), where of the last `n_relu` of u only what is positive counts
//   estimated output:  y'_e = up^T (output_e + the first `rank` of u)
// and a layer gives  sum over kept of w_e y_e + sum over skipped of w_e y'_e.
// Layers without routed experts have entries too; nothing reads them.
struct allocmoe_estimator {
    int32_t n_down;         // at least 1
    int32_t rank;           // 0 to n_down
    int32_t n_relu;         // 0 to n_down - rank
    const float * down;     // [n_layer][n_down][n_embd]
    const float * log_norm; // [n_layer][n_expert][n_down + 1]
    const float * output;   // [n_layer][n_expert][rank]
    const float * up;       // [n_layer][rank][n_embd]
};

struct allocmoe_instrument {
    bool record;         // keep scores, ids and errors of all ranks for allocmoe_take_*, and run all, under any token rule but off
    bool record_inputs;  // with it, what allocmoe_take_floats returns
    bool keep_outputs;   // keep the output of every layer, of the last micro-batch
    int32_t start_layer; // run layers from this one on, on the output kept of the layer before; whole where there is none
    bool skip_logits;    // run no further than the last layer, where it can be told: logits are those of an earlier evaluation
};

// What record_inputs keeps of a layer.
enum {
    ALLOCMOE_FLOATS_INPUT   = 0, // [n_tokens][n_embd] of its experts
    ALLOCMOE_FLOATS_WEIGHT  = 1, // [n_tokens][n_used] of its experts, by rank
    ALLOCMOE_FLOATS_NORM    = 2, // [n_tokens][n_used]: |y_e|, by rank
    ALLOCMOE_FLOATS_MISSING = 3, // [n_tokens][n_embd]: what ALLOCMOE_RULE_ESTIMATE would skip, sum of w_e y_e; only under it
};

// From the next decode on; NULL for none, as in a new context. Setting what is set already changes nothing.
LLAMA_API int32_t allocmoe_set_instrument(struct llama_context * ctx, const struct allocmoe_instrument * instrument);

// What ALLOCMOE_RULE_ESTIMATE is to go by in plans that are set from now on; NULL for what the file carries. Copied, n_layer
// being the block count; down and up are rounded to what they run in, Q4_0, or float16 for down where n_embd is no multiple of
// 32.
LLAMA_API int32_t allocmoe_set_estimator(struct llama_context * ctx, const struct allocmoe_estimator * estimator, int32_t n_layer, int32_t n_expert, int32_t n_embd);

// What layer il has recorded since the last call: the values, which by default are the scores and under
// ALLOCMOE_RULE_ESTIMATE v_e, of the experts by rank, [n_tokens][n_used]. Copies at most n_max floats to values and forgets
// them, or with values NULL only returns how many there are.
LLAMA_API int64_t allocmoe_take_scores(struct llama_context * ctx, int32_t il, float * values, int64_t n_max);

// The same for the ids of those experts, and for the squared error that fewer experts would have made: n_used + 1 sums over
// tokens of |output - output with the k best experts|^2, k = 0..n_used, renormalised where the model renormalises.
LLAMA_API int64_t allocmoe_take_experts(struct llama_context * ctx, int32_t il, int32_t * experts, int64_t n_max);
LLAMA_API int64_t allocmoe_take_errors(struct llama_context * ctx, int32_t il, double * errors, int64_t n_max);

// The same for one of ALLOCMOE_FLOATS_*.
LLAMA_API int64_t allocmoe_take_floats(struct llama_context * ctx, int32_t what, int32_t il, float * values, int64_t n_max);

// Forgets what has been recorded in every layer.
LLAMA_API void allocmoe_clear_records(struct llama_context * ctx);

// What is kept of layer il's output, [n_tokens][n_embd]: copies at most n_max floats to output unless that is NULL, and
// returns how many there are.
LLAMA_API int64_t allocmoe_get_kept_output(const struct llama_context * ctx, int32_t il, float * output, int64_t n_max);

// [cffi end]

#ifdef __cplusplus
}
#endif
