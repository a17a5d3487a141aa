// What the hooks have built into one graph: the layers that it routes, and what their nodes share.
#pragma once

#include "allocmoe-custom.h"
#include "allocmoe-estimator.h"
#include "allocmoe-instrument.h"
#include "allocmoe-token-rule.h"

#include <cstdint>
#include <deque>
#include <memory>
#include <numeric>

class  llm_graph_result;
struct allocmoe_state;

struct allocmoe_graph {
    struct layer {
        int     il;
        int64_t n_tokens;
        int64_t activations; // by one run of the graph; 0 where the token rule's node counts them

        allocmoe_token_rule_params                params;
        allocmoe_instrument                       instrument;
        std::shared_ptr<allocmoe_state>           state;
        std::shared_ptr<const allocmoe_estimates> estimates;
        int32_t                                   phase; // ALLOCMOE_PHASE_*

        ggml_tensor * positions; // of the tokens, or nullptr where nothing is left over from token to token
        ggml_tensor * selected;  // expert ids by rank
        ggml_tensor * scores;    // what they were ranked by, of all experts
        ggml_tensor * routed;    // the ids with -1 where the token rule skips, or nullptr
        ggml_tensor * input;     // of the experts, or nullptr where nothing reads it
        ggml_tensor * reduced;   // down x of it, or nullptr
        ggml_tensor * estimate;  // of what is skipped, or nullptr

        bool recorded;     // the instrument has its node
        bool renormalised; // the weights of the experts that are used add up to a constant
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

// What is left over before and after token t; positions: null where nothing is left over from token to token.
static inline float allocmoe_left_before(const allocmoe_spent & spent, const ggml_tensor * positions, int64_t t) {
    return positions ? allocmoe_left_before(spent, ((const int32_t *) positions->data)[t]) : 0.0f;
}

static inline void allocmoe_leave(const allocmoe_spent & spent, const ggml_tensor * positions, int64_t t, float left) {
    if (positions) {
        allocmoe_leave(spent, ((const int32_t *) positions->data)[t], left);
    }
}

// Sum of value(0..n - 1), in parts that do not wait for each other.
template <typename F>
static auto allocmoe_sum(int64_t n, F value) {
    decltype(value(0)) parts[8] = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        for (int64_t j = 0; j < 8; ++j) {
            parts[j] += value(i + j);
        }
    }
    for (; i < n; ++i) {
        parts[0] += value(i);
    }
    return std::accumulate(parts, parts + 8, decltype(value(0)){});
}

// Estimated sizes v_e of one token's experts by rank; u: room for as many values as `reduced` has for a token.
void allocmoe_estimate_sizes(
        const ggml_tensor * log_norm,
        const int32_t     * id,
        const ggml_tensor * weights,
        const ggml_tensor * reduced,
        int32_t             n_relu,
        int64_t             t,
        int64_t             n_used,
        float             * u,
        float             * sizes);
