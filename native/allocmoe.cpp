#include "allocmoe.h"
#include "allocmoe-hooks.h"
#include "allocmoe-prefetch.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include "ggml-backend.h"
#include "gguf.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <new>
#include <stdexcept>
#include <string>

// the friend that llama_context grants us
struct allocmoe_access {
    static const llama_model & model  (const llama_context * ctx) { return ctx->model; }
    static llama_cparams     & cparams(llama_context * ctx)       { return ctx->cparams; }
    static const llama_cparams & cparams(const llama_context * ctx) { return ctx->cparams; }

    static void set_plan(llama_context * ctx, std::shared_ptr<const allocmoe_plan> plan) {
        ctx->cparams.allocmoe.plan = std::move(plan);
        ctx->sched_need_reserve = true; // the graph's shapes depend on the plan
    }

    static int64_t set_prefetch(llama_context * ctx, bool prefetch) {
        const int64_t n_bytes = allocmoe_advise_experts(ctx->model, prefetch);
        ctx->cparams.allocmoe.usage->prefetch = prefetch && n_bytes > 0;
        ctx->sched_need_reserve = true; // graphs that exist are not used again
        return n_bytes;
    }
};

// Experts per token that the model itself uses in layer il, 0 where the plan has no say:
// no router, experts given by token id (hash-routed), or a layer that predicts further tokens, which decoding does not run.
static int32_t own_expert_used_count(const llama_model & model, uint32_t il) {
    if (il >= model.layers.size() || il >= model.hparams.n_layer()) {
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

static const char * const token_rule_names[] = { "off", "batch", "threshold", "estimate" };
static const char * const value_names[]      = { "score", "relative", "remaining" };

static bool token_rule_out_of_range(const allocmoe_plan & plan) {
    const bool bad_threshold = std::any_of(plan.threshold.begin(), plan.threshold.end(), [](float t) { return std::isnan(t); });
    return plan.token_rule < ALLOCMOE_RULE_OFF || plan.token_rule > ALLOCMOE_RULE_ESTIMATE || plan.k_base < 1 || bad_threshold ||
           plan.value < ALLOCMOE_VALUE_SCORE || plan.value > ALLOCMOE_VALUE_REMAINING;
}

bool allocmoe_plan::operator==(const allocmoe_plan & other) const {
    return expert_used_count == other.expert_used_count && token_rule == other.token_rule && k_base == other.k_base &&
           value == other.value && strict == other.strict && record == other.record && keep_outputs == other.keep_outputs &&
           start_layer == other.start_layer && threshold == other.threshold && record_inputs == other.record_inputs &&
           estimates == other.estimates;
}

// Whether the device's backend is one of ours that takes -1 for a slot without work; others would take it for an expert.
static bool runs_token_rules(ggml_backend_dev_t device) {
    return device && ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), ALLOCMOE_PROC_TOKEN_RULES);
}

// In pinned memory of the model's device where it has one that runs token rules: those write there without a copy to the host.
// n_left: positions for which is kept what is left over.
static void allocate_spent(allocmoe_usage & usage, const llama_model & model, int32_t n_left) {
    const size_t n_layer = model.hparams.n_layer_all;
    const size_t n_bytes = n_layer*(sizeof(allocmoe_spent) + n_left*sizeof(float));
    for (const auto & device : model.devices) {
        auto * type   = runs_token_rules(device.dev) ? ggml_backend_dev_host_buffer_type(device.dev) : nullptr;
        auto * buffer = type ? ggml_backend_buft_alloc_buffer(type, n_bytes) : nullptr;
        if (!buffer) {
            continue;
        }
        usage.spent.reset((allocmoe_spent *) ggml_backend_buffer_get_base(buffer), [buffer](allocmoe_spent *) { ggml_backend_buffer_free(buffer); });
        // where memory cannot be pinned, ggml gives ordinary memory instead
        usage.spent_on_devices = ggml_backend_buffer_get_type(buffer) == type;
        memset(usage.spent.get(), 0, n_bytes);
        break;
    }
    if (!usage.spent) {
        usage.spent.reset((allocmoe_spent *) calloc(1, n_bytes), free); // pages are taken as they are written
        if (!usage.spent) {
            throw std::bad_alloc();
        }
    }
    auto * left = (float *) (usage.spent.get() + n_layer);
    for (size_t il = 0; il < n_layer; ++il) {
        usage.spent.get()[il].left   = left + il*n_left;
        usage.spent.get()[il].n_left = n_left;
    }
}

// Why the model cannot skip single experts of a token, nullptr if it can. What can are the plain and the repacked
// MUL_MAT_ID of ggml's CPU backend, and backends that say so.
static const char * token_rule_obstacle(const allocmoe_plan & plan, const llama_model & model, const allocmoe_usage & usage) {
    if (model.arch == LLM_ARCH_GROVEMOE) {
        return "the architecture derives further experts from the chosen ones";
    }
    if (plan.token_rule == ALLOCMOE_RULE_ESTIMATE) {
        if (model.arch == LLM_ARCH_LLAMA4) {
            return "the weights act on the experts' input";
        }
        for (const auto & layer : model.layers) {
            const auto * first = layer.ffn_gate_up_exps ? layer.ffn_gate_up_exps : layer.ffn_up_exps;
            const auto * last  = layer.ffn_down_exps;
            if (first && last && (first->ne[0] != model.hparams.n_embd || last->ne[1] != model.hparams.n_embd)) {
                return "its experts work in a space of their own";
            }
        }
    }
    for (const auto & device : model.devices) {
        if (!runs_token_rules(device.dev)) {
            return "only the CPU and CUDA backends can leave out single experts, and the model uses another device";
        }
    }
    if (!model.devices.empty() && !usage.spent_on_devices) {
        return "no memory could be pinned in which the device counts the experts that it runs (GGML_CUDA_NO_PINNED?)";
    }
    for (const auto & layer : model.layers) {
        for (const auto * tensor : { layer.ffn_gate_exps, layer.ffn_up_exps, layer.ffn_down_exps, layer.ffn_gate_up_exps }) {
            if (!tensor || !tensor->buffer) {
                continue;
            }
            auto            * type = ggml_backend_buffer_get_type(tensor->buffer);
            const std::string name = ggml_backend_buft_name(type);
            const bool        cpu  = name == "CPU" || name == "CPU_Mapped" || name == "CPU_REPACK";
            if (!cpu && !runs_token_rules(ggml_backend_buft_get_device(type))) {
                return "its experts are stored in a layout that cannot leave out single ones";
            }
        }
    }
    return nullptr;
}

// Top-k in place of a token rule that the model cannot run, with a warning.
static void degrade_token_rule(allocmoe_plan & plan, const llama_model & model, const allocmoe_usage & usage) {
    const char * obstacle = plan.token_rule == ALLOCMOE_RULE_OFF ? nullptr : token_rule_obstacle(plan, model, usage);
    if (obstacle) {
        LLAMA_LOG_WARN("allocmoe: token rule %s is off: %s\n", token_rule_names[plan.token_rule], obstacle);
        plan.token_rule = ALLOCMOE_RULE_OFF;
    }
}

//
// hooks
//

template <typename T>
static const T * gguf_array(const gguf_context * meta, const char * key, gguf_type type, size_t n, const char * type_name) {
    const int64_t i = gguf_find_key(meta, key);
    if (i < 0 || gguf_get_kv_type(meta, i) != GGUF_TYPE_ARRAY || gguf_get_arr_type(meta, i) != type || gguf_get_arr_n(meta, i) != n) {
        throw std::runtime_error(format("%s is missing or not an array of %zu %s", key, n, type_name));
    }
    return (const T *) gguf_get_arr_data(meta, i);
}

// The place of a string among `names`; 0 where the key is missing.
template <size_t n>
static int32_t gguf_name(const gguf_context * meta, const char * key, const char * const (&names)[n]) {
    const int64_t i = gguf_find_key(meta, key);
    if (i < 0) {
        return 0;
    }
    const char * name = gguf_get_kv_type(meta, i) == GGUF_TYPE_STRING ? gguf_get_val_str(meta, i) : "";
    const auto * it   = std::find_if(names, names + n, [&](const char * x) { return strcmp(x, name) == 0; });
    if (it == names + n) {
        throw std::runtime_error(format("%s '%s' is not known to this version of allocmoe-edge", key, name));
    }
    return (int32_t) (it - names);
}

std::shared_ptr<const allocmoe_plan> allocmoe_load_plan(const gguf_context * meta, const llama_hparams & hparams) {
    const int64_t i_version = meta ? gguf_find_key(meta, "allocmoe.version") : -1;
    if (i_version < 0) {
        return nullptr;
    }

    if (gguf_get_kv_type(meta, i_version) != GGUF_TYPE_UINT32 || gguf_get_val_u32(meta, i_version) != ALLOCMOE_PLAN_VERSION) {
        throw std::runtime_error(format("allocmoe.version is not %d: made by another version of allocmoe-edge", ALLOCMOE_PLAN_VERSION));
    }

    auto plan = std::make_shared<allocmoe_plan>();

    const uint32_t n_layer = hparams.n_layer_all;
    const auto * k = gguf_array<int32_t>(meta, "allocmoe.expert_used_count", GGUF_TYPE_INT32, n_layer, "int32");
    plan->expert_used_count.assign(k, k + n_layer);
    if (out_of_range(hparams, plan->expert_used_count)) {
        throw std::runtime_error(format("allocmoe.expert_used_count has an entry outside 0..%u", hparams.n_expert));
    }

    plan->token_rule = gguf_name(meta, "allocmoe.token_rule", token_rule_names);
    plan->value      = gguf_name(meta, "allocmoe.value",      value_names);

    const int64_t i_base = gguf_find_key(meta, "allocmoe.k_base");
    if (i_base >= 0) {
        if (gguf_get_kv_type(meta, i_base) != GGUF_TYPE_UINT32 || gguf_get_val_u32(meta, i_base) < 1 || gguf_get_val_u32(meta, i_base) > hparams.n_expert) {
            throw std::runtime_error(format("allocmoe.k_base is not a uint32 from 1 to %u", hparams.n_expert));
        }
        plan->k_base = gguf_get_val_u32(meta, i_base);
    }

    if (plan->token_rule == ALLOCMOE_RULE_THRESHOLD || plan->token_rule == ALLOCMOE_RULE_ESTIMATE) {
        const auto * threshold = gguf_array<float>(meta, "allocmoe.threshold", GGUF_TYPE_FLOAT32, n_layer, "float32");
        plan->threshold.assign(threshold, threshold + n_layer);
    }

    if (token_rule_out_of_range(*plan)) {
        throw std::runtime_error("allocmoe.threshold has an entry that is not a number");
    }

    return plan;
}

void allocmoe_init_context(llama_cparams & cparams, const llama_model & model) {
    const uint32_t n_layer = model.hparams.n_layer_all;

    auto usage = std::make_shared<allocmoe_usage>();
    for (auto & phase : usage->phases) {
        phase.activations.resize(n_layer);
        phase.tokens     .resize(n_layer);
    }
    allocate_spent(*usage, model, cparams.n_ctx_seq);
    usage->n_layer_main = model.hparams.n_layer();
    usage->records.resize(n_layer);
    usage->layer_outputs.resize(n_layer);
    cparams.allocmoe.usage = std::move(usage);

    if (!model.allocmoe) {
        return;
    }

    auto plan = std::make_shared<allocmoe_plan>(*model.allocmoe);
    degrade_token_rule(*plan, model, *cparams.allocmoe.usage);
    const char * rule = token_rule_names[plan->token_rule];
    if (plan->token_rule == ALLOCMOE_RULE_ESTIMATE) {
        plan->token_rule = ALLOCMOE_RULE_OFF; // until allocmoe_set_estimator gives it what it goes by
    }
    cparams.allocmoe.plan = plan;

    int64_t total = 0;
    int64_t full  = 0;
    int64_t n_moe = 0;
    const auto k     = effective_plan(model, plan.get());
    const auto k_own = effective_plan(model, nullptr);
    for (size_t il = 0; il < k.size(); ++il) {
        total += k[il];
        full  += k_own[il];
        n_moe += k_own[il] > 0;
    }
    if (n_moe > 0) {
        LLAMA_LOG_INFO("allocmoe: budget %.2f: %lld of %lld expert activations per token, mean %.1f of %.1f, token rule %s\n",
                (double) total/full, (long long) total, (long long) full, (double) total/n_moe, (double) full/n_moe, rule);
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

int32_t allocmoe_set_plan(llama_context * ctx, const int32_t * expert_used_count, int32_t n_layer, const allocmoe_rule * rule) {
    const auto & model = allocmoe_access::model(ctx);
    if (n_layer != (int32_t) model.hparams.n_layer_all) {
        return ALLOCMOE_ERR_N_LAYER;
    }

    auto plan = std::make_shared<allocmoe_plan>();
    plan->expert_used_count.assign(expert_used_count, expert_used_count + n_layer);
    if (out_of_range(model.hparams, plan->expert_used_count)) {
        return ALLOCMOE_ERR_K;
    }

    if (rule) {
        plan->token_rule   = rule->token_rule;
        plan->k_base       = rule->k_base;
        plan->value        = rule->value;
        plan->strict       = rule->strict;
        plan->record       = rule->record;
        plan->record_inputs = rule->record_inputs;
        plan->keep_outputs = rule->keep_outputs;
        plan->start_layer  = rule->start_layer;
        if (rule->threshold) {
            plan->threshold.assign(rule->threshold, rule->threshold + n_layer);
        }
        if (rule->start_layer < 0 || rule->start_layer >= n_layer) {
            return ALLOCMOE_ERR_N_LAYER;
        }
        const bool by_threshold = plan->token_rule == ALLOCMOE_RULE_THRESHOLD || plan->token_rule == ALLOCMOE_RULE_ESTIMATE;
        if (token_rule_out_of_range(*plan) || (by_threshold && !rule->threshold)) {
            return ALLOCMOE_ERR_RULE;
        }
        degrade_token_rule(*plan, model, *allocmoe_access::cparams(ctx).allocmoe.usage);
        if (plan->token_rule == ALLOCMOE_RULE_ESTIMATE) {
            plan->estimates = allocmoe_access::cparams(ctx).allocmoe.estimates;
            if (!plan->estimates) {
                return ALLOCMOE_ERR_RULE;
            }
        }
    }

    const auto & cur = allocmoe_access::cparams(ctx).allocmoe.plan;
    if (cur && *cur == *plan) {
        return ALLOCMOE_OK;
    }
    if (cur && cur->strict) {
        // what it has left over says nothing about this plan
        llama_synchronize(ctx);
        const auto & first = *allocmoe_access::cparams(ctx).allocmoe.usage->spent;
        std::fill_n(first.left, (size_t) n_layer*first.n_left, 0.0f);
    }

    allocmoe_access::set_plan(ctx, std::move(plan));
    return ALLOCMOE_CHANGED;
}

// For tensors that nodes beside layer il's router read.
static ggml_backend_buffer_type_t type_beside_router(const llama_model & model, int32_t il) {
    const auto * router = model.layers[il].ffn_gate_inp;
    auto       * type   = router && router->buffer ? ggml_backend_buffer_get_type(router->buffer) : nullptr;
    if (!type || ggml_backend_buft_is_host(type)) {
        return ggml_backend_cpu_buffer_type();
    }
    return ggml_backend_dev_buffer_type(ggml_backend_buft_get_device(type));
}

// Where on the CPU products with a matrix are quickest: in a buffer type that repacks it, if there is one for such a matrix.
static ggml_backend_buffer_type_t type_for_products(ggml_backend_buffer_type_t plain, ggml_type type, int64_t n_in, int64_t n_out) {
    if (plain != ggml_backend_cpu_buffer_type()) {
        return plain;
    }
    auto * device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    auto * proc   = ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts");
    if (!proc) {
        return plain;
    }
    for (auto * extra = ((ggml_backend_dev_get_extra_bufts_t) proc)(device); extra && *extra; ++extra) {
        ggml_context_ptr meta(ggml_init({ 3*ggml_tensor_overhead(), nullptr, true }));
        ggml_tensor * matrix  = ggml_new_tensor_2d(meta.get(), type, n_in, n_out);
        ggml_tensor * product = ggml_mul_mat(meta.get(), matrix, ggml_new_tensor_1d(meta.get(), GGML_TYPE_F32, n_in));
        ggml_backend_buffer_ptr empty(ggml_backend_buft_alloc_buffer(*extra, 0));
        matrix->buffer = empty.get();
        if (ggml_backend_dev_supports_op(device, product)) {
            return *extra;
        }
    }
    return plain;
}

// Sets a matrix of F16 or Q4_0.
static void set_converted(ggml_tensor * tensor, const float * values) {
    std::vector<char> data(ggml_nbytes(tensor));
    ggml_quantize_chunk(tensor->type, values, data.data(), 0, tensor->ne[1], tensor->ne[0], nullptr);
    ggml_backend_tensor_set(tensor, data.data(), 0, data.size());
}

int32_t allocmoe_set_estimator(llama_context * ctx, const allocmoe_estimator * estimator, int32_t n_layer, int32_t n_expert, int32_t n_embd) {
    const auto & model   = allocmoe_access::model(ctx);
    const auto & hparams = model.hparams;
    auto       & current = allocmoe_access::cparams(ctx).allocmoe.estimates;
    if (!estimator) {
        current = nullptr;
        return ALLOCMOE_OK;
    }
    if (n_layer != (int32_t) hparams.n_layer_all) {
        return ALLOCMOE_ERR_N_LAYER;
    }
    const int64_t n_down = estimator->n_down;
    const int64_t rank   = estimator->rank;
    const int64_t n_relu = estimator->n_relu;
    if (n_expert != (int32_t) hparams.n_expert || n_embd != (int32_t) hparams.n_embd || n_down < 1 || n_down > INT16_MAX ||
        rank < 0 || rank > n_down || n_relu < 0 || n_relu > n_down - rank) {
        return ALLOCMOE_ERR_ESTIMATOR;
    }
    const auto finite = [](const float * values, int64_t n) {
        return std::all_of(values, values + n, [](float x) { return std::isfinite(x) && std::abs(x) < 65504.0f; });
    };
    if (!finite(estimator->down, n_layer*n_down*n_embd) || !finite(estimator->log_norm, (int64_t) n_layer*n_expert*(n_down + 1)) ||
        !finite(estimator->output, n_layer*n_expert*rank) || !finite(estimator->up, n_layer*rank*n_embd)) {
        return ALLOCMOE_ERR_ESTIMATOR;
    }

    auto estimates = std::make_shared<allocmoe_estimates>();
    estimates->layers.resize(n_layer);
    estimates->n_relu = n_relu;

    // whole blocks; float16 would be multiplied 64 columns at a time or one by one
    const int64_t   n_block   = ggml_blck_size(GGML_TYPE_Q4_0);
    const int64_t   n_columns = GGML_PAD(rank, n_block);
    const ggml_type down_type = n_embd % n_block == 0 ? GGML_TYPE_Q4_0 : GGML_TYPE_F16;

    std::map<ggml_backend_buffer_type_t, ggml_context *> meta_by_type;
    const auto new_matrix = [&](ggml_backend_buffer_type_t buft, ggml_type type, int64_t n_in, int64_t n_out) {
        auto *& meta = meta_by_type[buft];
        if (!meta) {
            meta = ggml_init({ 4*n_layer*ggml_tensor_overhead(), nullptr, true });
            estimates->contexts.emplace_back(meta);
        }
        return ggml_new_tensor_2d(meta, type, n_in, n_out);
    };
    for (int32_t il = 0; il < n_layer; ++il) {
        auto * type  = type_beside_router(model, il);
        auto & layer = estimates->layers[il];
        layer.down     = new_matrix(type_for_products(type, down_type, n_embd, n_down), down_type, n_embd, n_down);
        layer.log_norm = new_matrix(type, GGML_TYPE_F32, n_down + 1, n_expert);
        layer.output   = rank > 0 ? new_matrix(type, GGML_TYPE_F32, rank, n_expert) : nullptr;
        layer.up       = rank > 0 ? new_matrix(type_for_products(type, GGML_TYPE_Q4_0, n_columns, n_embd), GGML_TYPE_Q4_0, n_columns, n_embd) : nullptr;
        ggml_format_name(layer.down, "allocmoe.down-%d", il);
    }
    for (const auto & [type, meta] : meta_by_type) {
        auto * buffer = ggml_backend_alloc_ctx_tensors_from_buft(meta, type);
        if (!buffer) {
            return ALLOCMOE_ERR_MEMORY;
        }
        ggml_backend_buffer_set_usage(buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        estimates->buffers.emplace_back(buffer);
    }

    std::vector<float> transposed(n_columns*n_embd);
    for (int32_t il = 0; il < n_layer; ++il) {
        auto & layer = estimates->layers[il];
        set_converted(layer.down, estimator->down + il*n_down*n_embd);
        ggml_backend_tensor_set(layer.log_norm, estimator->log_norm + il*n_expert*(n_down + 1), 0, ggml_nbytes(layer.log_norm));
        if (rank == 0) {
            continue;
        }
        for (int64_t i = 0; i < rank*n_embd; ++i) {
            transposed[i%n_embd*n_columns + i/n_embd] = estimator->up[il*rank*n_embd + i];
        }
        set_converted(layer.up, transposed.data());
        ggml_backend_tensor_set(layer.output, estimator->output + il*n_expert*rank, 0, ggml_nbytes(layer.output));
    }
    current = std::move(estimates);
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
    llama_synchronize(const_cast<llama_context *>(ctx)); // devices count as they run
    const auto & usage  = *allocmoe_access::cparams(ctx).allocmoe.usage;
    const auto & counts = usage.phases[phase];
    std::copy(counts.tokens.begin(), counts.tokens.end(), tokens);
    for (int32_t il = 0; il < n_layer; ++il) {
        activations[il] = counts.activations[il] + usage.spent.get()[il].activations[phase];
    }
    return ALLOCMOE_OK;
}

void allocmoe_reset_counts(llama_context * ctx) {
    llama_synchronize(ctx);
    auto & usage = *allocmoe_access::cparams(ctx).allocmoe.usage;
    for (auto & phase : usage.phases) {
        std::fill(phase.activations.begin(), phase.activations.end(), 0);
        std::fill(phase.tokens     .begin(), phase.tokens     .end(), 0);
    }
    for (size_t il = 0; il < usage.phases[0].tokens.size(); ++il) {
        auto & activations = usage.spent.get()[il].activations;
        std::fill(std::begin(activations), std::end(activations), 0);
    }
}

// (layer's values, caller's values, how many) for every layer
template <class F>
static void for_each_left(llama_context * ctx, int32_t n_tokens, F && f) {
    llama_synchronize(ctx); // devices write as they run
    const auto * spent = allocmoe_access::cparams(ctx).allocmoe.usage->spent.get();
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
    const auto * plan = allocmoe_access::cparams(ctx).allocmoe.plan.get();
    return plan ? plan->token_rule : ALLOCMOE_RULE_OFF;
}

static allocmoe_usage::record * record_of(llama_context * ctx, int32_t il) {
    auto & records = allocmoe_access::cparams(ctx).allocmoe.usage->records;
    return il < 0 || il >= (int32_t) records.size() ? nullptr : &records[il];
}

template <typename T>
static int64_t take(std::vector<T> & recorded, T * values, int64_t n_max) {
    const int64_t n = recorded.size();
    if (values) {
        std::copy_n(recorded.begin(), std::min(n, n_max), values);
        recorded.clear();
    }
    return n;
}

int64_t allocmoe_take_scores(llama_context * ctx, int32_t il, float * scores, int64_t n_max) {
    auto * record = record_of(ctx, il);
    return record ? take(record->scores, scores, n_max) : 0;
}

int64_t allocmoe_take_experts(llama_context * ctx, int32_t il, int32_t * experts, int64_t n_max) {
    auto * record = record_of(ctx, il);
    return record ? take(record->experts, experts, n_max) : 0;
}

int64_t allocmoe_take_errors(llama_context * ctx, int32_t il, double * errors, int64_t n_max) {
    auto * record = record_of(ctx, il);
    return record ? take(record->errors, errors, n_max) : 0;
}

int64_t allocmoe_take_floats(llama_context * ctx, int32_t what, int32_t il, float * values, int64_t n_max) {
    auto * record = record_of(ctx, il);
    return record && what >= 0 && what < (int32_t) record->floats.size() ? take(record->floats[what], values, n_max) : 0;
}

void allocmoe_clear_records(llama_context * ctx) {
    for (auto & record : allocmoe_access::cparams(ctx).allocmoe.usage->records) {
        record = {};
    }
}

int64_t allocmoe_get_kept_output(const llama_context * ctx, int32_t il, float * output, int64_t n_max) {
    const auto & outputs = allocmoe_access::cparams(ctx).allocmoe.usage->layer_outputs;
    if (il < 0 || il >= (int32_t) outputs.size()) {
        return 0;
    }
    const int64_t n = outputs[il].size();
    if (output) {
        std::copy_n(outputs[il].begin(), std::min(n, n_max), output);
    }
    return n;
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

void allocmoe_select(const allocmoe_rule * rule, int32_t k, const float * scores, int64_t n_used, int64_t n_tokens, int32_t * n_kept, float * left) {
    allocmoe_token_rule_params params = {};
    params.rule      = rule->token_rule;
    params.k_base    = rule->k_base;
    params.k         = k;
    params.threshold = rule->threshold ? rule->threshold[0] : 0.0f;
    params.strict    = rule->strict;
    params.value     = rule->value;
    allocmoe_apply_token_rule(params, scores, n_used, n_tokens, n_kept, *left);
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
