#include "allocmoe-plan.h"

#include "allocmoe.h"
#include "allocmoe-context.h"
#include "allocmoe-hooks.h"

#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include "ggml-backend.h"
#include "gguf.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

static const char * const token_rule_names[] = { "off", "batch", "threshold", "estimate" };
static const char * const value_names[]      = { "score", "relative", "remaining" };

const char * allocmoe_token_rule_name(int32_t token_rule) {
    return token_rule_names[token_rule];
}

allocmoe_plan::allocmoe_plan() : token_rule(ALLOCMOE_RULE_OFF), k_base(1), value(ALLOCMOE_VALUE_SCORE), strict(false) {}

bool allocmoe_plan::operator==(const allocmoe_plan & other) const {
    return expert_used_count == other.expert_used_count && token_rule == other.token_rule && k_base == other.k_base &&
           value == other.value && strict == other.strict && threshold == other.threshold && estimates == other.estimates;
}

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

std::vector<int32_t> allocmoe_effective_plan(const llama_model & model, const allocmoe_plan * plan) {
    std::vector<int32_t> k(model.hparams.n_layer_all);
    for (uint32_t il = 0; il < k.size(); ++il) {
        k[il] = own_expert_used_count(model, il);
        if (plan && plan->expert_used_count[il] > 0) {
            k[il] = std::min(k[il], plan->expert_used_count[il]);
        }
    }
    return k;
}

bool allocmoe_out_of_range(const llama_hparams & hparams, const std::vector<int32_t> & k) {
    return std::any_of(k.begin(), k.end(), [&](int32_t x) { return x < 0 || x > (int32_t) hparams.n_expert; });
}

bool allocmoe_token_rule_out_of_range(const allocmoe_plan & plan) {
    const bool bad_threshold = std::any_of(plan.threshold.begin(), plan.threshold.end(), [](float t) { return std::isnan(t); });
    return plan.token_rule < ALLOCMOE_RULE_OFF || plan.token_rule > ALLOCMOE_RULE_ESTIMATE || plan.k_base < 1 || bad_threshold ||
           plan.value < ALLOCMOE_VALUE_SCORE || plan.value > ALLOCMOE_VALUE_REMAINING;
}

//
// what the model can run
//

// Why the model cannot skip single experts of a token, nullptr if it can. What can are the plain and the repacked
// MUL_MAT_ID of ggml's CPU backend, and backends that say so.
static const char * token_rule_obstacle(const allocmoe_plan & plan, const llama_model & model, const allocmoe_state & state) {
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
        if (!allocmoe_runs_token_rules(device.dev)) {
            return "only the CPU and CUDA backends can leave out single experts, and the model uses another device";
        }
    }
    if (!model.devices.empty() && !state.spent_on_devices) {
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
            if (!cpu && !allocmoe_runs_token_rules(ggml_backend_buft_get_device(type))) {
                return "its experts are stored in a layout that cannot leave out single ones";
            }
        }
    }
    return nullptr;
}

void allocmoe_degrade_token_rule(allocmoe_plan & plan, const llama_model & model, const allocmoe_state & state) {
    const char * obstacle = plan.token_rule == ALLOCMOE_RULE_OFF ? nullptr : token_rule_obstacle(plan, model, state);
    if (obstacle) {
        LLAMA_LOG_WARN("allocmoe: token rule %s is off: %s\n", token_rule_names[plan.token_rule], obstacle);
        plan.token_rule = ALLOCMOE_RULE_OFF;
    }
}

//
// from metadata
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

std::shared_ptr<const allocmoe_model> allocmoe_load_model(const gguf_context * meta, const llama_hparams & hparams) {
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
    if (allocmoe_out_of_range(hparams, plan->expert_used_count)) {
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

    if (allocmoe_token_rule_out_of_range(*plan)) {
        throw std::runtime_error("allocmoe.threshold has an entry that is not a number");
    }

    auto file = std::make_shared<allocmoe_model>();
    file->plan = std::move(plan);
    return file;
}
