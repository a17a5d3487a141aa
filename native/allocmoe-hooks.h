// What the patched llama.cpp files see of allocmoe-edge: handles, and the functions that the hooks call. Nearly all of
// llama.cpp includes this, so it knows no struct of ours: those can change without compiling llama.cpp again.
#pragma once

#include <cstdint>
#include <memory>

struct ggml_cgraph;
struct ggml_context;
struct ggml_tensor;
class llm_graph_result;
struct llama_cparams;
struct llama_hparams;
struct llama_model;
struct llama_model_loader;
struct llama_ubatch;
class allocmoe_expert_cache;

struct allocmoe_model;    // what a model's file carries, allocmoe-file.h
struct allocmoe_settings; // what a context's graphs are built for, allocmoe-plan.h; replaced as a whole, never changed
struct allocmoe_state;    // what a context has spent and recorded, allocmoe-context.h
struct allocmoe_graph;    // what the hooks have built into one graph, allocmoe-graph.h; made by the first that has something

// member of llama_cparams
struct allocmoe_cparams {
    std::shared_ptr<const allocmoe_settings> settings;
    std::shared_ptr<allocmoe_state> state;
};

// While one lives, a fault for which ggml would end the process is an exception in this thread. For what is done with a file
// that may be a stranger's; what was not complete when it came is not freed.
struct allocmoe_catch_faults {
    allocmoe_catch_faults();
    ~allocmoe_catch_faults();
    allocmoe_catch_faults(const allocmoe_catch_faults &)             = delete;
    allocmoe_catch_faults & operator=(const allocmoe_catch_faults &) = delete;
};

// Before a projector's graph is computed, its inputs set: throws std::runtime_error where one of them names a row that a weight
// does not have. In a thread of the computation that would end the process.
void allocmoe_check_rows(ggml_cgraph * graph);

// Tries text, and every token, with a model's vocabulary. Throws, under allocmoe_catch_faults, what would end the process later.
void allocmoe_try_vocab(const llama_model & model);

// Throws std::runtime_error where a LoRA adapter's pair of matrices does not fit the weight that it is for: another number of
// experts than the routed ids go up to, or a type that nothing multiplies.
void allocmoe_check_adapter(const ggml_tensor & weight, const ggml_tensor & a, const ggml_tensor & b);

// What the model's metadata has of allocmoe.*, null if that is nothing. Throws std::runtime_error if it is invalid.
std::shared_ptr<const allocmoe_model> allocmoe_load_model(llama_model_loader & loader, const llama_hparams & hparams);

// Where the caller's overrides ask for an expert cache: has the loader leave routed experts in the file. Null elsewhere. Throws
// std::runtime_error where that cannot be.
std::shared_ptr<allocmoe_expert_cache> allocmoe_make_expert_cache(llama_model_loader & loader);

// When the model's tensors are known, before they are loaded. cache: may be null. Throws std::runtime_error.
void allocmoe_open_expert_cache(const std::shared_ptr<allocmoe_expert_cache> & cache, const llama_model_loader & loader, const llama_model & model);

// Whether a tensor is not to be loaded.
bool allocmoe_stays_in_file(const ggml_tensor * tensor);

// Puts the model's plan into a new context and logs it. Throws std::runtime_error where that cannot be.
void allocmoe_init_context(llama_cparams & cparams, const llama_model & model);

// The number of experts that build_moe_ffn is to rank for each token of layer il, given the architecture's own choice:
// the planned count, or all of them where a token rule picks among them.
int64_t allocmoe_expert_used_count(ggml_context * ctx, const llama_cparams & cparams, llm_graph_result & res, int il, int64_t n_expert_used, int64_t n_tokens);

// The ids that MUL_MAT_ID is to use for these ids.
ggml_tensor * allocmoe_routed(const llm_graph_result & res, ggml_tensor * ids);

// Applies the layer's token rule, if it has one, to the experts ranked by `scores`: from then on allocmoe_routed(selected) has
// -1 for what is skipped. Returns the weights with `skipped` (0, or -infinity ahead of a softmax) in those places.
ggml_tensor * allocmoe_build_token_rule(
    ggml_context * ctx,
    llm_graph_result & res,
    int il,
    ggml_tensor * scores,   // [n_expert, n_tokens]
    ggml_tensor * selected, // [n_expert_used, n_tokens]
    ggml_tensor * weights,  // [1, n_expert_used, n_tokens]
    float skipped);

// Where the layer's rule goes by estimates: as above, for weights that are final, which stay as they are. Remembers the input, for
// the instrument.
void allocmoe_build_estimate(
    ggml_context * ctx,
    llm_graph_result & res,
    int il,
    ggml_tensor * input,    // of the experts, [n_embd, n_tokens]
    ggml_tensor * weights); // [1, n_expert_used, n_tokens]

// Where the instrument records: hands the weighted experts on, and records scores, ids and errors as they pass.
ggml_tensor * allocmoe_build_record(
    ggml_context * ctx,
    llm_graph_result & res,
    int il,
    ggml_tensor * experts, // [n_embd, n_expert_used, n_tokens]
    ggml_tensor * weights, // [1, n_expert_used, n_tokens]
    bool renormalised);

// The weighted sum over each token's experts, [n_embd, n_tokens], and the estimate of the others if
// there is one; a single node where the CPU runs it. Null where upstream's nodes are to do it.
ggml_tensor * allocmoe_build_sum(
    ggml_context * ctx,
    llm_graph_result & res,
    int il,
    ggml_tensor * experts,  // [n_embd, n_expert_used, n_tokens]
    ggml_tensor * weights); // [1, n_expert_used, n_tokens], null if they have been applied

// Ends the building of a graph. Tells the token rules whether they count for prefill or decode; adds what prefetches, and
// what the instrument asks for.
void allocmoe_edit_graph(const llama_cparams & cparams, llm_graph_result & res, const llama_ubatch & ubatch, ggml_context * ctx, ggml_cgraph * gf);

// Adds what one run of the graph activated. Returns false, and logs why, where an expert could not be read: the run is void.
bool allocmoe_count(const llama_cparams & cparams, const llm_graph_result & res, const llama_ubatch & ubatch);
