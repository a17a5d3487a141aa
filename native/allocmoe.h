// Public C API of allocmoe-edge, exported by libllama next to llama.h.
// Python binds it with cffi from the lines between the two marks below, so keep those plain C.
#pragma once

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

// version of the allocmoe.* GGUF keys that this library reads
#define ALLOCMOE_PLAN_VERSION 2

// [cffi begin]

// Return values of the functions below that return int32_t; allocmoe_last_error() says more of those below 0.
enum {
    ALLOCMOE_OK            = 0,
    ALLOCMOE_CHANGED       = 1,  // what is in force is another plan than before
    ALLOCMOE_ERR_N_LAYER   = -1, // n_layer is not the model's block count
    ALLOCMOE_ERR_K         = -2, // an entry is below 0 or above the number of experts
    ALLOCMOE_ERR_PHASE     = -3, // unknown phase
    ALLOCMOE_ERR_RULE      = -4, // unknown token rule or value, k_base below 1, a threshold missing or not a number
    ALLOCMOE_ERR_ESTIMATOR = -5, // sizes that are not the model's, or a number beyond float16's range
    ALLOCMOE_ERR_MEMORY    = -6,
    ALLOCMOE_ERR_BUDGET    = -7, // what the file carries cannot serve it
    ALLOCMOE_ERR_OTHER     = -8,
};

enum {
    ALLOCMOE_TOTAL_OF_FILE = 0
};

// How a layer's planned activations are shared among tokens. k is the layer's planned count.
enum {
    ALLOCMOE_RULE_OFF       = 0, // every token its k best experts
    ALLOCMOE_RULE_BATCH     = 1, // k_base each, and the most valuable rest of the whole micro-batch, k*n_tokens in all
    ALLOCMOE_RULE_THRESHOLD = 2, // k_base each, and every other expert with a value of at least the layer's threshold
    ALLOCMOE_RULE_ESTIMATE  = 3, // the same by estimated size, of any rank, and an estimate in place of what is skipped
};

// What a rule goes by: the value of a token's expert, from the scores that the router ranks it by. The last two are for
// scores that are probabilities, 0 up to 1.
enum {
    ALLOCMOE_VALUE_SCORE     = 0, // the score itself
    ALLOCMOE_VALUE_RELATIVE  = 1, // the score divided by the token's best one
    ALLOCMOE_VALUE_REMAINING = 2, // 1 - sum of the scores of the token's better experts
};

struct allocmoe_rule {
    int32_t token_rule;      // ALLOCMOE_RULE_*
    int32_t value;           // ALLOCMOE_VALUE_*
    int32_t k_base;          // experts that every token keeps, at least 1
    bool strict;             // threshold: the running mean never rises above k; estimate: the threshold moves to keep it near k
    const float * threshold; // one a layer, for ALLOCMOE_RULE_THRESHOLD and _ESTIMATE; copied
};

enum {
    ALLOCMOE_PHASE_PREFILL = 0, // micro-batches with more than one token of some sequence
    ALLOCMOE_PHASE_DECODE  = 1, // micro-batches with one token a sequence
};

// Version of the allocmoe.* GGUF keys that the library reads.
LLAMA_API int32_t allocmoe_plan_version(void);

// Block count of the context's model: the length of every array below.
LLAMA_API int32_t allocmoe_n_layer(const struct llama_context * ctx);

// What was wrong in this thread's last call that returned less than 0, a sentence; "" before there was one.
LLAMA_API const char * allocmoe_last_error(void);

// The plan for `total` expert activations per token, over all layers, from the next decode on: looked up in what the model's
// file carries (or the side file that was loaded last). ALLOCMOE_TOTAL_OF_FILE for the plan in the file itself. The model's
// full budget always works. token_rule: ALLOCMOE_RULE_*, or -1 for the file's. strict: 0, 1, or -1 for 1 under
// ALLOCMOE_RULE_ESTIMATE and 0 else. A token rule that the model's backends cannot run becomes another one, with a warning in
// the log. Ends the budgets of single sequences.
LLAMA_API int32_t allocmoe_set_budget(struct llama_context * ctx, int64_t total, int32_t token_rule, int32_t strict);

// The budgets that allocmoe_set_budget takes under the token rule in force: at least, the file's own, and the model's full one.
// ALLOCMOE_ERR_BUDGET where there is no choice: a dense model, a file without plans.
LLAMA_API int32_t allocmoe_budget_range(const struct llama_context * ctx, int64_t * least, int64_t * of_file, int64_t * full);

// The budget that goes by a name: "full" is the model's own, "balanced" that of the plan in the file, "fast" two thirds of
// that, or the least that the rule serves. token_rule as in allocmoe_set_budget.
LLAMA_API int32_t allocmoe_preset(const struct llama_context * ctx, const char * name, int32_t token_rule, int64_t * total);

// The budget in force, as allocmoe_set_budget takes it: what its plan's counts add up to, but where budgets count milliseconds.
LLAMA_API int32_t allocmoe_get_total(const struct llama_context * ctx, int64_t * total);

// The budget of one sequence in place of the context's, under the context's token rule; ALLOCMOE_TOTAL_OF_FILE ends it. Its
// tokens run in one batch with those of other sequences, each by its own. Under ALLOCMOE_RULE_BATCH sequences with the same
// count in a layer share it. What a strict rule has left over is a sequence's own, by position; llama_memory_seq_cp does not
// take it along, and a token of several sequences counts for the one with the least id.
LLAMA_API int32_t allocmoe_set_budget_seq(struct llama_context * ctx, int32_t seq_id, int64_t total);

// From now on the context's budgets come from this file, a side file as `allocmoe-convert --plan-only` writes, and the plan in
// it is put in force.
LLAMA_API int32_t allocmoe_load_plan_file(struct llama_context * ctx, const char * path);

// A plan by hand: experts used per token in each layer from the next decode on. 0 leaves a layer as the model has it; an entry
// above the model's own count is lowered to it. Setting the plan that is already set changes nothing: the graphs built for it
// stay valid. rule may be NULL for ALLOCMOE_RULE_OFF; one that the model's backends cannot run becomes another, with a
// warning in the log.
LLAMA_API int32_t allocmoe_set_plan(struct llama_context * ctx, const int32_t * expert_used_count, int32_t n_layer, const struct allocmoe_rule * rule);

// The rule in force: ALLOCMOE_RULE_OFF where there is no plan. Under a rule that has thresholds they are copied to threshold,
// [n_layer], and rule->threshold points there.
LLAMA_API int32_t allocmoe_get_rule(const struct llama_context * ctx, struct allocmoe_rule * rule, float * threshold, int32_t n_layer);

// The token rule in force.
LLAMA_API int32_t allocmoe_get_token_rule(const struct llama_context * ctx);

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

// The same for the tokens at the positions first to last - 1 of one sequence, each as it was computed last: to be asked soon
// after their batch, since other text may take their places later.
LLAMA_API int32_t allocmoe_get_spent(const struct llama_context * ctx, int32_t seq_id, int32_t first, int32_t last, int64_t * activations, int64_t * tokens, int32_t n_layer);

// What a strict rule has left over after each of a sequence's first n_tokens positions, [n_layer][n_tokens]: goes with the memory of
// those tokens where that is saved and restored. What a rule cannot leave becomes 0.
LLAMA_API int32_t allocmoe_get_left_seq(struct llama_context * ctx, int32_t seq_id, float * left, int32_t n_tokens);
LLAMA_API int32_t allocmoe_set_left_seq(struct llama_context * ctx, int32_t seq_id, const float * left, int32_t n_tokens);

// Where layer il's experts are: the name of the buffer type, and the bytes of one expert.
LLAMA_API const char * allocmoe_expert_placement(const struct llama_context * ctx, int32_t il, int64_t * n_bytes);

// Whether graphs ask the system for the pages of the experts that a layer has chosen before any of them is read, and page
// faults read nothing beside: for models larger than memory. Applies to experts in mapped files; returns the bytes of them,
// 0 where there are none or the system takes no such advice. Off in a new context.
LLAMA_API int64_t allocmoe_set_prefetch(struct llama_context * ctx, bool prefetch);

// The memory that holds experts of a model larger than memory, whose others stay in its file: asked for when the model is loaded,
// by an override of the key allocmoe.expert_cache_bytes (an integer). Its contexts must not run at the same time. n_layer:
// n_slots is the number of experts that it holds of each layer. Returns the bytes, 0 where there is none.
LLAMA_API int64_t allocmoe_get_expert_cache(const struct llama_context * ctx, int32_t * n_slots, int32_t n_layer);

// Since the model was loaded or the counts were reset, in each layer: experts that were in memory when they were chosen, those
// that were not, and the bytes read for them; of a micro-batch, each expert once. waited_us: microseconds that computing threads
// have waited for the file in both phases, added up.
LLAMA_API int32_t allocmoe_get_cache_counts(const struct llama_context * ctx, int32_t phase, int64_t * hits, int64_t * misses, int64_t * n_bytes, int32_t n_layer, int64_t * waited_us);

// Under ALLOCMOE_RULE_ESTIMATE, for single tokens: an expert that is not at hand runs where its estimated size is sqrt(price) times
// the threshold for one at hand, or that of the file's own plan where that is higher: at full budget, too. At hand are as many experts of a layer as it has slots, those that the
// token's sequence has run last. price: how many times as long an expert takes that has to be read, at least 1. A context begins
// with what an override of the key allocmoe.miss_price (a float) has given when the model was loaded, by default 1; 0 has it
// measured as the model's first context is made, to a power of two. Without effect where there is no expert cache.
LLAMA_API int32_t allocmoe_set_miss_price(struct llama_context * ctx, double price);

// What a context begins with. miss_ms, hit_ms: what was measured, milliseconds of an expert that has to be read, and of one at
// hand; 0 where nothing was. 0 where there is no expert cache.
LLAMA_API double allocmoe_get_miss_price(const struct llama_context * ctx, double * miss_ms, double * hit_ms);

// Under ALLOCMOE_RULE_ESTIMATE, for micro-batches of several tokens from the next decode on, such as those that verify a draft:
// of the experts that any of the tokens would run in a layer, a share runs, those of the largest estimated value for all of them
// together; estimates stand in for the others. Every token keeps the expert that is worth most to it. share: above 0, up to 1,
// which is what a context begins with. In layers that run all of a token's experts there are no estimates, and so no limit.
// ALLOCMOE_ERR_RULE where a share below 1 cannot be had: under another rule, or where the rule runs on a device.
LLAMA_API int32_t allocmoe_set_union_share(struct llama_context * ctx, double share);

// Activations that were left out since the counts were reset, and would not have been with the expert at hand: [n_layer].
LLAMA_API int32_t allocmoe_get_absent(const struct llama_context * ctx, int64_t * n_absent, int32_t n_layer);

// Which experts a sequence has run at each of its first n_tokens positions, by which it is decided what its next tokens find at
// hand: [n_layer][n_tokens][allocmoe_ran_size()], as one context of a model gives it to another. Goes with the memory of those
// tokens, as what is left over does. NULL, or zeros, where nobody knows: there nothing is at hand. Positions further back than a
// context keeps are passed over.
LLAMA_API int32_t allocmoe_get_ran_seq(struct llama_context * ctx, int32_t seq_id, int16_t * ran, int32_t n_tokens);
LLAMA_API int32_t allocmoe_set_ran_seq(struct llama_context * ctx, int32_t seq_id, const int16_t * ran, int32_t n_tokens);

// 0 where there is no expert cache.
LLAMA_API int32_t allocmoe_ran_size(const struct llama_context * ctx);

// Why the last decode failed, where that was the expert cache; "" where it was not.
LLAMA_API const char * allocmoe_expert_cache_error(const struct llama_context * ctx);

// How many positions the model has learned one by one (BERT, GPT-2): a decode beyond them fails. 0 where it computes any.
LLAMA_API int32_t allocmoe_n_positions(const struct llama_context * ctx);

// In builds for GPUs only. The largest part of a model that fits the free memory of the GPUs, with `margin` bytes left over on
// each, by llama.cpp's own choice for its programs: into n_gpu_layers, tensor_split and tensor_buft_overrides of model_params
// (struct llama_model_params), for a context of these context_params (struct llama_context_params). The last two point to
// tensor_split, [llama_max_devices()], and overrides, [llama_max_tensor_buft_overrides()], which have to outlive the loading.
// ALLOCMOE_ERR_MEMORY where the parameters leave it no choice.
LLAMA_API int32_t allocmoe_fit(const char * path, struct llama_model_params * model_params, const struct llama_context_params * context_params, float * tensor_split, struct llama_model_tensor_buft_override * overrides, uint64_t margin);

// Whether the CPU backend of this process may use our kernels (true at first) or llama.cpp's own alone: to compare the two.
// Both skip what a plan leaves out. Not while a model runs.
LLAMA_API void allocmoe_set_cpu_kernels(bool use);

// A logger for llama_log_set that prints errors to stderr and nothing else. No Python runs in it, so none can be interrupted
// inside llama.cpp's calls.
LLAMA_API void allocmoe_log_errors(int32_t level, const char * text, void * user_data);
// The first that it has printed since the last call, "" for none: llama-cpp-python loads a model with stderr shut. Valid until the
// thread's next call.
LLAMA_API const char * allocmoe_take_first_error(void);
// For the same: writes nothing.
LLAMA_API void allocmoe_log_nothing(int32_t level, const char * text, void * user_data);

// [cffi end]

#ifdef __cplusplus
}
#endif
