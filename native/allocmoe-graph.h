// What the hooks have built into one graph: the layers that it routes, and what their nodes share.
#pragma once

#include "allocmoe-estimator.h"
#include "allocmoe-expert-cache.h"
#include "allocmoe-instrument.h"
#include "allocmoe-plan.h"
#include "allocmoe-token-rule.h"

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

class llm_graph_result;
struct allocmoe_state;
struct llama_cparams;

// How a layer is built: what of its token rule is part of the graph, and not a value that the rule's node reads.
struct allocmoe_layer_rule {
    int64_t n_ranked; // experts for each token
    int32_t rule;     // ALLOCMOE_RULE_*, that of the node
    int32_t k_base;
    int32_t value; // ALLOCMOE_VALUE_*
    bool strict;

    bool operator==(const allocmoe_layer_rule & other) const;
};

struct allocmoe_graph {
    // what the nodes of layers with the same tokens read: set before each run
    struct input {
        int64_t n_tokens;
        ggml_tensor * limits; // F32 [2, n_tokens, block_count], allocmoe_limit
        ggml_tensor * places; // I32 [2, n_tokens], allocmoe_place
    };

    struct layer {
        int il;
        int64_t n_tokens;
        int64_t n_full;      // experts for each token without a plan
        int64_t activations; // by one run of the graph; 0 where the token rule's node counts them

        allocmoe_layer_rule rule;
        allocmoe_instrument instrument;
        std::shared_ptr<allocmoe_state> state;
        std::shared_ptr<const allocmoe_plan> plan; // null for the model's own counts

        ggml_tensor * limits;   // of the input with these tokens, or nullptr where there is no rule
        ggml_tensor * places;   // the same
        ggml_tensor * selected; // expert ids by rank
        ggml_tensor * scores;   // what they were ranked by, of all experts
        ggml_tensor * routed;   // the ids with -1 where the token rule skips, or nullptr
        ggml_tensor * input;    // of the experts, or nullptr where nothing reads it
        ggml_tensor * reduced;  // down x of it, or nullptr
        ggml_tensor * estimate; // of what is skipped, or nullptr

        bool recorded;              // the instrument has its node
        bool renormalised;          // the weights of the experts that are used add up to a constant
        bool has_room;              // in the records, for the run that comes
        std::vector<float> outputs; // of that node, for one token: [n_used + 1][n_embd]
    };
    std::deque<layer> layers; // nodes point into it
    std::deque<input> inputs;
    std::deque<allocmoe_expert_cache::request> requests; // of experts that stay in the file

    std::shared_ptr<const allocmoe_settings> settings; // in force
    bool warmup;
    bool for_devices; // allocmoe_state::spent_on_devices

    // Whether it is what would be built under these settings.
    bool serves(const std::shared_ptr<const allocmoe_settings> & other) const;

    // Null for a layer that the hooks have not been told of: experts that are given, warm-up.
    layer * find(int il);
};

// The graph's own, made where there is none yet.
allocmoe_graph & allocmoe_graph_of(llm_graph_result & res, const llama_cparams & cparams);

// Takes all nodes out, to be put back with others between them, by ggml_build_forward_order(): of two branches, such as tokens and
// embeddings as input, the one that is not taken is in the graph too, and must not come to be computed. Inputs stay: they are set
// whether a node reads them or not, so all of them need memory.
void allocmoe_clear_graph(ggml_context * ctx, ggml_cgraph * gf);

// The node that a layer's ids come from, from its sources but for the rule's values.
ggml_tensor * allocmoe_build_routed(ggml_context * ctx, const allocmoe_graph::layer & layer, allocmoe_node node, std::vector<ggml_tensor *> args, ggml_custom_op_t compute, void * userdata = nullptr);

//
// what the nodes' functions share
//

template <typename T>
static const T * allocmoe_row(const ggml_tensor * tensor, int64_t i) {
    return (const T *) ((const char *) tensor->data + i * tensor->nb[1]);
}

static inline float allocmoe_weight(const ggml_tensor * weights, int64_t t, int64_t r) {
    return *(const float *) ((const char *) weights->data + t * weights->nb[2] + r * weights->nb[1]);
}
