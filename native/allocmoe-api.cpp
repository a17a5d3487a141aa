// The public C API.
#include "allocmoe.h"
#include "allocmoe-context.h"
#include "allocmoe-estimator.h"
#include "allocmoe-plan.h"

#include "llama-hparams.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <memory>

int32_t allocmoe_plan_version(void) {
    return ALLOCMOE_PLAN_VERSION;
}

int32_t allocmoe_n_layer(const llama_context * ctx) {
    return allocmoe_access::model(ctx).hparams.n_layer_all;
}

int32_t allocmoe_set_plan(llama_context * ctx, const int32_t * expert_used_count, int32_t n_layer, const allocmoe_rule * rule) {
    const auto & model = allocmoe_access::model(ctx);
    if (n_layer != (int32_t) model.hparams.n_layer_all) {
        return ALLOCMOE_ERR_N_LAYER;
    }

    auto plan = std::make_shared<allocmoe_plan>();
    plan->expert_used_count.assign(expert_used_count, expert_used_count + n_layer);
    if (allocmoe_out_of_range(model.hparams, plan->expert_used_count)) {
        return ALLOCMOE_ERR_K;
    }

    if (rule) {
        plan->token_rule = rule->token_rule;
        plan->k_base     = rule->k_base;
        plan->value      = rule->value;
        plan->strict     = rule->strict;
        if (rule->threshold) {
            plan->threshold.assign(rule->threshold, rule->threshold + n_layer);
        }
        const bool by_threshold = plan->token_rule == ALLOCMOE_RULE_THRESHOLD || plan->token_rule == ALLOCMOE_RULE_ESTIMATE;
        if (allocmoe_token_rule_out_of_range(*plan) || (by_threshold && !rule->threshold)) {
            return ALLOCMOE_ERR_RULE;
        }
        allocmoe_degrade_token_rule(*plan, model, allocmoe_access::state(ctx));
        if (plan->token_rule == ALLOCMOE_RULE_ESTIMATE) {
            plan->estimates = allocmoe_access::state(ctx).estimates;
            if (!plan->estimates) {
                return ALLOCMOE_ERR_RULE;
            }
        }
    }

    allocmoe_settings settings = allocmoe_access::settings(ctx);
    if (settings.plan && *settings.plan == *plan) {
        return ALLOCMOE_OK;
    }
    if (settings.plan && settings.plan->strict) {
        // what it has left over says nothing about this plan
        llama_synchronize(ctx);
        const auto & first = *allocmoe_access::state(ctx).spent;
        std::fill_n(first.left, (size_t) n_layer*llama_n_seq_max(ctx)*first.n_left, 0.0f);
    }

    settings.plan = std::move(plan);
    allocmoe_access::set_settings(ctx, std::move(settings));
    return ALLOCMOE_CHANGED;
}

int32_t allocmoe_set_estimator(llama_context * ctx, const allocmoe_estimator * estimator, int32_t n_layer, int32_t n_expert, int32_t n_embd) {
    auto & current = allocmoe_access::state(ctx).estimates;
    if (!estimator) {
        current = nullptr;
        return ALLOCMOE_OK;
    }
    return allocmoe_make_estimates(allocmoe_access::model(ctx), *estimator, n_layer, n_expert, n_embd, current);
}

void allocmoe_clear_plan(llama_context * ctx) {
    if (allocmoe_has_plan(ctx)) {
        allocmoe_settings settings = allocmoe_access::settings(ctx);
        settings.plan = nullptr;
        allocmoe_access::set_settings(ctx, std::move(settings));
    }
}

bool allocmoe_has_plan(const llama_context * ctx) {
    return allocmoe_access::settings(ctx).plan != nullptr;
}

static int32_t copy_effective_plan(const llama_context * ctx, const allocmoe_plan * plan, int32_t * expert_used_count, int32_t n_layer) {
    if (n_layer != allocmoe_n_layer(ctx)) {
        return ALLOCMOE_ERR_N_LAYER;
    }
    const auto k = allocmoe_effective_plan(allocmoe_access::model(ctx), plan);
    std::copy(k.begin(), k.end(), expert_used_count);
    return ALLOCMOE_OK;
}

int32_t allocmoe_get_plan(const llama_context * ctx, int32_t * expert_used_count, int32_t n_layer) {
    return copy_effective_plan(ctx, allocmoe_access::settings(ctx).plan.get(), expert_used_count, n_layer);
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
    llama_synchronize(const_cast<llama_context *>(ctx)); // devices count as they run
    const auto & state  = allocmoe_access::state(ctx);
    const auto & counts = state.phases[phase];
    std::copy(counts.tokens.begin(), counts.tokens.end(), tokens);
    for (int32_t il = 0; il < n_layer; ++il) {
        activations[il] = counts.activations[il] + state.spent.get()[il].activations[phase];
    }
    return ALLOCMOE_OK;
}

void allocmoe_reset_counts(llama_context * ctx) {
    llama_synchronize(ctx);
    auto & state = allocmoe_access::state(ctx);
    for (auto & phase : state.phases) {
        std::fill(phase.activations.begin(), phase.activations.end(), 0);
        std::fill(phase.tokens     .begin(), phase.tokens     .end(), 0);
    }
    for (size_t il = 0; il < state.phases[0].tokens.size(); ++il) {
        auto & activations = state.spent.get()[il].activations;
        std::fill(std::begin(activations), std::end(activations), 0);
    }
}

// (layer's values, caller's values, how many) for every layer
template <class F>
static void for_each_left(llama_context * ctx, int32_t n_tokens, F && f) {
    llama_synchronize(ctx); // devices write as they run
    const auto * spent = allocmoe_access::state(ctx).spent.get();
    for (int32_t il = 0; il < allocmoe_n_layer(ctx); ++il) {
        f(spent[il].left, (size_t) il*n_tokens, std::min(n_tokens, spent[il].n_left));
    }
}

void allocmoe_get_left(llama_context * ctx, float * left, int32_t n_tokens) {
    for_each_left(ctx, n_tokens, [&](const float * own, size_t first, int32_t n) { std::copy_n(own, n, left + first); });
}

void allocmoe_set_left(llama_context * ctx, const float * left, int32_t n_tokens) {
    for_each_left(ctx, n_tokens, [&](float * own, size_t first, int32_t n) { std::copy_n(left + first, n, own); });
}

int32_t allocmoe_get_token_rule(const llama_context * ctx) {
    const auto * plan = allocmoe_access::settings(ctx).plan.get();
    return plan ? plan->token_rule : ALLOCMOE_RULE_OFF;
}

const char * allocmoe_expert_placement(const llama_context * ctx, int32_t il, int64_t * n_bytes) {
    const auto & model = allocmoe_access::model(ctx);
    *n_bytes = 0;
    if (il < 0 || il >= (int32_t) model.layers.size()) {
        return "";
    }
    const auto & layer  = model.layers[il];
    const char * buffer = "";
    for (const auto * tensor : { layer.ffn_gate_exps, layer.ffn_up_exps, layer.ffn_down_exps, layer.ffn_gate_up_exps }) {
        if (tensor) {
            *n_bytes += ggml_nbytes(tensor)/tensor->ne[2];
            buffer    = tensor->buffer ? ggml_backend_buft_name(ggml_backend_buffer_get_type(tensor->buffer)) : "";
        }
    }
    return buffer;
}

int64_t allocmoe_set_prefetch(llama_context * ctx, bool prefetch) {
    return allocmoe_access::set_prefetch(ctx, prefetch);
}

void allocmoe_log_errors(int32_t level, const char * text, void * /*user_data*/) {
    static std::atomic<bool> error{false}; // whether the line being written is one
    if (level != GGML_LOG_LEVEL_CONT) {
        error = level == GGML_LOG_LEVEL_ERROR;
    }
    if (error) {
        fputs(text, stderr);
    }
}
