// The public C API. Nothing throws through it.
#include "allocmoe-api.h"

#include "allocmoe.h"
#include "allocmoe-context.h"
#include "allocmoe-expert-cache.h"
#include "allocmoe-file.h"
#include "allocmoe-plan.h"

#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>

static thread_local char last_error[1024] = "";

const char * allocmoe_last_error(void) {
    return last_error;
}

int32_t allocmoe_fail(int32_t status, const char * what) noexcept {
    (void) snprintf(last_error, sizeof(last_error), "%s", what);
    return status;
}

static int32_t wrong_n_layer(const llama_context * ctx, int32_t n_layer) {
    return allocmoe_fail(ALLOCMOE_ERR_N_LAYER, format("found %d layers, want %d, the model's", n_layer, allocmoe_n_layer(ctx)).c_str());
}

int32_t allocmoe_plan_version(void) {
    return ALLOCMOE_PLAN_VERSION;
}

int32_t allocmoe_n_layer(const llama_context * ctx) {
    return allocmoe_access::model(ctx).hparams.n_layer_all;
}

int32_t allocmoe_n_positions(const llama_context * ctx) {
    const auto * learned = allocmoe_access::model(ctx).pos_embd;
    return learned ? (int32_t) learned->ne[1] : 0;
}

//
// what is in force
//

static int32_t put(llama_context * ctx, std::unique_ptr<allocmoe_plan> plan) {
    auto runnable = allocmoe_runnable(std::move(plan), allocmoe_access::state(ctx), allocmoe_access::model(ctx));
    return allocmoe_access::set_plan(ctx, std::move(runnable)) ? ALLOCMOE_CHANGED : ALLOCMOE_OK;
}

// The same for a plan from a file, which is what the context goes by from then on.
static int32_t put_of_file(llama_context * ctx, std::shared_ptr<const allocmoe_model> file, std::unique_ptr<allocmoe_plan> plan) {
    auto & state      = allocmoe_access::state(ctx);
    const auto before = std::make_pair(state.file, state.estimates);
    state.file        = std::move(file);
    state.estimates   = nullptr;
    try {
        return put(ctx, std::move(plan));
    } catch (...) {
        std::tie(state.file, state.estimates) = before;
        throw;
    }
}

int32_t allocmoe_set_budget(llama_context * ctx, int64_t total, int32_t token_rule, int32_t strict) {
    return allocmoe_guarded([&] {
        auto & state = allocmoe_access::state(ctx);
        auto plan    = allocmoe_plan_budget(state.file.get(), allocmoe_access::model(ctx), total, token_rule, strict);
        return put_of_file(ctx, state.file, std::move(plan));
    });
}

int32_t allocmoe_load_plan_file(llama_context * ctx, const char * path) {
    return allocmoe_guarded([&] {
        const auto & model = allocmoe_access::model(ctx);
        auto file          = allocmoe_read_side_file(path, model);
        auto plan          = allocmoe_plan_budget(file.get(), model, ALLOCMOE_TOTAL_OF_FILE, -1, -1);
        return put_of_file(ctx, std::move(file), std::move(plan));
    });
}

static void check_sequence(const llama_context * ctx, int32_t seq_id) {
    if (seq_id < 0 || seq_id >= (int32_t) llama_n_seq_max(ctx)) {
        throw allocmoe_error(format("sequence: found %d, want 0 to %u", seq_id, llama_n_seq_max(ctx) - 1));
    }
}

int32_t allocmoe_budget_range(const llama_context * ctx, int64_t * least, int64_t * of_file, int64_t * full) {
    return allocmoe_guarded([&] {
        const auto range = allocmoe_range(allocmoe_access::state(ctx).file.get(), allocmoe_access::model(ctx), allocmoe_get_token_rule(ctx));
        *least           = range.least;
        *of_file         = range.of_file;
        *full            = range.full;
        return (int32_t) ALLOCMOE_OK;
    });
}

int32_t allocmoe_preset(const llama_context * ctx, const char * name, int32_t token_rule, int64_t * total) {
    return allocmoe_guarded([&] {
        const auto * file = allocmoe_access::state(ctx).file.get();
        *total            = allocmoe_preset_total(name, file, allocmoe_access::model(ctx), token_rule);
        return (int32_t) ALLOCMOE_OK;
    });
}

int32_t allocmoe_get_total(const llama_context * ctx, int64_t * total) {
    return allocmoe_guarded([&] {
        const auto & model = allocmoe_access::model(ctx);
        const auto * file  = allocmoe_access::state(ctx).file.get();
        const auto * plan  = allocmoe_access::settings(ctx).plan.get();
        *total             = plan && file ? allocmoe_total_of(*file, model, *plan) : allocmoe_sum_of(allocmoe_effective_plan(model, plan));
        return (int32_t) ALLOCMOE_OK;
    });
}

int32_t allocmoe_set_budget_seq(llama_context * ctx, int32_t seq_id, int64_t total) {
    return allocmoe_guarded([&] {
        const auto & model = allocmoe_access::model(ctx);
        const auto & state = allocmoe_access::state(ctx);
        check_sequence(ctx, seq_id);
        allocmoe_settings settings = allocmoe_access::settings(ctx);
        if (total == ALLOCMOE_TOTAL_OF_FILE) {
            if (settings.seq_plans.erase(seq_id) == 0) {
                return ALLOCMOE_OK;
            }
        } else {
            if (!settings.plan) {
                // the other sequences go on with all of the model's experts
                const int64_t full = allocmoe_sum_of(allocmoe_effective_plan(model, nullptr));
                settings.plan      = allocmoe_runnable(allocmoe_plan_budget(state.file.get(), model, full, -1, -1), state, model);
            }
            if (!settings.plan) {
                throw allocmoe_error("a budget of its own for a sequence needs the plans that allocmoe-convert stores in the file");
            }
            const auto & base = *settings.plan;
            // top-k with a count for each token leaves out single experts too
            const char * obstacle = allocmoe_token_rule_obstacle(base.token_rule == ALLOCMOE_RULE_OFF ? ALLOCMOE_RULE_THRESHOLD : base.token_rule, model, state);
            if (obstacle) {
                throw allocmoe_error(format("a budget of its own for a sequence: %s", obstacle));
            }
            auto plan = allocmoe_plan_budget(state.file.get(), model, total, base.token_rule, allocmoe_by_threshold(base.token_rule) ? base.strict : -1);
            if (!plan || plan->k_base != base.k_base || plan->value != base.value) {
                throw allocmoe_error("a budget of its own for a sequence needs a context whose plan is the file's, not one by hand");
            }
            plan->estimates            = base.estimates;
            settings.seq_plans[seq_id] = std::move(plan);
        }
        allocmoe_access::set_settings(ctx, std::move(settings));
        return ALLOCMOE_CHANGED;
    });
}

int32_t allocmoe_set_plan(llama_context * ctx, const int32_t * expert_used_count, int32_t n_layer, const allocmoe_rule * rule) {
    return allocmoe_guarded([&] {
        const auto & model = allocmoe_access::model(ctx);
        if (n_layer != (int32_t) model.hparams.n_layer_all) {
            return wrong_n_layer(ctx, n_layer);
        }
        auto plan = std::make_unique<allocmoe_plan>();
        plan->expert_used_count.assign(expert_used_count, expert_used_count + n_layer);
        if (allocmoe_out_of_range(model.hparams, plan->expert_used_count)) {
            return allocmoe_fail(ALLOCMOE_ERR_K, format("expert_used_count: found an entry outside 0..%u", model.hparams.n_expert).c_str());
        }
        if (rule) {
            plan->token_rule = rule->token_rule;
            plan->k_base     = rule->k_base;
            plan->value      = rule->value;
            plan->strict     = rule->strict;
            if (rule->threshold) {
                plan->threshold.assign(rule->threshold, rule->threshold + n_layer);
            }
            if (allocmoe_token_rule_out_of_range(*plan)) {
                return allocmoe_fail(ALLOCMOE_ERR_RULE, "rule: found one that there is not, or k_base below 1, or a threshold that is missing or not a number");
            }
        }
        return put(ctx, std::move(plan));
    });
}

void allocmoe_clear_plan(llama_context * ctx) {
    allocmoe_guarded([&] { return put(ctx, nullptr); });
}

bool allocmoe_has_plan(const llama_context * ctx) {
    return allocmoe_access::settings(ctx).plan != nullptr;
}

int32_t allocmoe_get_token_rule(const llama_context * ctx) {
    const auto * plan = allocmoe_access::settings(ctx).plan.get();
    return plan ? plan->token_rule : ALLOCMOE_RULE_OFF;
}

int32_t allocmoe_get_rule(const llama_context * ctx, allocmoe_rule * rule, float * threshold, int32_t n_layer) {
    return allocmoe_guarded([&] {
        if (n_layer != allocmoe_n_layer(ctx)) {
            return wrong_n_layer(ctx, n_layer);
        }
        const allocmoe_plan none;
        const auto * own  = allocmoe_access::settings(ctx).plan.get();
        const auto & plan = own ? *own : none;
        *rule             = { plan.token_rule, plan.value, plan.k_base, plan.strict, nullptr };
        if (allocmoe_by_threshold(plan.token_rule)) {
            std::copy(plan.threshold.begin(), plan.threshold.end(), threshold);
            rule->threshold = threshold;
        }
        return (int32_t) ALLOCMOE_OK;
    });
}

static int32_t copy_effective_plan(const llama_context * ctx, const allocmoe_plan * plan, int32_t * expert_used_count, int32_t n_layer) {
    return allocmoe_guarded([&] {
        if (n_layer != allocmoe_n_layer(ctx)) {
            return wrong_n_layer(ctx, n_layer);
        }
        const auto k = allocmoe_effective_plan(allocmoe_access::model(ctx), plan);
        std::copy(k.begin(), k.end(), expert_used_count);
        return (int32_t) ALLOCMOE_OK;
    });
}

int32_t allocmoe_get_plan(const llama_context * ctx, int32_t * expert_used_count, int32_t n_layer) {
    return copy_effective_plan(ctx, allocmoe_access::settings(ctx).plan.get(), expert_used_count, n_layer);
}

int32_t allocmoe_get_full(const llama_context * ctx, int32_t * expert_used_count, int32_t n_layer) {
    return copy_effective_plan(ctx, nullptr, expert_used_count, n_layer);
}

//
// what has been spent
//

int32_t allocmoe_get_counts(const llama_context * ctx, int32_t phase, int64_t * activations, int64_t * tokens, int32_t n_layer) {
    return allocmoe_guarded([&] {
        if (n_layer != allocmoe_n_layer(ctx)) {
            return wrong_n_layer(ctx, n_layer);
        }
        if (phase != ALLOCMOE_PHASE_PREFILL && phase != ALLOCMOE_PHASE_DECODE) {
            return allocmoe_fail(ALLOCMOE_ERR_PHASE, "phase: found one that there is not");
        }
        llama_synchronize(const_cast<llama_context *>(ctx)); // devices count as they run
        const auto & state  = allocmoe_access::state(ctx);
        const auto & counts = state.phases[phase];
        std::copy(counts.tokens.begin(), counts.tokens.end(), tokens);
        for (int32_t il = 0; il < n_layer; ++il) {
            activations[il] = counts.activations[il] + state.spent.get()[il].activations[phase];
        }
        return (int32_t) ALLOCMOE_OK;
    });
}

void allocmoe_reset_counts(llama_context * ctx) {
    llama_synchronize(ctx);
    auto & state = allocmoe_access::state(ctx);
    for (auto & phase : state.phases) {
        std::fill(phase.activations.begin(), phase.activations.end(), 0);
        std::fill(phase.tokens.begin(), phase.tokens.end(), 0);
    }
    if (state.cache) {
        for (auto & of_phase : state.cache->counts) {
            std::fill(of_phase.begin(), of_phase.end(), allocmoe_cache_counts{});
        }
        state.cache->waited_us = 0;
        std::fill(state.ran.n_absent.begin(), state.ran.n_absent.end(), 0);
    }
    for (size_t il = 0; il < state.phases[0].tokens.size(); ++il) {
        auto & activations = state.spent.get()[il].activations;
        std::fill(std::begin(activations), std::end(activations), 0);
    }
}

int32_t allocmoe_get_spent(const llama_context * ctx, int32_t seq_id, int32_t first, int32_t last, int64_t * activations, int64_t * tokens, int32_t n_layer) {
    return allocmoe_guarded([&] {
        if (n_layer != allocmoe_n_layer(ctx)) {
            return wrong_n_layer(ctx, n_layer);
        }
        check_sequence(ctx, seq_id);
        llama_synchronize(const_cast<llama_context *>(ctx)); // devices write as they run
        for (int32_t il = 0; il < n_layer; ++il) {
            const auto & spent = allocmoe_access::state(ctx).spent.get()[il];
            const auto * kept  = spent.kept + (int64_t) seq_id * spent.n_left;
            activations[il] = tokens[il] = 0;
            for (int32_t position = std::max(first, 0); position < last; ++position) {
                const int32_t n = kept[position % spent.n_left];
                activations[il] += std::max(0, n - 1);
                tokens[il] += n > 0;
            }
        }
        return (int32_t) ALLOCMOE_OK;
    });
}

// (layer, place in what is kept by position, index in the caller's [n_layer][n_tokens]) for every layer and every position that
// is kept
template <class F>
static int32_t for_each_place(llama_context * ctx, int32_t seq_id, int32_t n_tokens, F && f) {
    return allocmoe_guarded([&] {
        check_sequence(ctx, seq_id);
        llama_synchronize(ctx); // devices write as they run
        const int32_t n_left = allocmoe_access::state(ctx).spent.get()->n_left;
        for (int32_t il = 0; il < allocmoe_n_layer(ctx); ++il) {
            for (int32_t position = std::max(0, n_tokens - n_left); position < n_tokens; ++position) {
                f(il, seq_id * n_left + position % n_left, (size_t) il * n_tokens + position);
            }
        }
        return (int32_t) ALLOCMOE_OK;
    });
}

int32_t allocmoe_get_left_seq(llama_context * ctx, int32_t seq_id, float * left, int32_t n_tokens) {
    const auto * spent = allocmoe_access::state(ctx).spent.get();
    return for_each_place(ctx, seq_id, n_tokens, [&](int32_t il, int32_t place, size_t i) { left[i] = spent[il].left[place]; });
}

int32_t allocmoe_set_left_seq(llama_context * ctx, int32_t seq_id, const float * left, int32_t n_tokens) {
    const auto * spent   = allocmoe_access::state(ctx).spent.get();
    const auto & hparams = allocmoe_access::model(ctx).hparams;
    const auto & plan    = allocmoe_access::settings(ctx).plan;
    const bool estimate  = plan && plan->token_rule == ALLOCMOE_RULE_ESTIMATE;
    return for_each_place(ctx, seq_id, n_tokens, [&](int32_t il, int32_t place, size_t i) {
        // it may come from a damaged file; by thresholds each token leaves all of a layer's experts at most
        const float least = estimate ? -ALLOCMOE_STRICT_LEFT : 0.0f, most = estimate ? ALLOCMOE_STRICT_LEFT : (i % n_tokens + 1.0f) * hparams.n_expert_used(il);
        spent[il].left[place] = left[i] >= least && left[i] <= most ? left[i] : 0.0f;
    });
}

//
// where the experts are
//

const char * allocmoe_expert_placement(const llama_context * ctx, int32_t il, int64_t * n_bytes) {
    const auto & model = allocmoe_access::model(ctx);
    *n_bytes           = 0;
    if (il < 0 || il >= (int32_t) model.layers.size()) {
        return "";
    }
    const auto & layer  = model.layers[il];
    const char * buffer = "";
    for (const auto * tensor : { layer.ffn_gate_exps, layer.ffn_up_exps, layer.ffn_down_exps, layer.ffn_gate_up_exps }) {
        if (tensor) {
            *n_bytes += ggml_nbytes(tensor) / tensor->ne[2];
            buffer = tensor->buffer ? ggml_backend_buft_name(ggml_backend_buffer_get_type(tensor->buffer)) : "";
        }
    }
    return buffer;
}

int64_t allocmoe_set_prefetch(llama_context * ctx, bool prefetch) {
    return allocmoe_access::set_prefetch(ctx, prefetch);
}

int64_t allocmoe_get_expert_cache(const llama_context * ctx, int32_t * n_slots, int32_t n_layer) {
    const auto * cache = allocmoe_access::state(ctx).cache;
    for (int32_t il = 0; il < n_layer; ++il) {
        const auto * experts = cache ? cache->find(il) : nullptr;
        n_slots[il]          = experts ? allocmoe_expert_cache::n_slots(*experts) : 0;
    }
    return cache ? cache->n_bytes() : 0;
}

int32_t allocmoe_get_cache_counts(const llama_context * ctx, int32_t phase, int64_t * hits, int64_t * misses, int64_t * n_bytes, int32_t n_layer, int64_t * waited_us) {
    return allocmoe_guarded([&] {
        if (n_layer != allocmoe_n_layer(ctx)) {
            return wrong_n_layer(ctx, n_layer);
        }
        if (phase != ALLOCMOE_PHASE_PREFILL && phase != ALLOCMOE_PHASE_DECODE) {
            return allocmoe_fail(ALLOCMOE_ERR_PHASE, "phase: found one that there is not");
        }
        llama_synchronize(const_cast<llama_context *>(ctx));
        const auto * cache = allocmoe_access::state(ctx).cache;
        for (int32_t il = 0; il < n_layer; ++il) {
            const auto found = cache ? cache->counts[phase][il] : allocmoe_cache_counts{};
            hits[il]         = found.hits;
            misses[il]       = found.misses;
            n_bytes[il]      = found.bytes;
        }
        *waited_us = cache ? cache->waited_us.load() : 0;
        return (int32_t) ALLOCMOE_OK;
    });
}

int32_t allocmoe_set_miss_price(llama_context * ctx, double price) {
    return allocmoe_guarded([&] {
        if (!(price >= 1.0 && price <= 1e6)) {
            throw allocmoe_error(format("the price of a miss: found %g, want 1 to 1e6", price));
        }
        llama_synchronize(ctx);
        auto & handicap    = allocmoe_access::state(ctx).miss_handicap;
        const float before = handicap;
        handicap           = 0.5 * std::log(price);
        auto settings      = allocmoe_access::settings(ctx);
        settings.priced    = allocmoe_access::state(ctx).cache && handicap > 0.0f;
        allocmoe_access::set_settings(ctx, std::move(settings));
        return (int32_t) (handicap == before ? ALLOCMOE_OK : ALLOCMOE_CHANGED);
    });
}

double allocmoe_get_miss_price(const llama_context * ctx, double * miss_ms, double * hit_ms) {
    const auto * cache = allocmoe_access::state(ctx).cache;
    *miss_ms           = cache ? cache->miss_ms : 0.0;
    *hit_ms            = cache ? cache->hit_ms : 0.0;
    return cache ? cache->miss_price : 0.0;
}

int32_t allocmoe_set_union_share(llama_context * ctx, double share) {
    return allocmoe_guarded([&] {
        if (!(share > 0.0 && share <= 1.0)) {
            throw allocmoe_error(format("the share of the experts of several tokens: found %g, want above 0, up to 1", share));
        }
        auto & state = allocmoe_access::state(ctx);
        if (share < 1.0 && (allocmoe_get_token_rule(ctx) != ALLOCMOE_RULE_ESTIMATE || state.spent_on_devices)) {
            throw allocmoe_error("the experts of several tokens can be limited under token rule \"estimate\" alone, on the CPU", ALLOCMOE_ERR_RULE);
        }
        llama_synchronize(ctx);
        const double before = state.union_share;
        state.union_share   = share;
        return (int32_t) (share == before ? ALLOCMOE_OK : ALLOCMOE_CHANGED);
    });
}

int32_t allocmoe_get_absent(const llama_context * ctx, int64_t * n_absent, int32_t n_layer) {
    return allocmoe_guarded([&] {
        if (n_layer != allocmoe_n_layer(ctx)) {
            return wrong_n_layer(ctx, n_layer);
        }
        const auto & found = allocmoe_access::state(ctx).ran.n_absent;
        std::fill_n(n_absent, n_layer, 0);
        std::copy(found.begin(), found.end(), n_absent);
        return (int32_t) ALLOCMOE_OK;
    });
}

int32_t allocmoe_ran_size(const llama_context * ctx) {
    return allocmoe_access::state(ctx).ran.n_entry;
}

int32_t allocmoe_get_ran_seq(llama_context * ctx, int32_t seq_id, int16_t * found, int32_t n_tokens) {
    auto & ran = allocmoe_access::state(ctx).ran;
    return for_each_place(ctx, seq_id, n_tokens, [&](int32_t il, int32_t place, size_t i) {
        if (ran.n_entry > 0) {
            std::copy_n(ran.at(il, place), ran.n_entry, found + i * ran.n_entry);
        }
    });
}

int32_t allocmoe_set_ran_seq(llama_context * ctx, int32_t seq_id, const int16_t * wanted, int32_t n_tokens) {
    auto & ran             = allocmoe_access::state(ctx).ran;
    const int16_t n_expert = allocmoe_access::model(ctx).hparams.n_expert;
    return for_each_place(ctx, seq_id, n_tokens, [&](int32_t il, int32_t place, size_t i) {
        if (ran.n_entry == 0) {
            return;
        }
        int16_t * entry = ran.at(il, place);
        entry[0]        = ALLOCMOE_RAN_NOTHING;
        if (wanted) {
            const int16_t * own = wanted + i * ran.n_entry;
            // it may come from a damaged file
            if (std::all_of(own + 1, own + ran.n_entry, [&](int16_t id) { return id < n_expert; })) {
                std::copy_n(own, ran.n_entry, entry);
            }
        }
    });
}

const char * allocmoe_expert_cache_error(const llama_context * ctx) {
    return allocmoe_access::state(ctx).cache_error.c_str();
}

void allocmoe_set_cpu_kernels(bool use) {
    ggml_backend_reg_t cpu = ggml_backend_reg_by_name("CPU");
    void * set             = cpu ? ggml_backend_reg_get_proc_address(cpu, "allocmoe_use_cpu_kernels") : nullptr;
    if (set) {
        reinterpret_cast<void (*)(bool)>(set)(use);
    }
}

void allocmoe_log_nothing(int32_t /*level*/, const char * /*text*/, void * /*user_data*/) {}

static std::mutex first_error_mutex;
static std::string first_error;

void allocmoe_log_errors(int32_t level, const char * text, void * /*user_data*/) {
    static std::atomic<bool> error{ false }; // whether the line being written is one
    if (level != GGML_LOG_LEVEL_CONT) {
        error = level == GGML_LOG_LEVEL_ERROR;
    }
    if (error) {
        (void) fputs(text, stderr);
        const std::lock_guard<std::mutex> lock(first_error_mutex);
        first_error = first_error.empty() ? text : first_error;
    }
}

const char * allocmoe_take_first_error(void) {
    static thread_local std::string taken;
    const std::lock_guard<std::mutex> lock(first_error_mutex);
    taken = std::move(first_error);
    first_error.clear();
    return taken.c_str();
}
