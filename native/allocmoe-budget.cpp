// The plan for a budget, looked up in what a file carries. Plans are made in Python, when a file is written.
#include "allocmoe-file.h"

#include "allocmoe.h"

#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>

bool allocmoe_raised_above_plan(const allocmoe_model & file, const llama_model & model) {
    const auto own = allocmoe_effective_plan(model, nullptr);
    for (size_t il = 0; il < own.size(); ++il) {
        if (own[il] > file.full[il]) {
            return true;
        }
    }
    return false;
}

[[noreturn]] static void fail_overridden(const allocmoe_model & file, const llama_model & model) {
    const auto own = allocmoe_effective_plan(model, nullptr);
    const auto k   = *std::max_element(own.begin(), own.end());
    throw allocmoe_error(format(
        "%s.expert_used_count is overridden with %d, and the file's plans are for %d: only the full budget, %lld activations per token, can be served",
        llm_arch_name(model.arch), k, *std::max_element(file.full.begin(), file.full.end()), (long long) allocmoe_sum_of(own)));
}

// (row, what it spends) for every row that the rule can serve. Where the model's own counts are below those that the plans were
// made for, by an override, every layer is cut off at them.
template <class F>
static void for_each_row(const allocmoe_model & file, const std::vector<int32_t> & own, int32_t rule, F && f) {
    const bool estimate  = rule == ALLOCMOE_RULE_ESTIMATE;
    const size_t n_layer = file.full.size();
    const auto & counts  = estimate ? file.estimate.expert_used_count : file.counts.expert_used_count;
    const int64_t least  = allocmoe_sum_of(file.full) - (int64_t) (file.n_rows - 1);
    for (size_t row = 0; row < file.n_rows; ++row) {
        if (estimate && !allocmoe_served(&file.estimate.threshold[row * n_layer], n_layer)) {
            continue;
        }
        int64_t spends = least + row;
        if (own != file.full) {
            spends = 0;
            for (size_t il = 0; il < n_layer; ++il) {
                spends += std::min(counts[row * n_layer + il], own[il]);
            }
        }
        f(row, spends);
    }
}

int64_t allocmoe_total_of(const allocmoe_model & file, const llama_model & model, const allocmoe_plan & plan) {
    const auto own       = allocmoe_effective_plan(model, nullptr);
    const size_t n_layer = own.size();
    const bool estimate  = plan.token_rule == ALLOCMOE_RULE_ESTIMATE;
    const auto & table   = estimate ? file.estimate : file.counts;
    const auto cut_off   = [&](const int32_t * counts) {
        std::vector<int32_t> k(counts, counts + n_layer);
        std::transform(k.begin(), k.end(), own.begin(), k.begin(), [](int32_t a, int32_t b) { return std::min(a, b); });
        return k;
    };
    const auto counts = cut_off(plan.expert_used_count.data());
    if (estimate && file.estimate.threshold.empty()) {
        return allocmoe_sum_of(counts); // estimates that are not the file's
    }
    int64_t total = -1;
    for_each_row(file, own, plan.token_rule, [&](size_t row, int64_t spends) {
        const bool same = cut_off(&table.expert_used_count[row * n_layer]) == counts &&
                          (!estimate || std::equal(plan.threshold.begin(), plan.threshold.end(), table.threshold.begin() + row * n_layer));
        if (same) {
            total = spends; // of several the largest, which its plan stays within
        }
    });
    return total < 0 ? allocmoe_sum_of(counts) : total;
}

allocmoe_budgets allocmoe_range(const allocmoe_model * file, const llama_model & model, int32_t token_rule) {
    const auto own = allocmoe_effective_plan(model, nullptr);
    if (allocmoe_sum_of(own) == 0) {
        throw allocmoe_error("a dense model: it has no experts to budget");
    }
    if (!file || file->n_rows == 0) {
        throw allocmoe_error("other budgets need the plans that allocmoe-convert stores in the file; convert it first");
    }
    if (allocmoe_raised_above_plan(*file, model)) {
        fail_overridden(*file, model);
    }
    allocmoe_budgets range = { allocmoe_sum_of(own), allocmoe_total_of(*file, model, file->plan), allocmoe_sum_of(own) };
    for_each_row(*file, own, token_rule, [&](size_t, int64_t spends) { range.least = std::min(range.least, spends); });
    return range;
}

int64_t allocmoe_preset_total(const std::string & name, const allocmoe_model * file, const llama_model & model, int32_t token_rule) {
    if (name != "fast" && name != "balanced" && name != "full") {
        throw allocmoe_error(format("budget: found \"%s\", want a number, or \"fast\", \"balanced\" or \"full\"", name.substr(0, 60).c_str()));
    }
    const int64_t full = allocmoe_sum_of(allocmoe_effective_plan(model, nullptr));
    if (name == "full" && full > 0) {
        return full; // which any file serves
    }
    const auto range = allocmoe_range(file, model, token_rule < 0 && file ? file->plan.token_rule : token_rule);
    return name == "fast" ? std::max(range.least, (range.of_file * 4 + 3) / 6) : range.of_file;
}

// The row for a total, the one that spends most within it: file.n_rows where none does. low: the least that one spends.
static size_t best_row(const allocmoe_model & file, const std::vector<int32_t> & own, int32_t rule, int64_t total, int64_t & low) {
    size_t best   = file.n_rows;
    int64_t found = -1;
    low           = allocmoe_sum_of(own);
    for_each_row(file, own, rule, [&](size_t row, int64_t spends) {
        low = std::min(low, spends);
        if (spends <= total && spends > found) {
            best  = row;
            found = spends;
        }
    });
    return best;
}

static size_t find_row(const allocmoe_model & file, const std::vector<int32_t> & own, int32_t rule, int64_t total) {
    int64_t low       = 0;
    const size_t best = best_row(file, own, rule, total, low);
    if (best == file.n_rows || total > allocmoe_sum_of(own)) {
        throw allocmoe_error(format("budget: found %lld activations per token, want %lld to %lld under token rule %s",
            (long long) total, (long long) low, (long long) allocmoe_sum_of(own), allocmoe_token_rule_names[rule]));
    }
    return best;
}

std::vector<float> allocmoe_miss_threshold(const allocmoe_model & file, const llama_model & model) {
    if (file.plan.token_rule == ALLOCMOE_RULE_ESTIMATE) {
        return file.plan.threshold;
    }
    if (file.estimate.threshold.empty()) {
        return {};
    }
    const auto own   = allocmoe_effective_plan(model, nullptr);
    int64_t low      = 0;
    const size_t row = best_row(file, own, ALLOCMOE_RULE_ESTIMATE, allocmoe_total_of(file, model, file.plan), low);
    if (row == file.n_rows) {
        return {};
    }
    const auto first = file.estimate.threshold.begin() + row * own.size();
    return { first, first + own.size() };
}

static std::vector<float> thresholds_of(const allocmoe_model & file, const std::vector<int32_t> & counts) {
    if (file.threshold_table.empty()) {
        throw allocmoe_error("token rule threshold needs a threshold table, and the file has none: convert it again");
    }
    std::vector<float> threshold(counts.size(), 0.0f); // layers without experts have no row, and nothing reads their entry
    for (size_t il = 0; il < counts.size(); ++il) {
        if (counts[il] > 0) {
            threshold[il] = file.threshold_table[file.threshold_begin[il] + counts[il] - 1];
        }
    }
    return threshold;
}

static std::unique_ptr<allocmoe_plan> full_or_fail(const allocmoe_model * file, const llama_model & model, int64_t total, int32_t token_rule, int32_t strict) {
    const auto own = allocmoe_effective_plan(model, nullptr);
    if (token_rule > ALLOCMOE_RULE_OFF || strict > 0) {
        throw allocmoe_error("a token rule, or strict, needs the profile that allocmoe-convert stores in the file; convert it first");
    }
    if (total == ALLOCMOE_TOTAL_OF_FILE && file) {
        auto plan        = std::make_unique<allocmoe_plan>(file->plan);
        plan->token_rule = ALLOCMOE_RULE_OFF;
        plan->strict     = false;
        plan->threshold.clear();
        return plan;
    }
    if (total == ALLOCMOE_TOTAL_OF_FILE || total == allocmoe_sum_of(own)) {
        return nullptr;
    }
    throw allocmoe_error(format("a budget of %lld needs the plans that allocmoe-convert stores in the file; convert it first", (long long) total));
}

std::unique_ptr<allocmoe_plan> allocmoe_plan_budget(const allocmoe_model * file, const llama_model & model, int64_t total, int32_t token_rule, int32_t strict) {
    const auto own = allocmoe_effective_plan(model, nullptr);
    if (allocmoe_sum_of(own) == 0) {
        throw allocmoe_error("a dense model: it has no experts to budget");
    }
    if (token_rule < -1 || token_rule > ALLOCMOE_RULE_ESTIMATE || strict < -1 || strict > 1) {
        throw allocmoe_error(format("token rule: found %d, strict %d, want -1 or one that there is", token_rule, strict));
    }
    if (file && token_rule == -1 && strict == -1 && total == ALLOCMOE_TOTAL_OF_FILE) {
        if (allocmoe_raised_above_plan(*file, model)) {
            return nullptr; // whoever raises the count wants it raised
        }
        auto plan = std::make_unique<allocmoe_plan>(file->plan);
        return plan;
    }
    if (!file || file->n_rows == 0) {
        return full_or_fail(file, model, total, token_rule, strict);
    }
    if (allocmoe_raised_above_plan(*file, model)) {
        if ((total != ALLOCMOE_TOTAL_OF_FILE && total != allocmoe_sum_of(own)) || token_rule > ALLOCMOE_RULE_OFF || strict == 1) {
            fail_overridden(*file, model);
        }
        return nullptr;
    }

    const int32_t rule = token_rule < 0 ? file->plan.token_rule : token_rule;
    if (strict == 1 && !allocmoe_by_threshold(rule)) {
        throw allocmoe_error(format("strict: needs token rule threshold or estimate, found %s", allocmoe_token_rule_names[rule]));
    }
    const bool estimate = rule == ALLOCMOE_RULE_ESTIMATE;
    if (estimate && (!file->has_estimator || file->estimate.threshold.empty())) {
        throw allocmoe_error("token rule estimate needs an estimator, and the file has none: convert it again");
    }

    auto plan = std::make_unique<allocmoe_plan>(file->plan);
    // the file's own plan under another rule keeps its counts, but where estimates come or go
    const bool same_counts = total == ALLOCMOE_TOTAL_OF_FILE && estimate == (file->plan.token_rule == ALLOCMOE_RULE_ESTIMATE);
    if (!same_counts) {
        const size_t n_layer = own.size();
        const auto & table   = estimate ? file->estimate : file->counts;
        const size_t row     = find_row(*file, own, rule, total == ALLOCMOE_TOTAL_OF_FILE ? allocmoe_total_of(*file, model, file->plan) : total);
        plan->expert_used_count.assign(table.expert_used_count.begin() + row * n_layer, table.expert_used_count.begin() + (row + 1) * n_layer);
        if (estimate) {
            plan->threshold.assign(table.threshold.begin() + row * n_layer, table.threshold.begin() + (row + 1) * n_layer);
        }
    }
    for (size_t il = 0; il < own.size(); ++il) {
        plan->expert_used_count[il] = std::min(plan->expert_used_count[il], own[il]);
    }
    plan->token_rule = rule;
    plan->strict     = estimate ? strict != 0 : strict == 1;
    if (rule == ALLOCMOE_RULE_THRESHOLD) {
        plan->threshold = thresholds_of(*file, plan->expert_used_count);
    } else if (!estimate) {
        plan->threshold.clear();
    }
    return plan;
}
