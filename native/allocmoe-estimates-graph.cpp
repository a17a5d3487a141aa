// Token rule estimate in the graph: ids by estimated size, what stands in for the skipped, the sum of both.
#include "allocmoe.h"
#include "allocmoe-context.h"
#include "allocmoe-expert-cache.h"
#include "allocmoe-graph.h"
#include "allocmoe-hooks.h"
#include "allocmoe-testing.h"
#include "allocmoe-union.h"

#include "llama-graph.h"
#include "llama-hparams.h"

#include <algorithm>
#include <cmath>
#include <vector>

// For so many tokens a slot an expert counts as one that was run. Where a price leaves few to be run, those of all slots would be looked
// for through the whole text, for every token.
constexpr int64_t TOKENS_PER_SLOT = 16;

// What of token t's candidates is not among the n_slots different experts that its sequence ran last.
static void find_absent(const allocmoe_estimate_args & args, allocmoe_ran & ran, int64_t n_slots, int32_t t, allocmoe_absent * absent) {
    std::vector<bool> recent(ran.n_entry > 0 ? LLAMA_MAX_EXPERTS : 0);
    int64_t n             = 0;
    int32_t place         = args.places[t].before;
    const int64_t n_steps = std::min<int64_t>(ran.n_left, TOKENS_PER_SLOT * n_slots);
    for (int64_t step = 0; place >= 0 && step < n_steps && n < n_slots; ++step) {
        const int16_t * entry = ran.at(args.node.il, place);
        // from the best on, as the cache keeps them
        for (int64_t r = 1; entry[0] != ALLOCMOE_RAN_NOTHING && r < ran.n_entry && entry[r] >= 0 && n < n_slots; ++r) {
            n += !recent[entry[r]];
            recent[entry[r]] = true;
        }
        if (entry[0] != ALLOCMOE_RAN_TOKEN) {
            break;
        }
        place = place % ran.n_left == 0 ? place + ran.n_left - 1 : place - 1;
    }
    for (int32_t r = 0; r < args.n_used; ++r) {
        absent[r].is = !recent[args.ids[t * args.stride_ids + r]];
    }
}

// Leaves a share of the experts that these tokens run together, and takes the others out of what they have spent.
static void limit_union(const allocmoe_estimate_args & args, int32_t n_expert, double share) {
    const int64_t n = (int64_t) args.n_tokens * args.n_used;
    std::vector<float> sizes(n);
    for (int64_t i = 0; i < n; ++i) {
        const int32_t t = i / args.n_used, r = i % args.n_used;
        if (args.routed[i] >= 0) {
            const float part = allocmoe_size_part(args, t, r, 0, 1);
            sizes[i]         = allocmoe_size(args, t, r, &part, 1);
        }
    }
    std::vector<int32_t> n_dropped(args.n_tokens);
    allocmoe_limit_union(sizes.data(), args.n_used, args.n_tokens, n_expert, share, args.routed, n_dropped.data());
    const auto & spent = *args.node.spent;
    for (int32_t t = 0; t < args.n_tokens; ++t) {
        args.node.spent->activations[args.node.phase] -= n_dropped[t];
        if (args.places[t].own >= 0) {
            spent.kept[args.places[t].own] -= n_dropped[t];
        }
    }
}

// node: ids by rank, -1 where the estimated size is too small
static void compute_routed_by_size(ggml_tensor * dst, int ith, int /* nth */, void * userdata) {
    allocmoe_node node;
    if (ith != 0 || !allocmoe_get_node(dst, node)) {
        return;
    }
    auto args          = allocmoe_estimate_args_of(dst, node);
    const auto & layer = *(const allocmoe_graph::layer *) userdata;
    auto & state       = *layer.state;
    auto & ran         = state.ran;
    const auto * cache = ran.n_place > 0 ? state.cache->find(node.il) : nullptr;
    std::vector<allocmoe_absent> absent;
    // a prompt reads what any of its tokens needs once, whoever else needs it
    if (cache && state.miss_handicap > 0.0f && node.phase == ALLOCMOE_PHASE_DECODE) {
        absent.resize(args.n_tokens * args.n_used);
        for (int32_t t = 0; t < args.n_tokens; ++t) {
            find_absent(args, ran, allocmoe_expert_cache::n_slots(*cache), t, &absent[t * args.n_used]);
        }
        args.absent         = absent.data();
        args.n_absent       = &ran.n_absent[node.il];
        args.miss_threshold = layer.plan->miss_threshold.empty() ? -INFINITY : layer.plan->miss_threshold[node.il];
        args.miss_handicap  = state.miss_handicap;
    }
    allocmoe_one_thread thread;
    allocmoe_estimate_shared shared;
    allocmoe_route_by_size(thread, args, shared);
    if (state.union_share < 1.0 && args.n_tokens > 1) {
        limit_union(args, dst->src[3]->ne[1], state.union_share);
    }
    for (int32_t t = 0; cache && t < args.n_tokens; ++t) {
        if (args.places[t].own < 0) {
            continue;
        }
        int16_t * entry = ran.at(node.il, args.places[t].own);
        int64_t n       = 0;
        entry[n++]      = args.places[t].before < 0 ? ALLOCMOE_RAN_FIRST : ALLOCMOE_RAN_TOKEN;
        for (int32_t r = 0; r < args.n_used && n < ran.n_entry; ++r) {
            const int32_t id = args.routed[(int64_t) t * args.n_used + r];
            if (id >= 0) {
                entry[n++] = id;
            }
        }
        if (n < ran.n_entry) {
            entry[n] = -1;
        }
    }
}

// node: the estimate of what a token skips, in the rows of `up`
static void compute_skipped(ggml_tensor * dst, int ith, int /* nth */, void * /* userdata */) {
    allocmoe_node node;
    if (ith != 0 || !allocmoe_get_node(dst, node)) {
        return;
    }
    const auto args = allocmoe_estimate_args_of(dst, node);
    allocmoe_one_thread thread;
    for (int32_t t = 0; t < args.n_tokens; ++t) {
        allocmoe_sum_skipped(thread, args, t);
    }
}

void allocmoe_build_estimate(ggml_context * ctx, llm_graph_result & res, int il, ggml_tensor * input, ggml_tensor * weights) {
    auto * found = res.allocmoe ? res.allocmoe->find(il) : nullptr;
    if (!found || !found->selected || found->input) {
        return;
    }
    auto & layer = *found;
    layer.input  = input;
    if (layer.rule.rule != ALLOCMOE_RULE_ESTIMATE) {
        return;
    }
    const auto & estimates = layer.plan->estimates->layers[il];
    layer.reduced          = ggml_mul_mat(ctx, estimates.down, input);
    if (layer.instrument.record) {
        return; // all experts run, and the rule is applied to what they give
    }

    allocmoe_node node = {};
    node.kind          = ALLOCMOE_NODE_IDS_BY_SIZE;
    node.n_relu        = layer.plan->estimates->n_relu;
    layer.routed       = allocmoe_build_routed(ctx, layer, node, { layer.selected, weights, layer.reduced, estimates.log_norm }, compute_routed_by_size, &layer);

    if (estimates.up) {
        ggml_tensor * args[]  = { layer.selected, weights, layer.reduced, layer.routed, estimates.output };
        ggml_tensor * skipped = ggml_custom_4d(ctx, GGML_TYPE_F32, estimates.up->ne[0], layer.selected->ne[1], 1, 1, args, 5, compute_skipped, 1, nullptr);
        node                  = {};
        node.kind             = ALLOCMOE_NODE_SKIPPED;
        allocmoe_set_node(skipped, node);
        layer.estimate = ggml_mul_mat(ctx, estimates.up, skipped);
    }
}

// node: the sum over the experts that a token keeps, in order of rank, each times its weight if there are weights, and an
// estimate of the others if there is one; without, the same bits as upstream's nodes, one for the weights and one for each
// expert, which would weight and add the zeros of the skipped ones too
static void compute_sum(ggml_tensor * dst, int ith, int nth, void * /* userdata */) {
    const ggml_tensor * experts  = dst->src[0];
    const ggml_tensor * routed   = dst->src[1];
    const ggml_tensor * weights  = dst->src[2];
    const ggml_tensor * estimate = dst->src[3];

    const int64_t n_embd = dst->ne[0];
    const int64_t n_used = experts->ne[1];
    const int64_t first  = dst->ne[0] * dst->ne[1] * ith / nth;
    const int64_t last   = dst->ne[0] * dst->ne[1] * (ith + 1) / nth;
    for (int64_t begin = first; begin < last;) {
        const int64_t t   = begin / n_embd;
        const int64_t end = std::min(last, (t + 1) * n_embd);
        const auto * id   = allocmoe_row<int32_t>(routed, t);
        float * out       = (float *) dst->data + begin;
        bool any          = estimate != nullptr;
        if (any) {
            std::copy_n(allocmoe_row<float>(estimate, t) + begin % n_embd, end - begin, out);
        }
        for (int64_t r = 0; r < n_used; ++r) {
            if (id[r] < 0) {
                continue;
            }
            const auto * y     = (const float *) ((const char *) experts->data + t * experts->nb[2] + r * experts->nb[1]) + begin % n_embd;
            const float weight = weights ? allocmoe_weight(weights, t, r) : 1.0f;
            for (int64_t i = 0; i < end - begin; ++i) {
                out[i] = any ? out[i] + y[i] * weight : y[i] * weight;
            }
            any = true;
        }
        if (!any) {
            std::fill(out, out + (end - begin), 0.0f);
        }
        begin = end;
    }
}

ggml_tensor * allocmoe_build_sum(ggml_context * ctx, llm_graph_result & res, int il, ggml_tensor * experts, ggml_tensor * weights) {
    const auto * found = res.allocmoe ? res.allocmoe->find(il) : nullptr;
    if (!found || !found->selected || found->instrument.record) {
        return nullptr;
    }
    const auto & layer = *found;
    // devices have fusions of their own for upstream's nodes, which know of no estimate
    if (layer.state->has_devices && !layer.routed) {
        return nullptr;
    }
    if (layer.state->spent_on_devices) {
        if (!layer.estimate) {
            return nullptr;
        }
        experts           = weights ? ggml_mul(ctx, experts, weights) : experts;
        ggml_tensor * sum = layer.estimate;
        for (int64_t r = 0; r < experts->ne[1]; ++r) {
            sum = ggml_add(ctx, sum, ggml_view_2d(ctx, experts, experts->ne[0], experts->ne[2], experts->nb[2], r * experts->nb[1]));
        }
        return sum;
    }
    ggml_tensor * args[] = { experts, layer.routed ? layer.routed : layer.selected, weights, layer.estimate };
    const int n_args     = layer.estimate ? 4 : weights ? 3
                                                        : 2;
    return ggml_custom_4d(ctx, GGML_TYPE_F32, experts->ne[0], experts->ne[2], 1, 1, args, n_args, compute_sum, GGML_N_TASKS_MAX, nullptr);
}

//
// for tests
//

void allocmoe_select_union(const float * sizes, int32_t n_used, int32_t n_tokens, int32_t n_expert, double share, int32_t * routed, int32_t * n_dropped) {
    allocmoe_limit_union(sizes, n_used, n_tokens, n_expert, share, routed, n_dropped);
}
