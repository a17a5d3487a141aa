// What a file carries: a plan, a table from which any other budget is served, and the estimator. The file is the model's own
// or a side file; its keys are described in allocmoe_edge/plan/metadata.py.
#pragma once

#include "allocmoe.h"
#include "allocmoe-estimator.h"
#include "allocmoe-plan.h"

#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

struct gguf_context;
struct llama_hparams;
struct llama_model;

// What a caller of the C API or the user of a file has to be told.
struct allocmoe_error : std::runtime_error {
    int32_t status; // ALLOCMOE_ERR_*
    explicit allocmoe_error(const std::string & what, int32_t status = ALLOCMOE_ERR_BUDGET) : std::runtime_error(what), status(status) {}
};

struct allocmoe_model {
    allocmoe_plan plan;        // what the file says is to be run, without estimates
    std::vector<int32_t> full; // [block_count], the experts per token that the plans were made for, 0 where a layer routes none

    // Plans by total: row r is for n_moe_layers + r activations, or as large a share of their cost; the last for all. Empty: the file has none.
    struct table {
        std::vector<int32_t> expert_used_count; // [n_rows][block_count]
        std::vector<float> threshold;           // [n_rows][block_count], for ALLOCMOE_RULE_ESTIMATE; NaN where the rule cannot spend so little
    };
    table counts;   // for the other rules
    table estimate; // for ALLOCMOE_RULE_ESTIMATE
    size_t n_rows = 0;

    // for ALLOCMOE_RULE_THRESHOLD, by layer and count: empty, or those of layer il begin at threshold_begin[il]
    std::vector<float> threshold_table;
    std::vector<size_t> threshold_begin;

    // budget_total as a key override of the caller has it, 0 for none
    uint32_t asked_total = 0;

    // Beside the model's routers, from the first time that somebody asks for them: contexts share them. Null if the file has
    // no estimator.
    std::shared_ptr<const allocmoe_estimates> estimates(const llama_model & model) const;
    bool has_estimator = false;

    // of estimates()
    mutable std::mutex mutex;
    mutable std::unique_ptr<allocmoe_matrices> matrices; // until they have been put there
    mutable std::shared_ptr<const allocmoe_estimates> placed;
};

// Null if the metadata has nothing of ours. Throws allocmoe_error if it is invalid.
std::unique_ptr<allocmoe_model> allocmoe_read_file(const gguf_context * meta, const llama_hparams & hparams);

// Whether a row of thresholds is of a total that ALLOCMOE_RULE_ESTIMATE can serve.
bool allocmoe_served(const float * threshold, size_t n_layer);

// What a side file has, checked against the model. Throws allocmoe_error.
std::shared_ptr<const allocmoe_model> allocmoe_read_side_file(const char * path, const llama_model & model);

// The plan that spends `total` activations per token, ALLOCMOE_TOTAL_OF_FILE for what the file itself spends, under a rule, -1
// for the file's; strict: 0, 1, or -1 for the rule's own way. Without estimates. file: null where there is none. Returns null
// for the model's own expert counts. Throws allocmoe_error where it cannot be served.
std::unique_ptr<allocmoe_plan> allocmoe_plan_budget(const allocmoe_model * file, const llama_model & model, int64_t total, int32_t token_rule, int32_t strict);

// The thresholds of the file's own budget under ALLOCMOE_RULE_ESTIMATE, [block_count]; empty where it has none.
std::vector<float> allocmoe_miss_threshold(const allocmoe_model & file, const llama_model & model);

// The total for which the file's table has a plan's counts: what they add up to, but where a budget counts milliseconds.
int64_t allocmoe_total_of(const allocmoe_model & file, const llama_model & model, const allocmoe_plan & plan);

// The budgets that allocmoe_plan_budget serves under a rule. Throws allocmoe_error where there is no choice.
struct allocmoe_budgets {
    int64_t least;
    int64_t of_file;
    int64_t full;
};
allocmoe_budgets allocmoe_range(const allocmoe_model * file, const llama_model & model, int32_t token_rule);

// The total that goes by a name. token_rule: -1 for the file's. Throws allocmoe_error, also for a name that there is not.
int64_t allocmoe_preset_total(const std::string & name, const allocmoe_model * file, const llama_model & model, int32_t token_rule);

// Whether the model runs more experts per token than the file's plans were made for: somebody has overridden its count.
bool allocmoe_raised_above_plan(const allocmoe_model & file, const llama_model & model);
