// The plan: experts per token in each layer and a token rule.
#pragma once

#include "allocmoe-instrument.h"

#include <cstdint>
#include <map>
#include <memory>
#include <numeric>
#include <vector>

struct llama_hparams;
struct llama_model;
struct allocmoe_estimates;
struct allocmoe_state;

// Immutable once made: contexts share it.
struct allocmoe_plan {
    std::vector<int32_t> expert_used_count; // [block_count], 0: the layer is left as the model has it

    int32_t token_rule; // ALLOCMOE_RULE_*
    int32_t k_base;
    int32_t value; // ALLOCMOE_VALUE_*
    bool strict;
    std::vector<float> threshold; // [block_count], for ALLOCMOE_RULE_THRESHOLD and _ESTIMATE

    std::shared_ptr<const allocmoe_estimates> estimates; // for ALLOCMOE_RULE_ESTIMATE

    // [block_count], what an expert that has to be read is above at least where misses have a price: what the file's own budget
    // asks of any. Empty for estimates that are not the file's.
    std::vector<float> miss_threshold;

    allocmoe_plan();
    bool operator==(const allocmoe_plan & other) const;
};

// What a context's graphs are built for. A change makes a new one.
struct allocmoe_settings {
    std::shared_ptr<const allocmoe_plan> plan; // null: the model's own expert counts

    // The plans of sequences that have a budget of their own, by sequence id; empty in most contexts. They have token rule,
    // k_base, value, strict and estimates of `plan`, which is not null then; their counts and thresholds are their own, and
    // reach the token rules as values per token.
    std::map<int32_t, std::shared_ptr<const allocmoe_plan>> seq_plans;

    allocmoe_instrument instrument = {};

    bool priced = false; // misses have a price

    // Of a token of this sequence, where there is a plan.
    const allocmoe_plan & plan_of(int32_t seq_id) const {
        const auto own = seq_plans.find(seq_id);
        return own == seq_plans.end() ? *plan : *own->second;
    }
};

extern const char * const allocmoe_token_rule_names[4]; // by ALLOCMOE_RULE_*

// Whether the rule goes by thresholds.
bool allocmoe_by_threshold(int32_t token_rule);

// The experts per token of every layer under a plan, [block_count]: null for the model's own; 0 where the plan has no say.
std::vector<int32_t> allocmoe_effective_plan(const llama_model & model, const allocmoe_plan * plan);

// Activations per token of all layers' experts per token.
inline int64_t allocmoe_sum_of(const std::vector<int32_t> & expert_used_count) {
    return std::accumulate(expert_used_count.begin(), expert_used_count.end(), (int64_t) 0);
}

// Whether an entry is below 0 or above the model's number of experts.
bool allocmoe_out_of_range(const llama_hparams & hparams, const std::vector<int32_t> & expert_used_count);

// Whether rule, value or k_base are unknown, or a threshold is missing or not a number.
bool allocmoe_token_rule_out_of_range(const allocmoe_plan & plan);

// Why the model cannot skip single experts of a token under a rule, nullptr if it can or need not.
const char * allocmoe_token_rule_obstacle(int32_t token_rule, const llama_model & model, const allocmoe_state & state);
