// What the hooks have built into one graph: the layers that it routes, and what their nodes share.
#pragma once

#include "allocmoe-estimator.h"
#include "allocmoe-instrument.h"
#include "allocmoe-token-rule.h"

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

class  llm_graph_result;
struct allocmoe_state;

struct allocmoe_graph {
    struct layer {
        int     il;
        int64_t n_tokens;
        int64_t activations; // by one run of the graph; 0 where the token rule's node counts them

        allocmoe_node                             rule; // rule, value, k_base, k, threshold, strict
        allocmoe_instrument                       instrument;
        std::shared_ptr<allocmoe_state>           state;
        std::shared_ptr<const allocmoe_estimates> estimates;

        ggml_tensor * positions; // of the tokens, or nullptr where nothing is left over from token to token
        ggml_tensor * selected;  // expert ids by rank
        ggml_tensor * scores;    // what they were ranked by, of all experts
        ggml_tensor * routed;    // the ids with -1 where the token rule skips, or nullptr
        ggml_tensor * input;     // of the experts, or nullptr where nothing reads it
        ggml_tensor * reduced;   // down x of it, or nullptr
        ggml_tensor * estimate;  // of what is skipped, or nullptr

        bool recorded;     // the instrument has its node
        bool renormalised; // the weights of the experts that are used add up to a constant
        bool has_room;     // in the records, for the run that comes
        std::vector<float> outputs; // of that node, for one token: [n_used + 1][n_embd]
    };
    std::deque<layer> layers; // nodes point into it

    // Null for a layer that the hooks have not been told of: experts that are given, warm-up.
    layer * find(int il);
};

// The graph's own, made where there is none yet.
allocmoe_graph & allocmoe_graph_of(llm_graph_result & res);

//
// what the nodes' functions share
//

template <typename T>
static const T * allocmoe_row(const ggml_tensor * tensor, int64_t i) {
    return (const T *) ((const char *) tensor->data + i*tensor->nb[1]);
}

static inline float allocmoe_weight(const ggml_tensor * weights, int64_t t, int64_t r) {
    return *(const float *) ((const char *) weights->data + t*weights->nb[2] + r*weights->nb[1]);
}
