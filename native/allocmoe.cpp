#include "allocmoe.h"
#include "allocmoe-hooks.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include "gguf.h"

#include <algorithm>
#include <stdexcept>

// the friend that llama_context grants us
struct allocmoe_access {
    static const llama_model & model  (const llama_context * ctx) { return ctx->model; }
    static llama_cparams     & cparams(llama_context * ctx)       { return ctx->cparams; }
    static const llama_cparams & cparams(const llama_context * ctx) { return ctx->cparams; }

    static void set_plan(llama_context * ctx, std::shared_ptr<const allocmoe_plan> plan) {
        ctx->cparams.allocmoe.plan = std::move(plan);
        ctx->sched_need_reserve = true; // the graph's shapes depend on the plan
    }
};

// Experts per token that the model itself uses in layer il, 0 where the plan has no say:
// no router, or experts given by token id (hash-routed).
static int32_t own_expert_used_count(const llama_model & model, uint32_t il) {
    if (il >= model.layers.size()) {
        return 0;
    }
    const auto & layer = model.layers[il];
    const bool routed = layer.ffn_gate_inp && layer.ffn_down_exps && !layer.ffn_gate_tid2eid;
    return routed ? (int32_t) model.hparams.n_expert_used(il) : 0;
}

static std::vector<int32_t> effective_plan(const llama_model & model, const allocmoe_plan * plan) {
    std::vector<int32_t> k(model.hparams.n_layer_all);
    for (uint32_t il = 0; il < k.size(); ++il) {
        k[il] = own_expert_used_count(model, il);
        if (plan && plan->expert_used_count[il] > 0) {
            k[il] = std::min(k[il], plan->expert_used_count[il]);
        }
    }
    return k;
}

static bool out_of_range(const llama_hparams & hparams, const std::vector<int32_t> & k) {
    return std::any_of(k.begin(), k.end(), [&](int32_t x) { return x < 0 || x > (int32_t) hparams.n_expert; });
}

//
// hooks
//

std::shared_ptr<const allocmoe_plan> allocmoe_load_plan(const gguf_context * meta, const llama_hparams & hparams) {
    const int64_t i_version = meta ? gguf_find_key(meta, "allocmoe.version") : -1;
    if (i_version < 0) {
        return nullptr;
    }

    if (gguf_get_kv_type(meta, i_version) != GGUF_TYPE_UINT32 || gguf_get_val_u32(meta, i_version) != ALLOCMOE_PLAN_VERSION) {
        throw std::runtime_error(format("allocmoe.version is not %d: made by another version of allocmoe-edge", ALLOCMOE_PLAN_VERSION));
    }

    const int64_t i_k = gguf_find_key(meta, "allocmoe.expert_used_count");
    if (i_k < 0 || gguf_get_kv_type(meta, i_k) != GGUF_TYPE_ARRAY || gguf_get_arr_type(meta, i_k) != GGUF_TYPE_INT32) {
        throw std::runtime_error("allocmoe.expert_used_count is missing or not an array of int32");
    }
    if (gguf_get_arr_n(meta, i_k) != hparams.n_layer_all) {
        throw std::runtime_error(format("allocmoe.expert_used_count has %zu entries, the model has %u layers",
                    gguf_get_arr_n(meta, i_k), hparams.n_layer_all));
    }

    auto plan = std::make_shared<allocmoe_plan>();

    const auto * k = (const int32_t *) gguf_get_arr_data(meta, i_k);
    plan->expert_used_count.assign(k, k + hparams.n_layer_all);
    if (out_of_range(hparams, plan->expert_used_count)) {
        throw std::runtime_error(format("allocmoe.expert_used_count has an entry outside 0..%u", hparams.n_expert));
    }

    const int64_t i_rule = gguf_find_key(meta, "allocmoe.token_rule");
    plan->token_rule = i_rule >= 0 && gguf_get_kv_type(meta, i_rule) == GGUF_TYPE_STRING ? gguf_get_val_str(meta, i_rule) : "off";
    if (plan->token_rule != "off") {
        throw std::runtime_error(format("allocmoe.token_rule '%s' is not known to this version of allocmoe-edge", plan->token_rule.c_str()));
    }

    return plan;
}

void allocmoe_init_context(llama_cparams & cparams, const llama_model & model) {
    allocmoe_counts zero;
    zero.activations.resize(model.hparams.n_layer_all);
    zero.tokens     .resize(model.hparams.n_layer_all);

    cparams.allocmoe.plan   = model.allocmoe;
    cparams.allocmoe.counts = std::make_shared<std::array<allocmoe_counts, 2>>(std::array<allocmoe_counts, 2>{ zero, zero });

    if (!model.allocmoe) {
        return;
    }

    int64_t total = 0;
    int64_t full  = 0;
    int64_t n_moe = 0;
    const auto k     = effective_plan(model, model.allocmoe.get());
    const auto k_own = effective_plan(model, nullptr);
    for (size_t il = 0; il < k.size(); ++il) {
        total += k[il];
        full  += k_own[il];
        n_moe += k_own[il] > 0;
    }
    if (n_moe > 0) {
        LLAMA_LOG_INFO("allocmoe: budget %.2f: %lld of %lld expert activations per token, mean %.1f of %.1f, token rule %s\n",
                (double) total/full, (long long) total, (long long) full, (double) total/n_moe, (double) full/n_moe,
                model.allocmoe->token_rule.c_str());
    }
}

int64_t allocmoe_expert_used_count(const llama_cparams & cparams, allocmoe_graph & graph, int il, int64_t n_expert_used, int64_t n_tokens) {
    // a warm-up run is there to touch every expert
    if (cparams.warmup || il < 0) {
        return n_expert_used;
    }

    const auto * plan = cparams.allocmoe.plan.get();
    if (plan && il < (int) plan->expert_used_count.size() && plan->expert_used_count[il] > 0) {
        n_expert_used = std::min<int64_t>(n_expert_used, plan->expert_used_count[il]);
    }

    graph.layers.push_back({ il, n_expert_used, n_tokens });

    return n_expert_used;
}

void allocmoe_count(const llama_cparams & cparams, const allocmoe_graph & graph, const llama_ubatch & ubatch) {
    const bool decode = ubatch.n_tokens <= ubatch.n_seqs_unq;

    auto & counts = (*cparams.allocmoe.counts)[decode ? ALLOCMOE_PHASE_DECODE : ALLOCMOE_PHASE_PREFILL];
    for (const auto & layer : graph.layers) {
        counts.activations[layer.il] += layer.n_expert_used*layer.n_tokens;
        counts.tokens     [layer.il] += layer.n_tokens;
    }
}

//
// public C API
//

int32_t allocmoe_plan_version(void) {
    return ALLOCMOE_PLAN_VERSION;
}

int32_t allocmoe_n_layer(const llama_context * ctx) {
    return allocmoe_access::model(ctx).hparams.n_layer_all;
}

int32_t allocmoe_set_plan(llama_context * ctx, const int32_t * expert_used_count, int32_t n_layer) {
    const auto & hparams = allocmoe_access::model(ctx).hparams;
    if (n_layer != (int32_t) hparams.n_layer_all) {
        return ALLOCMOE_ERR_N_LAYER;
    }

    auto plan = std::make_shared<allocmoe_plan>();
    plan->expert_used_count.assign(expert_used_count, expert_used_count + n_layer);
    plan->token_rule = "off";
    if (out_of_range(hparams, plan->expert_used_count)) {
        return ALLOCMOE_ERR_K;
    }

    const auto & cur = allocmoe_access::cparams(ctx).allocmoe.plan;
    if (!cur || cur->expert_used_count != plan->expert_used_count) {
        allocmoe_access::set_plan(ctx, std::move(plan));
    }
    return ALLOCMOE_OK;
}

void allocmoe_clear_plan(llama_context * ctx) {
    if (allocmoe_has_plan(ctx)) {
        allocmoe_access::set_plan(ctx, nullptr);
    }
}

bool allocmoe_has_plan(const llama_context * ctx) {
    return allocmoe_access::cparams(ctx).allocmoe.plan != nullptr;
}

static int32_t copy_effective_plan(const llama_context * ctx, const allocmoe_plan * plan, int32_t * expert_used_count, int32_t n_layer) {
    if (n_layer != allocmoe_n_layer(ctx)) {
        return ALLOCMOE_ERR_N_LAYER;
    }
    const auto k = effective_plan(allocmoe_access::model(ctx), plan);
    std::copy(k.begin(), k.end(), expert_used_count);
    return ALLOCMOE_OK;
}

int32_t allocmoe_get_plan(const llama_context * ctx, int32_t * expert_used_count, int32_t n_layer) {
    return copy_effective_plan(ctx, allocmoe_access::cparams(ctx).allocmoe.plan.get(), expert_used_count, n_layer);
}

int32_t allocmoe_get_full(const llama_context * ctx, int32_t * expert_used_count, int32_t n_layer) {
    return copy_effective_plan(ctx, nullptr, expert_used_count, n_layer);
}

int32_t allocmoe_get_counts(const llama_context * ctx, int32_t phase, int64_t * activations, int64_t * tokens, int32_t n_layer) {
    if (n_layer != allocmoe_n_layer(ctx)) {
        return ALLOCMOE_ERR_N_LAYER;
    }
    if (phase != ALLOCMOE_PHASE_PREFILL && phase != ALLOCMOE_PHASE_DECODE) {
        return ALLOCMOE_ERR_PHASE;
    }
    const auto & counts = (*allocmoe_access::cparams(ctx).allocmoe.counts)[phase];
    std::copy(counts.activations.begin(), counts.activations.end(), activations);
    std::copy(counts.tokens.begin(),      counts.tokens.end(),      tokens);
    return ALLOCMOE_OK;
}

void allocmoe_reset_counts(llama_context * ctx) {
    for (auto & counts : *allocmoe_access::cparams(ctx).allocmoe.counts) {
        std::fill(counts.activations.begin(), counts.activations.end(), 0);
        std::fill(counts.tokens     .begin(), counts.tokens     .end(), 0);
    }
}
