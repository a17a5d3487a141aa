// What the patched llama.cpp files see of allocmoe-edge: three small structs and the functions that the hooks call.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

struct gguf_context;
struct llama_cparams;
struct llama_hparams;
struct llama_model;
struct llama_ubatch;

// Immutable once made: contexts share it, and graphs are reused as long as the pointer is the same.
struct allocmoe_plan {
    std::vector<int32_t> expert_used_count; // [block_count], 0: the layer is left as the model has it
    std::string          token_rule;
};

struct allocmoe_counts {
    std::vector<int64_t> activations; // [block_count]
    std::vector<int64_t> tokens;      // [block_count]
};

// member of llama_cparams
struct allocmoe_cparams {
    std::shared_ptr<const allocmoe_plan> plan; // nullptr: the model's own expert counts
    std::shared_ptr<std::array<allocmoe_counts, 2>> counts; // by ALLOCMOE_PHASE_*
};

// member of llm_graph_result: what one run of the graph activates
struct allocmoe_graph {
    struct layer {
        int     il;
        int64_t n_expert_used;
        int64_t n_tokens;
    };
    std::vector<layer> layers;
};

// The plan in the model's metadata, nullptr if there is none. Throws std::runtime_error if it is invalid.
std::shared_ptr<const allocmoe_plan> allocmoe_load_plan(const gguf_context * meta, const llama_hparams & hparams);

// Puts the model's plan into a new context and logs it.
void allocmoe_init_context(llama_cparams & cparams, const llama_model & model);

// The number of experts that build_moe_ffn is to use in layer il, given the architecture's own choice.
int64_t allocmoe_expert_used_count(const llama_cparams & cparams, allocmoe_graph & graph, int il, int64_t n_expert_used, int64_t n_tokens);

// Adds what one run of the graph activated.
void allocmoe_count(const llama_cparams & cparams, const allocmoe_graph & graph, const llama_ubatch & ubatch);
