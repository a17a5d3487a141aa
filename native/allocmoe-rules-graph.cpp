// Experts per layer and token in the graph: planned counts, token rules that go by scores, and what all of them spend.
#include "allocmoe.h"
#include "allocmoe-context.h"
#include "allocmoe-expert-cache.h"
#include "allocmoe-graph.h"
#include "allocmoe-hooks.h"
#include "allocmoe-prefetch.h"
#include "allocmoe-testing.h"

#include "llama-batch.h"
#include "llama-cparams.h"
#include "llama-graph.h"
#include "llama-impl.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

static_assert((int) ALLOCMOE_NODE_RULE_BATCH == ALLOCMOE_RULE_BATCH &&
                  (int) ALLOCMOE_NODE_RULE_THRESHOLD == ALLOCMOE_RULE_THRESHOLD &&
                  (int) ALLOCMOE_NODE_VALUE_SCORE == ALLOCMOE_VALUE_SCORE &&
                  (int) ALLOCMOE_NODE_VALUE_RELATIVE == ALLOCMOE_VALUE_RELATIVE &&
                  (int) ALLOCMOE_NODE_VALUE_REMAINING == ALLOCMOE_VALUE_REMAINING,
    "allocmoe-custom.h repeats allocmoe.h");

// Of several that of the least id: the order in which they lie is a hash table's.
static int32_t sequence_of(const llama_ubatch & ubatch, int64_t t) {
    return ubatch.seq_id && ubatch.n_seq_id[t] > 0 ? *std::min_element(ubatch.seq_id[t], ubatch.seq_id[t] + ubatch.n_seq_id[t]) : 0;
}

// The place of a token's position, or of the one so many after it, in what is kept by position; -1 for none.
static int32_t place_of(const llama_ubatch & ubatch, int64_t t, int32_t offset, int32_t n_left) {
    const int32_t position = ubatch.pos[t] + offset;
    return position >= 0 ? sequence_of(ubatch, t) * n_left + position % n_left : -1;
}

// What the graph's inputs are set from: a plan for each token.
class allocmoe_input : public llm_graph_input_i {
public:
    explicit allocmoe_input(std::shared_ptr<allocmoe_graph> graph) : graph(std::move(graph)) {}

    void set_input(const llama_ubatch * ubatch) override {
        for (const auto & input : graph->inputs) {
            if (input.limits->buffer) {
                set_limits(input, *ubatch);
            }
            if (input.places->buffer) {
                set_places(input, *ubatch);
            }
        }
    }

    bool can_reuse(const llm_graph_params & params) override {
        const auto & settings = params.cparams.allocmoe.settings;
        if (graph->warmup != params.cparams.warmup || graph->for_devices != params.cparams.allocmoe.state->spent_on_devices || !graph->serves(settings)) {
            return false;
        }
        graph->settings = settings;
        return true;
    }

private:
    void set_limits(const allocmoe_graph::input & input, const llama_ubatch & ubatch) {
        limits.resize(ggml_nelements(input.limits) / 2);
        // a layer behind the choice of the tokens whose output is wanted sees those alone
        const bool all = input.n_tokens == ubatch.n_tokens;
        int64_t to     = 0;
        const auto set = [&](const allocmoe_plan & plan) {
            for (const auto & layer : graph->layers) {
                if (layer.limits == input.limits) {
                    limits[layer.il * input.n_tokens + to] = limit_of(plan, layer);
                }
            }
            ++to;
        };
        for (uint32_t t = 0; t < ubatch.n_tokens && to < input.n_tokens; ++t) {
            if (all || (ubatch.output && ubatch.output[t])) {
                set(graph->settings->plan_of(sequence_of(ubatch, t)));
            }
        }
        while (to < input.n_tokens) {
            set(*graph->settings->plan); // of what these tokens are, nobody has said anything
        }
        ggml_backend_tensor_set(input.limits, limits.data(), 0, ggml_nbytes(input.limits));
    }

    static allocmoe_limit limit_of(const allocmoe_plan & plan, const allocmoe_graph::layer & layer) {
        const int32_t k      = plan.expert_used_count[layer.il];
        allocmoe_limit limit = { (float) (k > 0 ? k : layer.n_full), plan.threshold.empty() ? 0.0f : plan.threshold[layer.il] };
        // all, or no more than every token keeps: without a say of the threshold
        if (plan.token_rule != ALLOCMOE_RULE_ESTIMATE && !layer.instrument.record) {
            limit.threshold = limit.k >= layer.n_full ? -INFINITY : limit.k <= layer.rule.k_base ? INFINITY
                                                                                                 : limit.threshold;
        }
        return limit;
    }

    void set_places(const allocmoe_graph::input & input, const llama_ubatch & ubatch) {
        const int32_t n_left = graph->layers.front().state->spent.get()->n_left;
        places.assign(input.n_tokens, { -1, -1 });
        const bool all = input.n_tokens == ubatch.n_tokens;
        int64_t to     = 0;
        for (uint32_t t = 0; t < ubatch.n_tokens && to < input.n_tokens; ++t) {
            if (all || (ubatch.output && ubatch.output[t])) {
                places[to++] = { place_of(ubatch, t, -1, n_left), place_of(ubatch, t, 0, n_left) };
            }
        }
        ggml_backend_tensor_set(input.places, places.data(), 0, ggml_nbytes(input.places));
    }

    std::shared_ptr<allocmoe_graph> graph;
    std::vector<allocmoe_limit> limits;
    std::vector<allocmoe_place> places;
};

allocmoe_graph & allocmoe_graph_of(llm_graph_result & res, const llama_cparams & cparams) {
    if (!res.allocmoe) {
        res.allocmoe              = std::make_shared<allocmoe_graph>();
        res.allocmoe->settings    = cparams.allocmoe.settings;
        res.allocmoe->warmup      = cparams.warmup;
        res.allocmoe->for_devices = cparams.allocmoe.state->spent_on_devices;
        res.add_input(std::make_unique<allocmoe_input>(res.allocmoe));
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

bool allocmoe_layer_rule::operator==(const allocmoe_layer_rule & other) const {
    return n_ranked == other.n_ranked && rule == other.rule && k_base == other.k_base && value == other.value && strict == other.strict;
}

static float threshold_of(const std::vector<float> & thresholds, int il) {
    return thresholds.empty() ? -INFINITY : thresholds[il];
}

static allocmoe_layer_rule rule_of(const allocmoe_settings & settings, int il, int64_t n_full) {
    allocmoe_layer_rule rule = { n_full, ALLOCMOE_RULE_OFF, 0, 0, false };
    const auto * plan        = settings.plan.get();
    if (!plan || il >= (int) plan->expert_used_count.size() || plan->expert_used_count[il] == 0) {
        return rule;
    }
    // over the context's plan and those of its sequences
    int64_t least = n_full, most = 1;
    bool shares        = false; // with every candidate kept, or none to share, the rule is top-k
    const auto look_at = [&](const allocmoe_plan & x) {
        const int64_t k = x.expert_used_count[il] > 0 ? std::min<int64_t>(n_full, x.expert_used_count[il]) : n_full;
        least           = std::min(least, k);
        most            = std::max(most, k);
        shares          = shares || (x.token_rule == ALLOCMOE_RULE_ESTIMATE
                                            ? x.k_base < n_full && std::max(threshold_of(x.threshold, il), settings.priced ? threshold_of(x.miss_threshold, il) : -INFINITY) > -INFINITY // by its thresholds alone
                                            : x.k_base < k && k < n_full);
    };
    look_at(*plan);
    for (const auto & seq : settings.seq_plans) {
        look_at(*seq.second);
    }

    const bool record = settings.instrument.record;
    rule.k_base       = plan->k_base;
    rule.value        = plan->value;
    rule.strict       = plan->strict && !record;
    if (plan->token_rule == ALLOCMOE_RULE_ESTIMATE) {
        rule.rule = (shares || record) && plan->estimates->layers[il].down ? ALLOCMOE_RULE_ESTIMATE : ALLOCMOE_RULE_OFF;
    } else if (plan->token_rule != ALLOCMOE_RULE_OFF && (shares || record || least < most)) {
        rule.rule = plan->token_rule;
    } else if (least < most) {
        // top-k with a count for each token: what every token keeps, as far as its count goes, is all there is
        rule = { most, ALLOCMOE_RULE_THRESHOLD, (int32_t) most, ALLOCMOE_VALUE_SCORE, false };
    } else if (plan->token_rule != ALLOCMOE_RULE_ESTIMATE) {
        rule.n_ranked = most;
    }
    return rule;
}

bool allocmoe_graph::serves(const std::shared_ptr<const allocmoe_settings> & other) const {
    if (other == settings) {
        return true;
    }
    if (!(settings->instrument == other->instrument) || (settings->instrument.record && settings->plan != other->plan)) {
        return false;
    }
    return std::all_of(layers.begin(), layers.end(), [&](const layer & x) {
        const auto rule = rule_of(*other, x.il, x.n_full);
        return rule == x.rule && (rule.rule != ALLOCMOE_RULE_ESTIMATE || other->plan->estimates == x.plan->estimates);
    });
}

void allocmoe_clear_graph(ggml_context * ctx, ggml_cgraph * gf) {
    ggml_graph_clear(gf);
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
        if (t->flags & GGML_TENSOR_FLAG_INPUT) {
            ggml_build_forward_expand(gf, t);
        }
    }
}

// The values of the rule that a layer with so many tokens reads: those of an earlier layer, or new ones.
static allocmoe_graph::input & values_of(ggml_context * ctx, allocmoe_graph & graph, int64_t n_tokens, int64_t n_layer) {
    for (auto & input : graph.inputs) {
        if (input.n_tokens == n_tokens) {
            return input;
        }
    }
    ggml_tensor * limits = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 2, n_tokens, n_layer);
    ggml_set_input(limits);
    ggml_set_name(limits, "allocmoe.limits");
    ggml_tensor * places = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 2, n_tokens);
    ggml_set_input(places);
    ggml_set_name(places, "allocmoe.places");
    graph.inputs.push_back({ n_tokens, limits, places });
    return graph.inputs.back();
}

int64_t allocmoe_expert_used_count(ggml_context * ctx, const llama_cparams & cparams, llm_graph_result & res, int il, int64_t n_expert_used, int64_t n_tokens) {
    auto & graph = allocmoe_graph_of(res, cparams);
    // a warm-up run is there to touch every expert; those that stay in the file are not to be read in vain
    if (cparams.warmup || il < 0) {
        return cparams.warmup && cparams.allocmoe.state->cache ? 1 : n_expert_used;
    }
    const auto & settings = *cparams.allocmoe.settings;
    const auto & state    = cparams.allocmoe.state;
    const auto rule       = rule_of(settings, il, n_expert_used);
    // an architecture may build a second set of experts on the first one's choice: one layer, counted once
    if (!graph.find(il)) {
        allocmoe_graph::layer layer = {};
        layer.il                    = il;
        layer.n_tokens              = n_tokens;
        layer.n_full                = n_expert_used;
        layer.activations           = rule.n_ranked * n_tokens;
        layer.rule                  = rule;
        layer.state                 = state;
        layer.plan                  = settings.plan;
        layer.instrument            = settings.plan ? settings.instrument : allocmoe_instrument{};
        if (rule.rule != ALLOCMOE_RULE_OFF) {
            auto & values = values_of(ctx, graph, n_tokens, state->phases[0].tokens.size());
            layer.limits  = values.limits;
            layer.places  = values.places;
        }
        graph.layers.push_back(std::move(layer));
    }
    return rule.n_ranked;
}

ggml_tensor * allocmoe_build_routed(ggml_context * ctx, const allocmoe_graph::layer & layer, allocmoe_node node, std::vector<ggml_tensor *> args, ggml_custom_op_t compute, void * userdata) {
    args.push_back(layer.limits);
    args.push_back(layer.places);
    ggml_tensor * routed = ggml_custom_4d(ctx, GGML_TYPE_I32, layer.selected->ne[0], layer.selected->ne[1], 1, 1, args.data(), args.size(), compute, 1, userdata);
    // behind the choice of the tokens whose output is wanted nothing is left over from token to token
    const bool alone = layer.il + 1 >= layer.state->n_layer_main;
    node.strict      = !layer.rule.strict ? 0 : alone ? ALLOCMOE_NODE_STRICT_ALONE
                                                      : ALLOCMOE_NODE_STRICT;
    node.rule        = layer.rule.rule;
    node.value       = layer.rule.value;
    node.k_base      = layer.rule.k_base;
    node.il          = layer.il;
    node.spent       = layer.state->spent.get() + layer.il;
    allocmoe_set_node(routed, node);
    return routed;
}

// node: ids by rank, -1 where the token rule skips
static void compute_routed(ggml_tensor * dst, int ith, int /* nth */, void * /* userdata */) {
    allocmoe_node node;
    if (ith != 0 || !allocmoe_get_node(dst, node)) {
        return;
    }
    allocmoe_one_thread thread;
    allocmoe_route_shared shared;
    allocmoe_route(thread, allocmoe_route_args_of(dst, node), shared);
}

// node: weights, `skipped` where the ids are -1
static void compute_weights(ggml_tensor * dst, int ith, int /* nth */, void * /* userdata */) {
    allocmoe_node node;
    if (ith != 0 || !allocmoe_get_node(dst, node)) {
        return;
    }
    const auto * weights = (const float *) dst->src[0]->data;
    const auto * routed  = (const int32_t *) dst->src[1]->data;
    auto * out           = (float *) dst->data;
    for (int64_t i = 0; i < ggml_nelements(dst); ++i) {
        out[i] = routed[i] >= 0 ? weights[i] : node.skipped;
    }
}

ggml_tensor * allocmoe_build_token_rule(ggml_context * ctx, llm_graph_result & res, int il, ggml_tensor * scores, ggml_tensor * selected, ggml_tensor * weights, float skipped) {
    auto * found = res.allocmoe ? res.allocmoe->find(il) : nullptr;
    if (!found || found->selected) {
        return weights; // experts that are given, or a second set on the first one's choice
    }
    auto & layer   = *found;
    layer.selected = selected;
    layer.scores   = scores;
    if (layer.rule.rule == ALLOCMOE_RULE_OFF) {
        return weights;
    }

    layer.activations = 0;
    if (layer.rule.rule == ALLOCMOE_RULE_ESTIMATE) {
        return weights; // goes by the weights that these become
    }

    allocmoe_node node = {};
    node.kind          = ALLOCMOE_NODE_IDS;
    layer.routed       = allocmoe_build_routed(ctx, layer, node, { selected, scores }, compute_routed);

    ggml_tensor * args_weights[] = { weights, layer.routed };
    ggml_tensor * masked         = ggml_custom_4d(ctx, GGML_TYPE_F32, weights->ne[0], weights->ne[1], weights->ne[2], 1, args_weights, 2, compute_weights, 1, nullptr);
    node                         = {};
    node.kind                    = ALLOCMOE_NODE_WEIGHTS;
    node.skipped                 = skipped;
    allocmoe_set_node(masked, node);
    return masked;
}

static int32_t phase_of(const llama_ubatch & ubatch) {
    return ubatch.n_tokens <= ubatch.n_seqs_unq ? ALLOCMOE_PHASE_DECODE : ALLOCMOE_PHASE_PREFILL;
}

void allocmoe_edit_graph(const llama_cparams & cparams, llm_graph_result & res, const llama_ubatch & ubatch, ggml_context * ctx, ggml_cgraph * gf) {
    auto & graph = allocmoe_graph_of(res, cparams);
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
    auto instrument        = cparams.allocmoe.settings->instrument;
    instrument.skip_logits = instrument.skip_logits && !cparams.embeddings && !cparams.embeddings_nextn; // which come after them
    allocmoe_edit_for_instrument(instrument, cparams.allocmoe.state->records, graph, ctx, gf, res.t_logits);
    if (auto * cache = cparams.allocmoe.state->cache) {
        cache->add_requests(ctx, gf, phase_of(ubatch), graph.requests);
    }
}

bool allocmoe_count(const llama_cparams & cparams, const llm_graph_result & res, const llama_ubatch & ubatch) {
    if (auto * cache = cparams.allocmoe.state->cache) {
        auto & error = cparams.allocmoe.state->cache_error;
        error        = cache->take_error();
        if (!error.empty()) {
            LLAMA_LOG_ERROR("allocmoe: %s\n", error.c_str());
            return false;
        }
    }
    auto & phase = cparams.allocmoe.state->phases[phase_of(ubatch)];
    for (const auto & layer : res.allocmoe->layers) {
        phase.activations[layer.il] += layer.activations;
        phase.tokens[layer.il] += layer.n_tokens;
        // what each token has spent, where no node notes it
        const bool all    = layer.n_tokens == ubatch.n_tokens;
        const auto & kept = *(cparams.allocmoe.state->spent.get() + layer.il);
        auto & ran        = cparams.allocmoe.state->ran;
        for (uint32_t t = 0; t < ubatch.n_tokens; ++t) {
            const bool reached  = all || (ubatch.output && ubatch.output[t]);
            const int32_t place = place_of(ubatch, t, 0, kept.n_left);
            if (place >= 0 && (!layer.routed || !reached)) {
                kept.kept[place] = reached ? layer.rule.n_ranked + 1 : 0;
            }
            // not what a text before it has run at this position
            if (place >= 0 && ran.n_place > 0 && (!layer.routed || !reached || layer.rule.rule != ALLOCMOE_RULE_ESTIMATE)) {
                ran.at(layer.il, place)[0] = ALLOCMOE_RAN_NOTHING;
            }
        }
    }
    return true;
}

//
// for tests
//

void allocmoe_build_as_for_devices(llama_context * ctx, bool on) {
    allocmoe_access::state(ctx).spent_on_devices = on;
    allocmoe_access::set_settings(ctx, allocmoe_access::settings(ctx));
}

void allocmoe_select(const allocmoe_rule * rule, int32_t k, const float * scores, int64_t n_used, int64_t n_tokens, int32_t * n_kept, float * left) {
    std::vector<int32_t> ids(n_used), routed(n_used * n_tokens);
    std::iota(ids.begin(), ids.end(), 0);
    std::vector<allocmoe_limit> limits(n_tokens, { (float) k, rule->threshold ? rule->threshold[0] : 0.0f });
    std::vector<allocmoe_place> places;
    for (int32_t t = 0; t < n_tokens; ++t) {
        places.push_back({ t, t + 1 });
    }
    std::vector<float> left_at(n_tokens + 1);
    left_at[0] = *left;
    std::vector<uint16_t> kept(n_tokens + 1);
    allocmoe_spent spent = { {}, left_at.data(), kept.data(), (int32_t) left_at.size() };

    allocmoe_route_args args = {};
    args.ids                 = ids.data(); // every token's
    args.scores              = scores;
    args.limits              = limits.data();
    args.places              = places.data();
    args.routed              = routed.data();
    args.stride_scores       = n_used;
    args.n_used              = n_used;
    args.n_tokens            = n_tokens;
    args.node.rule           = rule->token_rule;
    args.node.k_base         = rule->k_base;
    args.node.strict         = rule->strict;
    args.node.value          = rule->value;
    args.node.spent          = &spent;
    allocmoe_one_thread thread;
    allocmoe_route_shared shared;
    allocmoe_route(thread, args, shared);
    for (int64_t t = 0; t < n_tokens; ++t) {
        n_kept[t] = std::count_if(&routed[t * n_used], &routed[t * n_used] + n_used, [](int32_t id) { return id >= 0; });
    }
    *left = rule->strict ? left_at[n_tokens] : *left;
}

void allocmoe_set_plan_seq(llama_context * ctx, int32_t seq_id, const int32_t * expert_used_count, const float * threshold) {
    allocmoe_settings settings = allocmoe_access::settings(ctx);
    settings.seq_plans.erase(seq_id);
    if (expert_used_count) {
        auto plan = std::make_shared<allocmoe_plan>(*settings.plan);
        std::copy_n(expert_used_count, plan->expert_used_count.size(), plan->expert_used_count.begin());
        if (threshold) {
            std::copy_n(threshold, plan->threshold.size(), plan->threshold.begin());
        }
        settings.seq_plans[seq_id] = std::move(plan);
    }
    allocmoe_access::set_settings(ctx, std::move(settings));
}
