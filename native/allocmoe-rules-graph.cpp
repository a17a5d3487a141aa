// Experts per layer and token in the graph: planned counts, token rules that go by scores, and what all of them spend.
#include "allocmoe.h"
#include "allocmoe-context.h"
#include "allocmoe-graph.h"
#include "allocmoe-hooks.h"
#include "allocmoe-prefetch.h"
#include "allocmoe-testing.h"

#include "llama-batch.h"
#include "llama-cparams.h"
#include "llama-graph.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

static_assert((int) ALLOCMOE_NODE_RULE_BATCH      == ALLOCMOE_RULE_BATCH     &&
              (int) ALLOCMOE_NODE_RULE_THRESHOLD  == ALLOCMOE_RULE_THRESHOLD &&
              (int) ALLOCMOE_NODE_VALUE_SCORE     == ALLOCMOE_VALUE_SCORE    &&
              (int) ALLOCMOE_NODE_VALUE_RELATIVE  == ALLOCMOE_VALUE_RELATIVE &&
              (int) ALLOCMOE_NODE_VALUE_REMAINING == ALLOCMOE_VALUE_REMAINING, "allocmoe-custom.h repeats allocmoe.h");

allocmoe_graph & allocmoe_graph_of(llm_graph_result & res) {
    if (!res.allocmoe) {
        res.allocmoe = std::make_shared<allocmoe_graph>();
    }
    return *res.allocmoe;
}

allocmoe_graph::layer * allocmoe_graph::find(int il) {
    const auto it = std::find_if(layers.rbegin(), layers.rend(), [il](const layer & x) { return x.il == il; });
    return it == layers.rend() ? nullptr : &*it;
}

ggml_tensor * allocmoe_routed(const llm_graph_result & res, ggml_tensor * ids) {
    if (res.allocmoe) {
        const auto & layers = res.allocmoe->layers;
        for (auto it = layers.rbegin(); it != layers.rend(); ++it) {
            if (it->routed && it->selected == ids) {
                return it->routed;
            }
        }
    }
    return ids;
}

// graph input: the tokens' positions, [n_tokens]
class allocmoe_input_positions : public llm_graph_input_i {
public:
    explicit allocmoe_input_positions(ggml_tensor * positions) : positions(positions) {}

    void set_input(const llama_ubatch * ubatch) override {
        if (positions->buffer) {
            ggml_backend_tensor_set(positions, ubatch->pos, 0, ggml_nbytes(positions));
        }
    }
    bool can_reuse(const llm_graph_params & params) override { return positions->ne[0] == params.ubatch.n_tokens; }

private:
    ggml_tensor * positions;
};

// The input that an earlier layer has made, or a new one; null for a layer that does not see every token.
static ggml_tensor * positions_of(ggml_context * ctx, llm_graph_result & res, const llama_cparams & cparams, int il, int64_t n_tokens) {
    if (il + 1 >= cparams.allocmoe.state->n_layer_main) {
        return nullptr; // behind the choice of the tokens whose output is wanted
    }
    for (const auto & layer : allocmoe_graph_of(res).layers) {
        if (layer.positions) {
            return layer.positions->ne[0] == n_tokens ? layer.positions : nullptr;
        }
    }
    ggml_tensor * positions = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_tokens);
    ggml_set_input(positions);
    ggml_set_name(positions, "allocmoe.positions");
    res.add_input(std::make_unique<allocmoe_input_positions>(positions));
    return positions;
}

int64_t allocmoe_expert_used_count(ggml_context * ctx, const llama_cparams & cparams, llm_graph_result & res, int il, int64_t n_expert_used, int64_t n_tokens) {
    // a warm-up run is there to touch every expert
    if (cparams.warmup || il < 0) {
        return n_expert_used;
    }
    // an architecture may build a second set of experts on the first one's choice: one layer, counted once
    auto & graph = allocmoe_graph_of(res);
    const bool again = graph.find(il) != nullptr;

    const auto & settings = *cparams.allocmoe.settings;
    const bool   record   = settings.instrument.record;
    const auto * plan     = settings.plan.get();
    int64_t k = n_expert_used;
    allocmoe_node rule = {};
    if (plan && il < (int) plan->expert_used_count.size() && plan->expert_used_count[il] > 0) {
        const float threshold = plan->threshold.empty() ? 0.0f : plan->threshold[il];
        const bool estimate = plan->token_rule == ALLOCMOE_RULE_ESTIMATE; // by its threshold alone
        k = estimate ? n_expert_used : std::min<int64_t>(n_expert_used, plan->expert_used_count[il]);

        // with every candidate kept, or none to share, the rule is top-k
        const bool shares   = estimate ? plan->k_base < n_expert_used && threshold > -INFINITY : plan->k_base < k && k < n_expert_used;
        if (plan->token_rule != ALLOCMOE_RULE_OFF && (shares || record) && !again) {
            rule.rule      = plan->token_rule;
            rule.k_base    = std::min<int64_t>(plan->k_base, k);
            rule.k         = std::min<int64_t>(n_expert_used, plan->expert_used_count[il]);
            rule.threshold = threshold;
            rule.strict    = plan->strict && !record;
            rule.value     = plan->value;
            rule.spent     = cparams.allocmoe.state->spent.get() + il;
        }
    }

    if (!again) {
        allocmoe_graph::layer layer = {};
        layer.il          = il;
        layer.n_tokens    = n_tokens;
        layer.activations = k*n_tokens;
        layer.rule        = rule;
        layer.state       = cparams.allocmoe.state;
        layer.positions   = rule.strict ? positions_of(ctx, res, cparams, il, n_tokens) : nullptr;
        if (plan) {
            layer.instrument = settings.instrument;
            layer.estimates  = plan->estimates;
        }
        graph.layers.push_back(std::move(layer));
    }

    return rule.rule == ALLOCMOE_RULE_OFF ? k : n_expert_used;
}

// node: ids by rank, -1 where the token rule skips
static void compute_routed(ggml_tensor * dst, int ith, int /* nth */, void * /* userdata */) {
    allocmoe_node node;
    if (ith != 0 || !allocmoe_get_node(dst, node)) {
        return;
    }
    allocmoe_one_thread   thread;
    allocmoe_route_shared shared;
    allocmoe_route(thread, allocmoe_route_args_of(dst, node), shared);
}

// node: weights, `skipped` where the ids are -1
static void compute_weights(ggml_tensor * dst, int ith, int /* nth */, void * /* userdata */) {
    allocmoe_node node;
    if (ith != 0 || !allocmoe_get_node(dst, node)) {
        return;
    }
    const auto * weights = (const float   *) dst->src[0]->data;
    const auto * routed  = (const int32_t *) dst->src[1]->data;
    auto       * out     = (float         *) dst->data;
    for (int64_t i = 0; i < ggml_nelements(dst); ++i) {
        out[i] = routed[i] >= 0 ? weights[i] : node.skipped;
    }
}

ggml_tensor * allocmoe_build_token_rule(ggml_context * ctx, llm_graph_result & res, int il, ggml_tensor * scores, ggml_tensor * selected, ggml_tensor * weights, float skipped) {
    auto * found = res.allocmoe ? res.allocmoe->find(il) : nullptr;
    if (!found || found->selected) {
        return weights; // experts that are given, or a second set on the first one's choice
    }
    auto & layer = *found;
    layer.selected = selected;
    layer.scores   = scores;
    if (layer.rule.rule == ALLOCMOE_RULE_OFF) {
        return weights;
    }

    layer.activations = 0;
    if (layer.rule.rule == ALLOCMOE_RULE_ESTIMATE) {
        return weights; // goes by the weights that these become
    }

    ggml_tensor * args_routed[] = { selected, scores, layer.positions };
    layer.routed = ggml_custom_4d(ctx, GGML_TYPE_I32, selected->ne[0], selected->ne[1], 1, 1, args_routed, layer.positions ? 3 : 2, compute_routed, 1, nullptr);
    allocmoe_node node = layer.rule;
    node.kind = ALLOCMOE_NODE_IDS;
    allocmoe_set_node(layer.routed, node);

    ggml_tensor * args_weights[] = { weights, layer.routed };
    ggml_tensor * masked = ggml_custom_4d(ctx, GGML_TYPE_F32, weights->ne[0], weights->ne[1], weights->ne[2], 1, args_weights, 2, compute_weights, 1, nullptr);
    node = {};
    node.kind    = ALLOCMOE_NODE_WEIGHTS;
    node.skipped = skipped;
    allocmoe_set_node(masked, node);
    return masked;
}

static int32_t phase_of(const llama_ubatch & ubatch) {
    return ubatch.n_tokens <= ubatch.n_seqs_unq ? ALLOCMOE_PHASE_DECODE : ALLOCMOE_PHASE_PREFILL;
}

void allocmoe_edit_graph(const llama_cparams & cparams, llm_graph_result & res, const llama_ubatch & ubatch, ggml_context * ctx, ggml_cgraph * gf) {
    auto & graph = allocmoe_graph_of(res);
    for (auto & layer : graph.layers) {
        allocmoe_node node;
        if (layer.routed && allocmoe_get_node(layer.routed, node)) {
            node.phase = phase_of(ubatch);
            allocmoe_set_node(layer.routed, node);
        }
    }

    if (cparams.allocmoe.state->prefetch) {
        allocmoe_add_prefetch(ctx, gf);
    }
    allocmoe_edit_for_instrument(cparams.allocmoe.settings->instrument, cparams.allocmoe.state->records, graph, ctx, gf);
}

void allocmoe_count(const llama_cparams & cparams, const llm_graph_result & res, const llama_ubatch & ubatch) {
    auto & phase = cparams.allocmoe.state->phases[phase_of(ubatch)];
    for (const auto & layer : res.allocmoe->layers) {
        phase.activations[layer.il] += layer.activations;
        phase.tokens     [layer.il] += layer.n_tokens;
    }
}

//
// for tests
//

void allocmoe_build_as_for_devices(llama_context * ctx, bool on) {
    allocmoe_access::state(ctx).spent_on_devices = on;
    allocmoe_access::set_settings(ctx, allocmoe_access::settings(ctx));
}

void allocmoe_select(const allocmoe_rule * rule, int32_t k, const float * scores, int64_t n_used, int64_t n_tokens, int32_t * n_kept, float * left) {
    std::vector<int32_t> ids(n_used), routed(n_used*n_tokens), positions(n_tokens);
    std::iota(ids.begin(), ids.end(), 0);
    std::iota(positions.begin(), positions.end(), 1);
    std::vector<float> left_at(n_tokens + 1);
    left_at[0] = *left;
    allocmoe_spent spent = { {}, left_at.data(), (int32_t) left_at.size() };

    allocmoe_route_args args = {};
    args.ids            = ids.data(); // every token's
    args.scores         = scores;
    args.positions      = positions.data();
    args.routed         = routed.data();
    args.stride_scores  = n_used;
    args.n_used         = n_used;
    args.n_tokens       = n_tokens;
    args.node.rule      = rule->token_rule;
    args.node.k_base    = rule->k_base;
    args.node.k         = k;
    args.node.threshold = rule->threshold ? rule->threshold[0] : 0.0f;
    args.node.strict    = rule->strict;
    args.node.value     = rule->value;
    args.node.spent     = &spent;
    allocmoe_one_thread   thread;
    allocmoe_route_shared shared;
    allocmoe_route(thread, args, shared);
    for (int64_t t = 0; t < n_tokens; ++t) {
        n_kept[t] = std::count_if(&routed[t*n_used], &routed[t*n_used] + n_used, [](int32_t id) { return id >= 0; });
    }
    *left = rule->strict ? left_at[n_tokens] : *left;
}
