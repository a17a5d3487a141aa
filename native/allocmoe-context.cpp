#include "allocmoe-context.h"

#include "allocmoe.h"
#include "allocmoe-expert-cache.h"
#include "allocmoe-graph.h"
#include "allocmoe-hooks.h"
#include "allocmoe-prefetch.h"

#include "llama-arch.h"
#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

const llama_model & allocmoe_access::model(const llama_context * ctx) {
    return ctx->model;
}

allocmoe_state & allocmoe_access::state(const llama_context * ctx) {
    return *ctx->cparams.allocmoe.state;
}

const allocmoe_settings & allocmoe_access::settings(const llama_context * ctx) {
    return *ctx->cparams.allocmoe.settings;
}

void allocmoe_access::set_settings(llama_context * ctx, allocmoe_settings settings) {
    auto made          = std::make_shared<const allocmoe_settings>(std::move(settings));
    const auto * graph = ctx->gf_res_prev_active ? ctx->gf_res_prev_active->allocmoe.get() : nullptr;
    if (!graph || !graph->serves(made)) {
        ctx->sched_need_reserve = true; // the graph's shapes depend on them
    }
    ctx->cparams.allocmoe.settings = std::move(made);
}

bool allocmoe_access::set_plan(llama_context * ctx, std::shared_ptr<const allocmoe_plan> plan) {
    allocmoe_settings settings = allocmoe_access::settings(ctx);
    const auto & current       = settings.plan;
    const bool same            = current && plan ? *current == *plan : current == plan;
    if (same && settings.seq_plans.empty()) {
        return false;
    }
    if (!same && current && current->strict) {
        // what it has left over says nothing about this plan
        llama_synchronize(ctx);
        const auto & first = *state(ctx).spent;
        std::fill_n(first.left, current->expert_used_count.size() * llama_n_seq_max(ctx) * first.n_left, 0.0f);
    }
    settings.plan = std::move(plan);
    settings.seq_plans.clear();
    set_settings(ctx, std::move(settings));
    return true;
}

int64_t allocmoe_access::set_prefetch(llama_context * ctx, bool prefetch) {
    const int64_t n_bytes                 = allocmoe_advise_experts(ctx->model, prefetch);
    ctx->cparams.allocmoe.state->prefetch = prefetch && n_bytes > 0;
    ctx->sched_need_reserve               = true; // graphs that exist are not used again
    return n_bytes;
}

bool allocmoe_runs_token_rules(ggml_backend_dev_t device) {
    return device && ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), ALLOCMOE_PROC_TOKEN_RULES);
}

// Zeros, whose pages are taken as they are written.
template <typename T>
static std::shared_ptr<T> new_zeros(size_t n_bytes) {
    std::shared_ptr<T> zeros((T *) calloc(1, n_bytes), free);
    if (!zeros) {
        throw std::bad_alloc();
    }
    return zeros;
}

// In pinned memory of the model's device where it has one that runs token rules: those write there without a copy to the host.
// n_left: positions of each of n_seq sequences for which is kept what is left over.
static void allocate_spent(allocmoe_state & state, const llama_model & model, int32_t n_left, int32_t n_seq) {
    const size_t n_layer = model.hparams.n_layer_all;
    const size_t n_bytes = n_layer * (sizeof(allocmoe_spent) + (size_t) n_seq * n_left * (sizeof(float) + sizeof(uint16_t)));
    state.has_devices    = !model.devices.empty();
    for (const auto & device : model.devices) {
        if (model.hparams.n_expert == 0) {
            break; // nothing is ever written
        }
        auto * type   = allocmoe_runs_token_rules(device.dev) ? ggml_backend_dev_host_buffer_type(device.dev) : nullptr;
        auto * buffer = type ? ggml_backend_buft_alloc_buffer(type, n_bytes) : nullptr;
        if (!buffer) {
            continue;
        }
        state.spent.reset((allocmoe_spent *) ggml_backend_buffer_get_base(buffer), [buffer](allocmoe_spent *) { ggml_backend_buffer_free(buffer); });
        // where memory cannot be pinned, ggml gives ordinary memory instead
        state.spent_on_devices = ggml_backend_buffer_get_type(buffer) == type;
        memset(state.spent.get(), 0, n_bytes);
        break;
    }
    if (!state.spent) {
        state.spent = new_zeros<allocmoe_spent>(n_bytes);
    }
    auto * left = (float *) (state.spent.get() + n_layer);
    auto * kept = (uint16_t *) (left + n_layer * n_seq * n_left);
    for (size_t il = 0; il < n_layer; ++il) {
        state.spent.get()[il].left   = left + il * n_seq * n_left;
        state.spent.get()[il].kept   = kept + il * n_seq * n_left;
        state.spent.get()[il].n_left = n_left;
    }
}

std::shared_ptr<const allocmoe_plan> allocmoe_runnable(std::unique_ptr<allocmoe_plan> plan, const allocmoe_state & state, const llama_model & model) {
    if (!plan) {
        return nullptr;
    }
    // a context that only measures memory has no weights to go by
    if (model.hparams.no_alloc && plan->token_rule == ALLOCMOE_RULE_ESTIMATE) {
        plan->token_rule = ALLOCMOE_RULE_OFF;
    }
    if (const char * obstacle = allocmoe_token_rule_obstacle(plan->token_rule, model, state)) {
        const auto * file     = state.file.get();
        const bool thresholds = plan->token_rule == ALLOCMOE_RULE_ESTIMATE && file && file->n_rows > 0 && !file->threshold_table.empty();
        LLAMA_LOG_WARN("allocmoe: token rule %s is off: %s\n", allocmoe_token_rule_names[plan->token_rule], obstacle);
        if (thresholds) {
            return allocmoe_runnable(allocmoe_plan_budget(file, model, allocmoe_total_of(*file, model, *plan), ALLOCMOE_RULE_THRESHOLD, -1), state, model);
        }
        plan->token_rule = ALLOCMOE_RULE_OFF;
    }
    if (plan->token_rule == ALLOCMOE_RULE_ESTIMATE) {
        const bool of_file = !state.estimates && state.file;
        plan->estimates    = of_file ? state.file->estimates(model) : state.estimates;
        if (!plan->estimates) {
            throw allocmoe_error("token rule estimate needs an estimator, and neither plan nor file has one", ALLOCMOE_ERR_RULE);
        }
        if (of_file) {
            plan->miss_threshold = allocmoe_miss_threshold(*state.file, model);
        }
    }
    return plan;
}

void allocmoe_init_context(llama_cparams & cparams, const llama_model & model) {
    const uint32_t n_layer = model.hparams.n_layer_all;

    auto state    = std::make_shared<allocmoe_state>();
    auto settings = std::make_shared<allocmoe_settings>();
    for (auto & phase : state->phases) {
        phase.activations.resize(n_layer);
        phase.tokens.resize(n_layer);
    }
    // Where sequences share the context's cells, any of them may come to have all, but not each: what is kept is four times
    // the cells, and a batch at least. A rollback further back than a sequence's part finds what later text has left.
    const uint32_t n_left = std::min<uint64_t>(cparams.n_ctx_seq, std::max<uint64_t>(std::max(1u, cparams.n_batch), 4ull * cparams.n_ctx / cparams.n_seq_max));
    allocate_spent(*state, model, n_left, cparams.n_seq_max);
    state->n_layer_main = model.hparams.n_layer();
    state->cache        = model.hparams.no_alloc ? nullptr : model.allocmoe_cache.get();
    if (state->cache) {
        cparams.op_offload = false; // a GPU would copy experts that are in no memory
        state->cache->find_price(model, cparams.n_threads);
        state->miss_handicap = 0.5 * std::log(state->cache->miss_price);
        settings->priced     = state->miss_handicap > 0.0f;
        auto & ran           = state->ran;
        uint32_t most        = 1;
        for (uint32_t il = 0; il < n_layer; ++il) {
            most = std::max(most, model.hparams.n_expert_used(il));
        }
        ran.n_left  = n_left;
        ran.n_place = (int64_t) n_left * cparams.n_seq_max;
        ran.n_entry = 1 + most;
        ran.n_absent.resize(n_layer);
        ran.entries = new_zeros<int16_t>(n_layer * ran.n_place * ran.n_entry * sizeof(int16_t));
    }
    state->records.layers.resize(n_layer);
    state->records.outputs.resize(n_layer);
    cparams.allocmoe = { settings, state };

    state->file = model.allocmoe;
    if (!state->file) {
        return;
    }
    const auto own     = allocmoe_effective_plan(model, nullptr);
    const int64_t full = allocmoe_sum_of(own), n_moe = std::count_if(own.begin(), own.end(), [](int32_t k) { return k > 0; });
    if (full == 0) {
        return;
    }
    const int64_t asked = state->file->asked_total;
    if (asked == 0 && allocmoe_raised_above_plan(*state->file, model)) {
        LLAMA_LOG_WARN("allocmoe: %s.expert_used_count is overridden with more than the file's plan was made for: it is not used\n", llm_arch_name(model.arch));
    }
    settings->plan = allocmoe_runnable(allocmoe_plan_budget(state->file.get(), model, asked, -1, -1), *state, model);

    const int64_t total = allocmoe_sum_of(allocmoe_effective_plan(model, settings->plan.get()));
    LLAMA_LOG_INFO("allocmoe: budget %.2f: %lld of %lld expert activations per token, mean %.1f of %.1f, token rule %s\n",
        (double) total / full, (long long) total, (long long) full, (double) total / n_moe, (double) full / n_moe,
        allocmoe_token_rule_names[settings->plan ? settings->plan->token_rule : ALLOCMOE_RULE_OFF]);
}
