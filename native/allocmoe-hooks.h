// What the patched llama.cpp files see of allocmoe-edge: three small structs and the functions that the hooks call.
#pragma once

#include "allocmoe-custom.h"
#include "allocmoe-token-rule.h"

#include "ggml-cpp.h"

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

struct ggml_cgraph;
struct ggml_context;
struct ggml_tensor;
struct gguf_context;
class  llm_graph_result;
struct llama_cparams;
struct llama_hparams;
struct llama_model;
struct llama_ubatch;

// allocmoe_estimator as the graph reads it.
struct allocmoe_estimates {
    // where the layers' routers are
    std::vector<ggml_context_ptr>        contexts;
    std::vector<ggml_backend_buffer_ptr> buffers;

    struct layer {
        ggml_tensor * down;     // Q4_0, or F16 where n_embd is no multiple of its block, [n_embd, n_down]
        ggml_tensor * log_norm; // F32 [n_down + 1, n_expert]
        ggml_tensor * output;   // F32 [rank, n_expert], null for rank 0
        ggml_tensor * up;       // Q4_0 [rank padded with zeros, n_embd], null for rank 0
    };
    std::vector<layer> layers; // [block_count]
    int32_t            n_relu = 0;
};

// Immutable once made: contexts share it, and graphs are reused as long as the pointer is the same.
struct allocmoe_plan {
    std::vector<int32_t> expert_used_count; // [block_count], 0: the layer is left as the model has it

    int32_t            token_rule = ALLOCMOE_RULE_OFF;
    int32_t            k_base     = 1;
    int32_t            value      = ALLOCMOE_VALUE_SCORE;
    bool               strict     = false;
    bool               record       = false;
    bool               keep_outputs = false;
    int32_t            start_layer  = 0;
    bool               record_inputs = false;
    std::vector<float> threshold; // [block_count], for ALLOCMOE_RULE_THRESHOLD and _ESTIMATE

    std::shared_ptr<const allocmoe_estimates> estimates; // for ALLOCMOE_RULE_ESTIMATE

    bool operator==(const allocmoe_plan & other) const;
};

// What a context has spent so far.
struct allocmoe_usage {
    struct phase {
        std::vector<int64_t> activations; // [block_count], but for those that token rules count
        std::vector<int64_t> tokens;      // [block_count]
    };
    std::array<phase, 2> phases; // by ALLOCMOE_PHASE_*
    // [block_count], written by the nodes of the token rules: to be read after the context has been synchronised
    std::shared_ptr<allocmoe_spent> spent;
    bool                            spent_on_devices = false; // the model's devices can write it too

    int32_t n_layer_main = 0; // layers before the model's heads for further tokens, if it has any

    struct record {
        std::vector<float>   scores;  // [n_tokens][n_used], as values
        std::vector<int32_t> experts; // [n_tokens][n_used]
        std::vector<double>  errors;  // [n_used + 1]
        std::array<std::vector<float>, 4> floats; // by ALLOCMOE_FLOATS_*
    };
    std::vector<record>             records;       // [block_count]
    std::vector<std::vector<float>> layer_outputs; // [block_count], of the last micro-batch that kept them

    bool prefetch = false; // graphs ask the system for the chosen experts' pages
};

// member of llama_cparams
struct allocmoe_cparams {
    std::shared_ptr<const allocmoe_plan> plan; // nullptr: the model's own expert counts
    std::shared_ptr<allocmoe_usage>      usage;
    std::shared_ptr<const allocmoe_estimates> estimates; // for plans to come
};

// member of llm_graph_result: the layers that the graph routes
struct allocmoe_graph {
    struct layer {
        int     il;
        int64_t n_tokens;
        int64_t activations; // by one run of the graph; 0 where the token rule's node counts them

        allocmoe_token_rule_params      params;
        bool                            record;
        bool                            record_inputs;
        std::shared_ptr<allocmoe_usage> usage;
        std::shared_ptr<const allocmoe_estimates> estimates;
        int32_t                         phase; // ALLOCMOE_PHASE_*

        ggml_tensor * positions; // of the tokens, or nullptr where nothing is left over from token to token
        ggml_tensor * selected; // expert ids by rank
        ggml_tensor * scores;   // what they were ranked by, of all experts
        ggml_tensor * routed;   // the ids with -1 where the token rule skips, or nullptr
        ggml_tensor * input;    // of the experts, or nullptr where nothing reads it
        ggml_tensor * reduced;  // down x of it, or nullptr
        ggml_tensor * estimate; // of what is skipped, or nullptr

        bool recorded     = false;
        bool renormalised = false; // the weights of the experts that are used add up to a constant
    };
    std::deque<layer> layers; // nodes point into it

    // the ids that MUL_MAT_ID is to use for these ids
    ggml_tensor * routed(ggml_tensor * ids) const;
};

// The plan in the model's metadata, nullptr if there is none. Throws std::runtime_error if it is invalid.
std::shared_ptr<const allocmoe_plan> allocmoe_load_plan(const gguf_context * meta, const llama_hparams & hparams);

// Puts the model's plan into a new context and logs it.
void allocmoe_init_context(llama_cparams & cparams, const llama_model & model);

// The number of experts that build_moe_ffn is to rank for each token of layer il, given the architecture's own choice:
// the planned count, or all of them where a token rule picks among them.
int64_t allocmoe_expert_used_count(ggml_context * ctx, const llama_cparams & cparams, llm_graph_result & res, int il, int64_t n_expert_used, int64_t n_tokens);

// Applies the layer's token rule, if it has one, to the experts ranked by `scores`: from then on graph.routed(selected) has
// -1 for what is skipped. Returns the weights with `skipped` (0, or -infinity ahead of a softmax) in those places.
ggml_tensor * allocmoe_build_token_rule(
        ggml_context   * ctx,
        allocmoe_graph & graph,
        ggml_tensor    * scores,   // [n_expert, n_tokens]
        ggml_tensor    * selected, // [n_expert_used, n_tokens]
        ggml_tensor    * weights,  // [1, n_expert_used, n_tokens]
        float            skipped);

// Where the layer's rule goes by estimates: as above, for weights that are final, which stay as they are. Where the plan
// records inputs: remembers the input.
void allocmoe_build_estimate(
        ggml_context   * ctx,
        allocmoe_graph & graph,
        ggml_tensor    * input,    // of the experts, [n_embd, n_tokens]
        ggml_tensor    * weights); // [1, n_expert_used, n_tokens]

// Where the plan records: hands the weighted experts on, and records scores, ids and errors as they pass.
ggml_tensor * allocmoe_build_record(
        ggml_context   * ctx,
        allocmoe_graph & graph,
        ggml_tensor    * experts, // [n_embd, n_expert_used, n_tokens]
        ggml_tensor    * weights, // [1, n_expert_used, n_tokens]
        bool             renormalised);

// Where a token rule is on: the weighted sum over each token's experts, [n_embd, n_tokens], and the estimate of the others if
// there is one; a single node where the CPU runs it. Null where upstream's nodes are to do it.
ggml_tensor * allocmoe_build_sum(
        ggml_context         * ctx,
        const allocmoe_graph & graph,
        ggml_tensor          * experts,  // [n_embd, n_expert_used, n_tokens]
        ggml_tensor          * weights); // [1, n_expert_used, n_tokens], null if they have been applied

// Tells the token rules whether they count for prefill or decode. Where the plan keeps the layers' outputs: adds nodes for
// that. Where it starts at a later layer whose input has been kept: removes what only leads there.
void allocmoe_edit_graph(const llama_cparams & cparams, allocmoe_graph & graph, const llama_ubatch & ubatch, ggml_context * ctx, ggml_cgraph * gf);

// Adds what one run of the graph activated.
void allocmoe_count(const llama_cparams & cparams, const allocmoe_graph & graph, const llama_ubatch & ubatch);
