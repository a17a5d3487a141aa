#include "allocmoe-file.h"

#include "allocmoe.h"
#include "allocmoe-expert-cache.h"
#include "allocmoe-hooks.h"

#include "llama-arch.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model-loader.h"
#include "llama-model.h"

#include "gguf.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

// The allocmoe.* keys of some metadata, by what follows the dot.
struct keys {
    const gguf_context * meta;

    int64_t find(const std::string & name) const { return gguf_find_key(meta, ("allocmoe." + name).c_str()); }
    bool has(const std::string & name) const { return find(name) >= 0; }

    [[noreturn]] static void fail(const std::string & name, const std::string & what) {
        throw allocmoe_error("allocmoe." + name + " " + what);
    }

    template <typename T>
    std::vector<T> array(const std::string & name, gguf_type type, size_t n) const {
        const int64_t i = find(name);
        if (i < 0 || gguf_get_kv_type(meta, i) != GGUF_TYPE_ARRAY || gguf_get_arr_type(meta, i) != type || gguf_get_arr_n(meta, i) != n) {
            fail(name, format("is missing or not an array of %zu %s", n, gguf_type_name(type)));
        }
        const auto * values = (const T *) gguf_get_arr_data(meta, i);
        return { values, values + n };
    }

    std::vector<float> numbers(const std::string & name, size_t n) const {
        auto values = array<float>(name, GGUF_TYPE_FLOAT32, n);
        if (std::any_of(values.begin(), values.end(), [](float x) { return std::isnan(x); })) {
            fail(name, "has an entry that is not a number");
        }
        return values;
    }

    // Expert counts in the smallest type that holds them.
    std::vector<int32_t> counts(const std::string & name, size_t n, int32_t most) const {
        const int64_t i  = find(name);
        const bool bytes = i >= 0 && gguf_get_kv_type(meta, i) == GGUF_TYPE_ARRAY && gguf_get_arr_type(meta, i) == GGUF_TYPE_UINT8;
        std::vector<int32_t> k(n);
        if (bytes) {
            const auto values = array<uint8_t>(name, GGUF_TYPE_UINT8, n);
            std::copy(values.begin(), values.end(), k.begin());
        } else {
            const auto values = array<uint16_t>(name, GGUF_TYPE_UINT16, n);
            std::copy(values.begin(), values.end(), k.begin());
        }
        if (std::any_of(k.begin(), k.end(), [most](int32_t x) { return x > most; })) {
            fail(name, format("has an entry outside 0..%d", most));
        }
        return k;
    }

    uint32_t number(const std::string & name, uint32_t low, uint32_t high) const {
        const int64_t i = find(name);
        if (i < 0 || gguf_get_kv_type(meta, i) != GGUF_TYPE_UINT32 || gguf_get_val_u32(meta, i) < low || gguf_get_val_u32(meta, i) > high) {
            fail(name, format("is missing or not a uint32 from %u to %u", low, high));
        }
        return gguf_get_val_u32(meta, i);
    }

    // The place of a string among `names`; 0 where the key is missing.
    template <size_t n>
    int32_t choice(const std::string & name, const char * const (&names)[n]) const {
        const int64_t i = find(name);
        if (i < 0) {
            return 0;
        }
        const char * found = gguf_get_kv_type(meta, i) == GGUF_TYPE_STRING ? gguf_get_val_str(meta, i) : "";
        const auto * it    = std::find_if(names, names + n, [&](const char * x) { return strcmp(x, found) == 0; });
        if (it == names + n) {
            fail(name, format("'%s' is not known to this version of allocmoe-edge", found));
        }
        return (int32_t) (it - names);
    }
};

} // namespace

static void check_version(const keys & keys) {
    const int64_t i = keys.find("version");
    if (gguf_get_kv_type(keys.meta, i) != GGUF_TYPE_UINT32 || gguf_get_val_u32(keys.meta, i) != ALLOCMOE_PLAN_VERSION) {
        keys.fail("version", format("is not %d: the file was made by another version of allocmoe-edge, convert it again", ALLOCMOE_PLAN_VERSION));
    }
}

static void read_plan(const keys & keys, const llama_hparams & hparams, allocmoe_model & file) {
    const size_t n_layer = hparams.n_layer_all;

    file.full = keys.array<int32_t>("expert_used_count_full", GGUF_TYPE_INT32, n_layer);
    if (allocmoe_out_of_range(hparams, file.full)) {
        keys.fail("expert_used_count_full", format("has an entry outside 0..%u", hparams.n_expert));
    }
    auto & plan            = file.plan;
    plan.expert_used_count = keys.array<int32_t>("expert_used_count", GGUF_TYPE_INT32, n_layer);
    for (size_t il = 0; il < n_layer; ++il) {
        if (plan.expert_used_count[il] < std::min(1, file.full[il]) || plan.expert_used_count[il] > file.full[il]) {
            keys.fail("expert_used_count", format("has %d in layer %zu, which is not between one and the model's own %d",
                                               plan.expert_used_count[il], il, file.full[il]));
        }
    }
    const int64_t total = allocmoe_sum_of(plan.expert_used_count);
    if (keys.has("budget_total") && keys.number("budget_total", 0, UINT32_MAX) != total) {
        keys.fail("budget_total", format("is not the sum of allocmoe.expert_used_count, %lld", (long long) total));
    }
    plan.token_rule = keys.choice("token_rule", allocmoe_token_rule_names);
    plan.strict     = plan.token_rule == ALLOCMOE_RULE_ESTIMATE;
    if (keys.has("k_base")) {
        plan.k_base = keys.number("k_base", 1, hparams.n_expert);
    }
    if (allocmoe_by_threshold(plan.token_rule)) {
        plan.threshold = keys.numbers("threshold", n_layer);
    }
}

bool allocmoe_served(const float * threshold, size_t n_layer) {
    return std::none_of(threshold, threshold + n_layer, [](float t) { return std::isnan(t); });
}

// Of one activation in each layer: what budgets are counted in. 1 where the file says nothing that could be meant.
static std::vector<double> read_cost(const keys & keys, const std::vector<int32_t> & full) {
    const int64_t i = keys.find("cost");
    if (i >= 0 && gguf_get_kv_type(keys.meta, i) == GGUF_TYPE_ARRAY && gguf_get_arr_type(keys.meta, i) == GGUF_TYPE_FLOAT64 && gguf_get_arr_n(keys.meta, i) == full.size()) {
        auto cost = keys.array<double>("cost", GGUF_TYPE_FLOAT64, full.size());
        bool fit  = true;
        for (size_t il = 0; il < full.size(); ++il) {
            fit = fit && std::isfinite(cost[il]) && (full[il] == 0 || cost[il] > 0);
        }
        if (fit) {
            return cost;
        }
    }
    return std::vector<double>(full.size(), 1.0);
}

// Reads a table, and refuses a row that does not spend the total that it is for. Where layers' costs differ a row may cost as
// much as that share of all activations, and where more experts would not help, less; under ALLOCMOE_RULE_ESTIMATE counts are
// rounded, up to one a layer. threshold: of that rule, NaN in rows that are not served.
static std::vector<int32_t> read_rows(const keys & keys, const char * name, const allocmoe_model & file, const std::vector<float> & threshold) {
    const auto & full    = file.full;
    const size_t n_layer = full.size();
    const auto k         = keys.counts(name, file.n_rows * n_layer, UINT16_MAX);
    const auto cost      = read_cost(keys, full);

    bool equal    = true;
    double all    = 0; // what the model's own counts cost
    double least  = 0; // what one expert in each layer costs
    int64_t total = 0; // of the row
    for (size_t il = 0; il < n_layer; ++il) {
        equal = equal && (full[il] == 0 || cost[il] == 1);
        all += cost[il] * full[il];
        least += cost[il] * std::min(1, full[il]);
        total += std::min(1, full[il]);
    }
    const int64_t most = total + (int64_t) file.n_rows - 1;
    for (size_t row = 0; row < file.n_rows; ++row, ++total) {
        int64_t n    = 0;
        double spent = 0;
        for (size_t il = 0; il < n_layer; ++il) {
            const int32_t found = k[row * n_layer + il];
            if (found < std::min(1, full[il]) || found > full[il]) {
                keys.fail(name, format("has %d in row %zu for layer %zu, which is not between one and the model's own %d", found, row, il, full[il]));
            }
            n += found;
            spent += cost[il] * found;
        }
        const bool estimate = !threshold.empty();
        if (n == total || (estimate && !allocmoe_served(&threshold[row * n_layer], n_layer))) {
            continue;
        }
        const double limit = std::max(all * total / most, least) * (1 + 1e-9) + (estimate ? least : 0.0);
        if (spent > limit || (estimate && equal)) {
            keys.fail(name, format("spends %lld activations in row %zu, which is for %lld", (long long) n, row, (long long) total));
        }
    }
    return k;
}

static void read_tables(const keys & keys, allocmoe_model & file) {
    const size_t n_layer = file.full.size();
    if (keys.has("table.expert_used_count")) {
        file.n_rows = 1;
        for (int32_t k : file.full) {
            file.n_rows += std::max(k - 1, 0);
        }
        file.counts.expert_used_count = read_rows(keys, "table.expert_used_count", file, {});
        if (keys.has("table.estimate.expert_used_count")) {
            file.estimate.threshold         = keys.array<float>("table.estimate.threshold", GGUF_TYPE_FLOAT32, file.n_rows * n_layer);
            file.estimate.expert_used_count = read_rows(keys, "table.estimate.expert_used_count", file, file.estimate.threshold);
        }
    }
    if (keys.has("threshold_table")) {
        size_t n = 0;
        for (int32_t k : file.full) {
            file.threshold_begin.push_back(n);
            n += k;
        }
        file.threshold_table = keys.numbers("threshold_table", n);
    }
}

// Stored in whole uint64: fewer entries are quicker to read.
static std::vector<uint8_t> packed(const keys & keys, const char * name, size_t n_bytes) {
    const auto words   = keys.array<uint64_t>(name, GGUF_TYPE_UINT64, (n_bytes + 7) / 8);
    const auto * bytes = (const uint8_t *) words.data();
    return { bytes, bytes + n_bytes };
}

static std::vector<float> packed_half(const keys & keys, const char * name, size_t n) {
    const auto bytes = packed(keys, name, 2 * n);
    std::vector<float> values(n);
    ggml_fp16_to_fp32_row((const ggml_fp16_t *) bytes.data(), values.data(), n);
    return values;
}

static std::unique_ptr<allocmoe_matrices> read_estimator(const keys & keys, const llama_hparams & hparams, const std::vector<int32_t> & full) {
    auto made  = std::make_unique<allocmoe_matrices>();
    auto & m   = *made;
    m.n_embd   = keys.number("estimator.n_embd", 1, INT32_MAX);
    m.n_expert = keys.number("estimator.n_expert", 1, INT32_MAX);
    if (m.n_embd != (int32_t) hparams.n_embd || m.n_expert != (int32_t) hparams.n_expert) {
        throw allocmoe_error(format("the estimator is for another model, of n_embd %d and %d experts", m.n_embd, m.n_expert));
    }
    m.n_down = keys.number("estimator.n_down", 1, INT16_MAX);
    m.rank   = keys.number("estimator.rank", 0, m.n_down);
    m.n_relu = keys.number("estimator.n_relu", 0, m.n_down - m.rank);

    size_t n = 0;
    for (int32_t k : full) {
        m.entry.push_back(k > 0 ? (int32_t) n++ : -1);
    }
    m.down     = packed(keys, "estimator.down", n * m.down_bytes());
    m.up       = packed(keys, "estimator.up", n * m.up_bytes());
    m.log_norm = packed_half(keys, "estimator.log_norm", n * m.n_expert * (m.n_down + 1));
    m.output   = packed_half(keys, "estimator.output", n * m.n_expert * m.rank);
    if (const char * fault = allocmoe_matrices_fault(m)) {
        throw allocmoe_error(fault);
    }
    return made;
}

std::unique_ptr<allocmoe_model> allocmoe_read_file(const gguf_context * meta, const llama_hparams & hparams) {
    const keys keys = { meta };
    if (!meta || !keys.has("version")) {
        return nullptr;
    }
    check_version(keys);

    auto file = std::make_unique<allocmoe_model>();
    read_plan(keys, hparams, *file);
    read_tables(keys, *file);
    file->has_estimator = keys.has("estimator.n_down");
    if (file->has_estimator) {
        file->matrices = read_estimator(keys, hparams, file->full);
    }
    if (file->plan.token_rule == ALLOCMOE_RULE_ESTIMATE && !file->has_estimator) {
        throw allocmoe_error("allocmoe.token_rule is estimate, and the file has no estimator");
    }
    return file;
}

std::shared_ptr<const allocmoe_model> allocmoe_load_model(llama_model_loader & loader, const llama_hparams & hparams) {
    std::shared_ptr<allocmoe_model> file = allocmoe_read_file(loader.metadata, hparams);
    for (const auto & [key, value] : loader.kv_overrides) {
        if (key == ALLOCMOE_KEY_EXPERT_CACHE || key == ALLOCMOE_KEY_MISS_PRICE) {
            continue; // nothing of the file's
        }
        if (key.rfind("allocmoe.", 0) == 0 && (!file || key != "allocmoe.budget_total")) {
            throw allocmoe_error(format("%s cannot be overridden: %s", key.c_str(), file ? "of our keys only allocmoe.budget_total can" : "the file has no plan"));
        }
    }
    const auto asked = loader.kv_overrides.find("allocmoe.budget_total");
    if (file && asked != loader.kv_overrides.end()) {
        const auto & value = asked->second;
        const int64_t full = allocmoe_sum_of(file->full);
        if (value.tag != LLAMA_KV_OVERRIDE_TYPE_INT || value.val_i64 < 1 || value.val_i64 > full) {
            throw allocmoe_error(format("allocmoe.budget_total: want a whole number of expert activations per token, 1 to %lld", (long long) full));
        }
        const int64_t i = gguf_find_key(loader.metadata, "allocmoe.budget_total");
        if (file->n_rows > 0 || i < 0 || value.val_i64 != gguf_get_val_u32(loader.metadata, i)) {
            file->asked_total = value.val_i64;
        }
    }
    return file;
}

std::shared_ptr<const allocmoe_model> allocmoe_read_side_file(const char * path, const llama_model & model) {
    const std::unique_ptr<gguf_context, decltype(&gguf_free)> meta(gguf_init_from_file(path, { true, nullptr }), gguf_free);
    if (!meta) {
        throw allocmoe_error(format("%s: no GGUF file, or a damaged one", path));
    }
    const std::string own = llm_arch_name(model.arch);
    for (const char * key : { "allocmoe.model.architecture", "general.architecture" }) {
        const int64_t i = gguf_find_key(meta.get(), key);
        if (i < 0) {
            continue;
        }
        const std::string found = gguf_get_kv_type(meta.get(), i) == GGUF_TYPE_STRING ? gguf_get_val_str(meta.get(), i) : "";
        if (found != own) {
            throw allocmoe_error(format("%s: was made for a model of architecture %s, this is %s", path, found.c_str(), own.c_str()));
        }
        break;
    }
    try {
        std::shared_ptr<allocmoe_model> file = allocmoe_read_file(meta.get(), model.hparams);
        if (!file) {
            throw allocmoe_error("has no plan");
        }
        return file;
    } catch (const allocmoe_error & error) {
        throw allocmoe_error(format("%s: %s", path, error.what()));
    }
}

std::shared_ptr<const allocmoe_estimates> allocmoe_model::estimates(const llama_model & model) const {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!placed && matrices) {
        placed = allocmoe_upload(*matrices, model);
        if (!placed) {
            throw allocmoe_error("no memory for the estimator where the model is", ALLOCMOE_ERR_MEMORY);
        }
        matrices.reset();
    }
    return placed;
}
