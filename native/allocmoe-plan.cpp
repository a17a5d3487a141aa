#include "allocmoe-plan.h"

#include "allocmoe.h"
#include "allocmoe-context.h"
#include "allocmoe-hooks.h"

#include "llama-hparams.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <string>

const char * const allocmoe_token_rule_names[4] = { "off", "batch", "threshold", "estimate" };

bool allocmoe_by_threshold(int32_t token_rule) {
    return token_rule == ALLOCMOE_RULE_THRESHOLD || token_rule == ALLOCMOE_RULE_ESTIMATE;
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
    const bool routed  = layer.ffn_gate_inp && layer.ffn_down_exps && !layer.ffn_gate_tid2eid;
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
           (allocmoe_by_threshold(plan.token_rule) && plan.threshold.size() != plan.expert_used_count.size()) ||
           plan.value < ALLOCMOE_VALUE_SCORE || plan.value > ALLOCMOE_VALUE_REMAINING;
}

// What can skip are the plain and the repacked MUL_MAT_ID of ggml's CPU backend, and backends that say so.
const char * allocmoe_token_rule_obstacle(int32_t token_rule, const llama_model & model, const allocmoe_state & state) {
    if (token_rule == ALLOCMOE_RULE_OFF) {
        return nullptr;
    }
    if (model.arch == LLM_ARCH_GROVEMOE) {
        return "the architecture derives further experts from the chosen ones";
    }
    if (token_rule == ALLOCMOE_RULE_ESTIMATE) {
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
            return "only the CPU, CUDA and Vulkan backends can leave out single experts, and the model uses another device";
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
            auto * type            = ggml_backend_buffer_get_type(tensor->buffer);
            const std::string name = ggml_backend_buft_name(type);
            const bool cpu         = name == "CPU" || name == "CPU_Mapped" || name == "CPU_REPACK" || allocmoe_stays_in_file(tensor);
            if (!cpu && !allocmoe_runs_token_rules(ggml_backend_buft_get_device(type))) {
                return "its experts are stored in a layout that cannot leave out single ones";
            }
        }
    }
    return nullptr;
}
