// The hooks that shape and follow a graph: experts per layer and token, and what calibration records.
#include "allocmoe.h"
#include "allocmoe-hooks.h"
#include "allocmoe-prefetch.h"

#include "llama-batch.h"
#include "llama-cparams.h"
#include "llama-graph.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <numeric>

static_assert((int) ALLOCMOE_NODE_RULE_BATCH      == ALLOCMOE_RULE_BATCH     &&
              (int) ALLOCMOE_NODE_RULE_THRESHOLD  == ALLOCMOE_RULE_THRESHOLD &&
              (int) ALLOCMOE_NODE_VALUE_SCORE     == ALLOCMOE_VALUE_SCORE    &&
              (int) ALLOCMOE_NODE_VALUE_RELATIVE  == ALLOCMOE_VALUE_RELATIVE &&
              (int) ALLOCMOE_NODE_VALUE_REMAINING == ALLOCMOE_VALUE_REMAINING, "allocmoe-custom.h repeats allocmoe.h");

ggml_tensor * allocmoe_graph::routed(ggml_tensor * ids) const {
    for (auto it = layers.rbegin(); it != layers.rend(); ++it) {
        if (it->routed && it->selected == ids) {
            return it->routed;
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
    if (il + 1 >= cparams.allocmoe.usage->n_layer_main) {
        return nullptr; // behind the choice of the tokens whose output is wanted
    }
    for (const auto & layer : res.allocmoe.layers) {
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
    auto & graph = res.allocmoe;
    // a warm-up run is there to touch every expert
    if (cparams.warmup || il < 0) {
        return n_expert_used;
    }
    // an architecture may build a second set of experts on the first one's choice: one layer, counted once
    const bool again = !graph.layers.empty() && graph.layers.back().il == il;

    const auto * plan = cparams.allocmoe.plan.get();
    int64_t k = n_expert_used;
    allocmoe_token_rule_params params = {};
    if (plan && il < (int) plan->expert_used_count.size() && plan->expert_used_count[il] > 0) {
        const float threshold = plan->threshold.empty() ? 0.0f : plan->threshold[il];
        const bool estimate = plan->token_rule == ALLOCMOE_RULE_ESTIMATE; // by its threshold alone
        k = estimate ? n_expert_used : std::min<int64_t>(n_expert_used, plan->expert_used_count[il]);

        // with every candidate kept, or none to share, the rule is top-k
        const bool shares   = estimate ? plan->k_base < n_expert_used && threshold > -INFINITY : plan->k_base < k && k < n_expert_used;
        if (plan->token_rule != ALLOCMOE_RULE_OFF && (shares || plan->record) && !again) {
            params.rule      = plan->token_rule;
            params.k_base    = std::min<int64_t>(plan->k_base, k);
            params.k         = std::min<int64_t>(n_expert_used, plan->expert_used_count[il]);
            params.threshold = threshold;
            params.strict    = plan->strict && !plan->record;
            params.value     = plan->value;
        }
    }

    if (!again) {
        allocmoe_graph::layer layer = {};
        layer.il          = il;
        layer.n_tokens    = n_tokens;
        layer.activations = k*n_tokens;
        layer.params      = params;
        layer.usage       = cparams.allocmoe.usage;
        layer.positions   = params.strict ? positions_of(ctx, res, cparams, il, n_tokens) : nullptr;
        if (plan) {
            layer.record        = plan->record;
            layer.record_inputs = plan->record && plan->record_inputs;
            layer.estimates     = plan->estimates;
        }
        graph.layers.push_back(std::move(layer));
    }

    return params.rule == ALLOCMOE_RULE_OFF ? k : n_expert_used;
}

// positions: null where nothing is left over from token to token
static float left_before(const allocmoe_spent & spent, const ggml_tensor * positions, int64_t t) {
    return positions ? allocmoe_left_before(spent, ((const int32_t *) positions->data)[t]) : 0.0f;
}

static void leave(const allocmoe_spent & spent, const ggml_tensor * positions, int64_t t, float left) {
    if (positions) {
        allocmoe_leave(spent, ((const int32_t *) positions->data)[t], left);
    }
}

// node: ids by rank, -1 where the token rule skips
static void compute_routed(ggml_tensor * dst, int ith, int /* nth */, void * userdata) {
    if (ith != 0) {
        return;
    }
    auto & layer = *(allocmoe_graph::layer *) userdata;

    const ggml_tensor * ids    = dst->src[0];
    const ggml_tensor * scores = dst->src[1];

    const int64_t n_used   = dst->ne[0];
    const int64_t n_tokens = dst->ne[1];

    std::vector<float>   ranked(n_used*n_tokens);
    std::vector<int32_t> n_kept(n_tokens);
    for (int64_t t = 0; t < n_tokens; ++t) {
        const auto * id    = (const int32_t *) ((const char *) ids   ->data + t*ids   ->nb[1]);
        const auto * score = (const float   *) ((const char *) scores->data + t*scores->nb[1]);
        for (int64_t r = 0; r < n_used; ++r) {
            ranked[t*n_used + r] = score[id[r]];
        }
    }

    auto & spent = layer.usage->spent.get()[layer.il];
    // a strict rule goes from token to token, the others take all at once
    const int64_t step = layer.params.strict ? 1 : n_tokens;
    for (int64_t t = 0; t < n_tokens; t += step) {
        float left = left_before(spent, dst->src[2], t);
        spent.activations[layer.phase] += allocmoe_apply_token_rule(layer.params, &ranked[t*n_used], n_used, step, &n_kept[t], left);
        leave(spent, dst->src[2], t, left);
    }

    for (int64_t t = 0; t < n_tokens; ++t) {
        const auto * id  = (const int32_t *) ((const char *) ids->data + t*ids->nb[1]);
        auto       * out = (int32_t       *) ((char       *) dst->data + t*dst->nb[1]);
        for (int64_t r = 0; r < n_used; ++r) {
            out[r] = r < n_kept[t] ? id[r] : -1;
        }
    }
}

// node: weights, `skipped` where the ids are -1
template <bool neg_inf>
static void compute_weights(ggml_tensor * dst, int ith, int /* nth */, void * /* userdata */) {
    if (ith != 0) {
        return;
    }
    const auto * weights = (const float   *) dst->src[0]->data;
    const auto * routed  = (const int32_t *) dst->src[1]->data;
    auto       * out     = (float         *) dst->data;
    for (int64_t i = 0; i < ggml_nelements(dst); ++i) {
        out[i] = routed[i] >= 0 ? weights[i] : neg_inf ? -INFINITY : 0.0f;
    }
}

ggml_tensor * allocmoe_build_token_rule(ggml_context * ctx, allocmoe_graph & graph, ggml_tensor * scores, ggml_tensor * selected, ggml_tensor * weights, float skipped) {
    if (graph.layers.empty() || graph.layers.back().selected) {
        return weights; // experts that are given, or a second set on the first one's choice
    }
    auto & layer = graph.layers.back();
    layer.selected = selected;
    layer.scores   = scores;
    if (layer.params.rule == ALLOCMOE_RULE_OFF) {
        return weights;
    }

    layer.activations = 0;
    if (layer.params.rule == ALLOCMOE_RULE_ESTIMATE) {
        return weights; // goes by the weights that these become
    }

    ggml_tensor * args_routed[] = { selected, scores, layer.positions };
    layer.routed = ggml_custom_4d(ctx, GGML_TYPE_I32, selected->ne[0], selected->ne[1], 1, 1, args_routed, layer.positions ? 3 : 2, compute_routed, 1, &layer);

    // for backends that run the nodes themselves
    allocmoe_node node = {};
    node.kind      = ALLOCMOE_NODE_IDS;
    node.strict    = layer.params.strict;
    node.rule      = layer.params.rule;
    node.k_base    = layer.params.k_base;
    node.k         = layer.params.k;
    node.value     = layer.params.value;
    node.threshold = layer.params.threshold;
    node.spent     = layer.usage->spent.get() + layer.il;
    allocmoe_set_node(layer.routed, node);

    ggml_tensor * args_weights[] = { weights, layer.routed };
    ggml_tensor * masked = ggml_custom_4d(ctx, GGML_TYPE_F32, weights->ne[0], weights->ne[1], weights->ne[2], 1, args_weights, 2,
            skipped == 0.0f ? compute_weights<false> : compute_weights<true>, 1, nullptr);
    node = {};
    node.kind    = ALLOCMOE_NODE_WEIGHTS;
    node.skipped = skipped;
    allocmoe_set_node(masked, node);
    return masked;
}

template <typename T>
static const T * row(const ggml_tensor * tensor, int64_t i) {
    return (const T *) ((const char *) tensor->data + i*tensor->nb[1]);
}

static float weight_of(const ggml_tensor * weights, int64_t t, int64_t r) {
    return *(const float *) ((const char *) weights->data + t*weights->nb[2] + r*weights->nb[1]);
}

// Sum of value(0..n - 1), in parts that do not wait for each other.
template <typename F>
static auto sum_of(int64_t n, F value) {
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

// v_e of one token's experts by rank; u: room for as many values as `reduced` has for a token
static void estimate_sizes(const ggml_tensor * log_norm, const int32_t * id, const ggml_tensor * weights, const ggml_tensor * reduced, int32_t n_relu, int64_t t, int64_t n_used, float * u, float * sizes) {
    const int64_t n_down = reduced->ne[0];
    for (int64_t i = 0; i < n_down; ++i) {
        u[i] = allocmoe_rectified(row<float>(reduced, t), i, n_down, n_relu);
    }
    for (int64_t r = 0; r < n_used; ++r) {
        const float * coefficients = row<float>(log_norm, id[r]);
        sizes[r] = std::log(std::max(weight_of(weights, t, r), 1e-20f)) + coefficients[n_down] +
            sum_of(n_down, [&](int64_t i) { return coefficients[i]*u[i]; });
    }
}

// node: ids by rank, -1 where the estimated size is too small
static void compute_routed_by_size(ggml_tensor * dst, int ith, int /* nth */, void * userdata) {
    if (ith != 0) {
        return;
    }
    auto & layer = *(allocmoe_graph::layer *) userdata;

    const ggml_tensor * ids      = dst->src[0];
    const ggml_tensor * weights  = dst->src[1];
    const ggml_tensor * reduced  = dst->src[2];
    const ggml_tensor * log_norm = dst->src[3];

    const int64_t n_used = dst->ne[0];

    std::vector<float> sizes(n_used);
    std::vector<float> u(reduced->ne[0]);
    std::unique_ptr<bool[]> keep(new bool[n_used]);
    auto  & spent = layer.usage->spent.get()[layer.il];
    int64_t total = 0;
    for (int64_t t = 0; t < dst->ne[1]; ++t) {
        const int32_t * id = row<int32_t>(ids, t);
        estimate_sizes(log_norm, id, weights, reduced, layer.estimates->n_relu, t, n_used, u.data(), sizes.data());
        float left = left_before(spent, dst->src[4], t);
        total += allocmoe_apply_estimate(layer.params, sizes.data(), n_used, keep.get(), left);
        leave(spent, dst->src[4], t, left);
        auto * out = (int32_t *) ((char *) dst->data + t*dst->nb[1]);
        for (int64_t r = 0; r < n_used; ++r) {
            out[r] = keep[r] ? id[r] : -1;
        }
    }
    spent.activations[layer.phase] += total;
}

// node: the estimate of what a token skips, in the rows of `up`
static void compute_skipped(ggml_tensor * dst, int ith, int /* nth */, void * /* userdata */) {
    if (ith != 0) {
        return;
    }
    const ggml_tensor * ids     = dst->src[0];
    const ggml_tensor * weights = dst->src[1];
    const ggml_tensor * reduced = dst->src[2];
    const ggml_tensor * routed  = dst->src[3];
    const ggml_tensor * outputs = dst->src[4];

    const int64_t rank = outputs->ne[0];

    for (int64_t t = 0; t < dst->ne[1]; ++t) {
        const int32_t * id     = row<int32_t>(ids, t);
        const int32_t * kept   = row<int32_t>(routed, t);
        const float   * u      = row<float>(reduced, t);
        float         * out    = (float *) ((char *) dst->data + t*dst->nb[1]);
        std::fill_n(out, dst->ne[0], 0.0f);
        for (int64_t r = 0; r < ids->ne[0]; ++r) {
            if (kept[r] >= 0) {
                continue;
            }
            const float   weight = weight_of(weights, t, r);
            const float * output = row<float>(outputs, id[r]);
            for (int64_t i = 0; i < rank; ++i) {
                out[i] += weight*(output[i] + u[i]);
            }
        }
        // what float16 cannot hold may have become infinite already: then no estimate
        if (!std::all_of(out, out + rank, [](float x) { return std::abs(x) < 65504.0f; })) {
            std::fill_n(out, rank, 0.0f);
        }
    }
}

void allocmoe_build_estimate(ggml_context * ctx, allocmoe_graph & graph, ggml_tensor * input, ggml_tensor * weights) {
    if (graph.layers.empty() || !graph.layers.back().selected || graph.layers.back().input) {
        return;
    }
    auto & layer = graph.layers.back();
    layer.input  = input;
    if (layer.params.rule != ALLOCMOE_RULE_ESTIMATE) {
        return;
    }
    const auto & estimates = layer.estimates->layers[layer.il];
    layer.reduced = ggml_mul_mat(ctx, estimates.down, input);
    if (layer.record) {
        return; // all experts run, and the rule is applied to what they give
    }

    ggml_tensor * args[] = { layer.selected, weights, layer.reduced, estimates.log_norm, layer.positions };
    layer.routed = ggml_custom_4d(ctx, GGML_TYPE_I32, layer.selected->ne[0], layer.selected->ne[1], 1, 1, args, layer.positions ? 5 : 4, compute_routed_by_size, 1, &layer);
    allocmoe_node node = {};
    node.kind      = ALLOCMOE_NODE_IDS_BY_SIZE;
    node.n_relu    = layer.estimates->n_relu;
    node.strict    = layer.params.strict;
    node.k_base    = layer.params.k_base;
    node.k         = layer.params.k;
    node.threshold = layer.params.threshold;
    node.spent     = layer.usage->spent.get() + layer.il;
    allocmoe_set_node(layer.routed, node);

    if (estimates.up) {
        args[3] = layer.routed;
        args[4] = estimates.output;
        ggml_tensor * skipped = ggml_custom_4d(ctx, GGML_TYPE_F32, estimates.up->ne[0], layer.selected->ne[1], 1, 1, args, 5, compute_skipped, 1, nullptr);
        node = {};
        node.kind = ALLOCMOE_NODE_SKIPPED;
        allocmoe_set_node(skipped, node);
        layer.estimate = ggml_mul_mat(ctx, estimates.up, skipped);
    }
}

// node: the sum over the experts that a token keeps, in order of rank, each times its weight if there are weights, and an
// estimate of the others if there is one; without, the same bits as upstream's nodes, which would weight and add the zeros of
// the skipped ones too
static void compute_sum(ggml_tensor * dst, int ith, int nth, void * /* userdata */) {
    const ggml_tensor * experts  = dst->src[0];
    const ggml_tensor * routed   = dst->src[1];
    const ggml_tensor * weights  = dst->src[2];
    const ggml_tensor * estimate = dst->src[3];

    const int64_t n_embd = dst->ne[0];
    const int64_t n_used = experts->ne[1];
    const int64_t first  = dst->ne[0]*dst->ne[1]*ith/nth;
    const int64_t last   = dst->ne[0]*dst->ne[1]*(ith + 1)/nth;
    for (int64_t begin = first; begin < last; ) {
        const int64_t t   = begin/n_embd;
        const int64_t end = std::min(last, (t + 1)*n_embd);
        const auto  * id  = row<int32_t>(routed, t);
        float       * out = (float *) dst->data + begin;
        bool any = estimate != nullptr;
        if (any) {
            std::copy_n(row<float>(estimate, t) + begin % n_embd, end - begin, out);
        }
        for (int64_t r = 0; r < n_used; ++r) {
            if (id[r] < 0) {
                continue;
            }
            const auto * y = (const float *) ((const char *) experts->data + t*experts->nb[2] + r*experts->nb[1]) + begin % n_embd;
            const float weight = weights ? weight_of(weights, t, r) : 1.0f;
            for (int64_t i = 0; i < end - begin; ++i) {
                out[i] = any ? out[i] + y[i]*weight : y[i]*weight;
            }
            any = true;
        }
        if (!any) {
            std::fill(out, out + (end - begin), 0.0f);
        }
        begin = end;
    }
}

ggml_tensor * allocmoe_build_sum(ggml_context * ctx, const allocmoe_graph & graph, ggml_tensor * experts, ggml_tensor * weights) {
    if (graph.layers.empty() || !graph.layers.back().routed || graph.layers.back().record) {
        return nullptr;
    }
    const auto & layer = graph.layers.back();
    if (layer.usage->spent_on_devices) {
        // devices have fusions of their own for upstream's nodes, which know of no estimate
        if (!layer.estimate) {
            return nullptr;
        }
        experts = weights ? ggml_mul(ctx, experts, weights) : experts;
        ggml_tensor * sum = layer.estimate;
        for (int64_t r = 0; r < experts->ne[1]; ++r) {
            sum = ggml_add(ctx, sum, ggml_view_2d(ctx, experts, experts->ne[0], experts->ne[2], experts->nb[2], r*experts->nb[1]));
        }
        return sum;
    }
    ggml_tensor * args[] = { experts, layer.routed, weights, layer.estimate };
    const int n_args = layer.estimate ? 4 : weights ? 3 : 2;
    return ggml_custom_4d(ctx, GGML_TYPE_F32, experts->ne[0], experts->ne[2], 1, 1, args, n_args, compute_sum, GGML_N_TASKS_MAX, nullptr);
}

// What of token t goes into record.floats; sizes: null unless the rule goes by them.
static void record_inputs(const allocmoe_graph::layer & layer, allocmoe_usage::record & record, const ggml_tensor * weighted, const ggml_tensor * weights, const ggml_tensor * input, int64_t t, const float * sizes) {
    const int64_t n_embd = weighted->ne[0];
    const int64_t n_used = weighted->ne[1];

    const float * x = row<float>(input, t);
    auto & inputs = record.floats[ALLOCMOE_FLOATS_INPUT];
    inputs.insert(inputs.end(), x, x + input->ne[0]);

    std::unique_ptr<bool[]> keep(new bool[n_used]);
    auto & missing = record.floats[ALLOCMOE_FLOATS_MISSING];
    if (sizes) {
        float left = 0.0f;
        allocmoe_apply_estimate(layer.params, sizes, n_used, keep.get(), left);
        missing.resize(missing.size() + n_embd);
    }
    for (int64_t r = 0; r < n_used; ++r) {
        const float   w = weight_of(weights, t, r);
        const float * y = (const float *) weighted->data + (t*n_used + r)*n_embd;
        const double norm = sum_of(n_embd, [&](int64_t i) { return (double) y[i]*y[i]; });
        if (sizes && !keep[r]) {
            float * sum = missing.data() + missing.size() - n_embd;
            std::transform(y, y + n_embd, sum, sum, std::plus<float>());
        }
        record.floats[ALLOCMOE_FLOATS_WEIGHT].push_back(w);
        record.floats[ALLOCMOE_FLOATS_NORM  ].push_back(w != 0.0f ? std::sqrt(norm)/std::abs(w) : 0.0f);
    }
}

// node: the weighted experts as they are; on the way, scores, ids and errors are recorded. A copy, so that it can run on
// the CPU between nodes that do not.
static void compute_record(ggml_tensor * dst, int ith, int /* nth */, void * userdata) {
    if (ith != 0) {
        return;
    }
    const auto & layer   = *(const allocmoe_graph::layer *) userdata;
    auto       & record = layer.usage->records[layer.il];

    const ggml_tensor * experts  = dst->src[0];
    const ggml_tensor * weights  = dst->src[1];
    const ggml_tensor * ids      = dst->src[2];
    const ggml_tensor * scores   = dst->src[3];
    const ggml_tensor * input    = dst->src[4];
    const ggml_tensor * reduced  = dst->src[5];
    const ggml_tensor * log_norm = dst->src[6];

    const int64_t n_embd   = dst->ne[0];
    const int64_t n_used   = dst->ne[1];
    const int64_t n_tokens = dst->ne[2];

    record.errors.resize(n_used + 1);
    std::vector<float> sums((n_used + 1)*n_embd); // outputs with the first k experts, not renormalised
    std::vector<float> weight(n_used + 1);
    std::vector<float> u(reduced ? reduced->ne[0] : 0);
    for (int64_t t = 0; t < n_tokens; ++t) {
        const auto * id    = (const int32_t *) ((const char *) ids   ->data + t*ids   ->nb[1]);
        const auto * score = (const float   *) ((const char *) scores->data + t*scores->nb[1]);
        for (int64_t r = 0; r < n_used; ++r) {
            record.experts.push_back(id[r]);
            record.scores .push_back(score[id[r]]);
            const auto * row = (const float *) ((const char *) experts->data + t*experts->nb[2] + r*experts->nb[1]);
            std::copy(row, row + n_embd, (float *) dst->data + (t*n_used + r)*n_embd);
            for (int64_t i = 0; i < n_embd; ++i) {
                sums[(r + 1)*n_embd + i] = sums[r*n_embd + i] + row[i];
            }
            weight[r + 1] = weight[r] + *(const float *) ((const char *) weights->data + t*weights->nb[2] + r*weights->nb[1]);
        }
        float * values = &record.scores[record.scores.size() - n_used];
        if (reduced) {
            estimate_sizes(log_norm, id, weights, reduced, layer.estimates->n_relu, t, n_used, u.data(), values);
        } else {
            allocmoe_to_values(layer.params.value, values, n_used);
        }
        if (layer.record_inputs) {
            record_inputs(layer, record, dst, weights, input, t, reduced ? values : nullptr);
        }
        const float * all = &sums[n_used*n_embd];
        for (int64_t k = 0; k <= n_used; ++k) {
            const float scale = layer.renormalised && weight[k] > 0.0f ? weight[n_used]/weight[k] : 1.0f;
            const float * some = &sums[k*n_embd];
            record.errors[k] += sum_of(n_embd, [&](int64_t i) {
                const float d = all[i] - scale*some[i];
                return (double) (d*d);
            });
        }
    }
}

ggml_tensor * allocmoe_build_record(ggml_context * ctx, allocmoe_graph & graph, ggml_tensor * experts, ggml_tensor * weights, bool renormalised) {
    if (graph.layers.empty() || !graph.layers.back().record || graph.layers.back().recorded || !graph.layers.back().selected) {
        return experts;
    }
    auto & layer = graph.layers.back();
    layer.recorded     = true;
    layer.renormalised = renormalised;

    ggml_tensor * log_norm = layer.reduced ? layer.estimates->layers[layer.il].log_norm : nullptr;
    ggml_tensor * args[] = { experts, weights, layer.selected, layer.scores, layer.input, layer.reduced, log_norm };
    const int n_args = layer.reduced ? 7 : layer.record_inputs ? 5 : 4;
    return ggml_custom_4d(ctx, GGML_TYPE_F32, experts->ne[0], experts->ne[1], experts->ne[2], 1, args, n_args, compute_record, 1, &layer);
}

// node: keeps its argument
static void compute_keep(ggml_tensor * dst, int ith, int /* nth */, void * userdata) {
    if (ith == 0) {
        const auto * values = (const float *) dst->src[0]->data;
        ((std::vector<float> *) userdata)->assign(values, values + ggml_nelements(dst->src[0]));
    }
}

// node: what was kept
static void compute_kept(ggml_tensor * dst, int ith, int /* nth */, void * userdata) {
    if (ith == 0) {
        const auto & kept = *(const std::vector<float> *) userdata;
        std::copy(kept.begin(), kept.end(), (float *) dst->data);
    }
}

// The layer that a node is the output of, -1 if it is none. Nearly every architecture names it so.
static int layer_of_output(const ggml_tensor * node) {
    int il = -1;
    const bool named = sscanf(node->name, "l_out-%d", &il) == 1;
    return named && node->type == GGML_TYPE_F32 && ggml_is_contiguous(node) ? il : -1;
}

static int32_t phase_of(const llama_ubatch & ubatch) {
    return ubatch.n_tokens <= ubatch.n_seqs_unq ? ALLOCMOE_PHASE_DECODE : ALLOCMOE_PHASE_PREFILL;
}

void allocmoe_edit_graph(const llama_cparams & cparams, allocmoe_graph & graph, const llama_ubatch & ubatch, ggml_context * ctx, ggml_cgraph * gf) {
    for (auto & layer : graph.layers) {
        allocmoe_node node;
        layer.phase = phase_of(ubatch);
        if (layer.routed && allocmoe_get_node(layer.routed, node)) {
            node.phase = layer.phase;
            allocmoe_set_node(layer.routed, node);
        }
    }

    if (cparams.allocmoe.usage->prefetch) {
        allocmoe_add_prefetch(ctx, gf);
    }

    const auto * plan = cparams.allocmoe.plan.get();
    if (!plan || !(plan->keep_outputs || plan->start_layer > 0)) {
        return;
    }
    auto & kept = cparams.allocmoe.usage->layer_outputs;

    std::vector<ggml_tensor *> nodes;
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        nodes.push_back(ggml_graph_node(gf, i));
    }

    const int   il    = plan->start_layer - 1;
    const auto  first = std::find_if(nodes.begin(), nodes.end(), [&](ggml_tensor * node) {
        return il >= 0 && layer_of_output(node) == il && ggml_nelements(node) == (int64_t) kept[il].size();
    });
    // a graph of as many nodes as the one that memory was reserved for must have them, and its leafs, in the same order
    if (first == nodes.end() && !plan->keep_outputs) {
        return;
    }

    ggml_graph_clear(gf);
    // inputs are set whether a node reads them or not, so all of them need memory
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
        if (t->flags & GGML_TENSOR_FLAG_INPUT) {
            ggml_build_forward_expand(gf, t);
        }
    }

    if (first != nodes.end()) {
        ggml_tensor * output = *first;
        ggml_tensor * start  = ggml_custom_4d(ctx, GGML_TYPE_F32, output->ne[0], output->ne[1], output->ne[2], output->ne[3], nullptr, 0,
                compute_kept, 1, &kept[il]);
        for (auto it = first + 1; it != nodes.end(); ++it) {
            std::replace(std::begin((*it)->src), std::end((*it)->src), output, start);
            if ((*it)->view_src == output) {
                (*it)->view_src = start;
            }
        }
        nodes.erase(nodes.begin(), first + 1);
        // layers that do not run activate nothing
        while (!graph.layers.empty() && graph.layers.front().il <= il) {
            graph.layers.pop_front();
        }
    }

    for (ggml_tensor * node : nodes) {
        ggml_build_forward_expand(gf, node);
        const int layer = plan->keep_outputs ? layer_of_output(node) : -1;
        if (layer >= 0 && layer < (int) kept.size()) {
            ggml_build_forward_expand(gf, ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, &node, 1, compute_keep, 1, &kept[layer]));
        }
    }
}

void allocmoe_count(const llama_cparams & cparams, const allocmoe_graph & graph, const llama_ubatch & ubatch) {
    auto & phase = cparams.allocmoe.usage->phases[phase_of(ubatch)];
    for (const auto & layer : graph.layers) {
        phase.activations[layer.il] += layer.activations;
        phase.tokens     [layer.il] += layer.n_tokens;
    }
}
