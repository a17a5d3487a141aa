// A budget for each request of llama.cpp's server: what it may be, when cached text may be used for it, what it has spent.
#include "allocmoe-server.h"

#include "allocmoe.h"

#include "log.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <locale>
#include <mutex>
#include <numeric>
#include <sstream>
#include <stdexcept>

// What the loaded model can serve. Made when it is loaded, and never changed: requests are read in several threads.
struct allocmoe_served {
    int32_t n_layer = 0;
    int32_t n_moe_layers = 0;
    std::vector<int32_t> full; // [n_layer], the model's own experts per token
    int64_t total_full    = 0; // 0: a model without experts
    int64_t total_default = 0; // what requests have that do not say
    std::string rule;
    bool strict = false;
    std::string obstacle; // why there is no choice, "" if there is one
    int64_t least   = 0;
    int64_t fast    = 0;
    int64_t of_file = 0;
    int64_t floor   = 0; // of the budget that the load decides; 0 where it does not
};

static std::mutex served_mutex;
static std::shared_ptr<const allocmoe_served> served_now = std::make_shared<allocmoe_served>();

static std::shared_ptr<const allocmoe_served> served() {
    std::lock_guard<std::mutex> lock(served_mutex);
    return served_now;
}

//
// budgets
//

static std::string trimmed(const std::string & text) {
    static const char * const blanks = " \t\n\r\f\v";
    const size_t first               = text.find_first_not_of(blanks);
    return first == std::string::npos ? "" : text.substr(first, text.find_last_not_of(blanks) + 1 - first);
}

// "0.5", "50%" (shares) or "96" (a total), as parse_budget in Python reads them; NaN for anything else.
static double number_of(std::string text, bool & is_share) {
    const bool percent = !text.empty() && text.back() == '%';
    if (percent) {
        text = trimmed(text.substr(0, text.size() - 1));
    }
    const size_t point = text.find('.');
    const bool plain   = text.find_first_not_of("0123456789.") == std::string::npos && std::count(text.begin(), text.end(), '.') <= 1 &&
                       text.find_first_of("0123456789") != std::string::npos && std::min(point, text.size()) <= 18;
    is_share           = percent || point != std::string::npos;
    if (!plain) {
        return NAN;
    }
    // by the exponent and not by / 100: "29.3%" and "0.293" are the same number
    std::istringstream stream(percent ? text + "e-2" : text);
    stream.imbue(std::locale::classic());
    double number = NAN;
    stream >> number;
    return number;
}

// The total that is asked for. Throws std::invalid_argument, with what there is.
static int64_t total_of(const common_json & budget, const allocmoe_served & model) {
    const auto refuse = [&](const std::string & hint = "") {
        auto found = budget.dump_safe();
        found      = found.size() <= 100 ? found : found.substr(0, 97) + "...";
        char want[256];
        snprintf(want, sizeof(want), ": want a share from %.4f to 1, or a whole number of expert activations per token from %lld to %lld, or \"fast\", \"balanced\" or \"full\"",
            std::ceil(1e4 * model.least / model.total_full) / 1e4, (long long) model.least, (long long) model.total_full);
        return std::invalid_argument("budget: found " + found + want + hint);
    };
    double number = NAN;
    bool is_share = false;
    if (budget.is_string()) {
        const auto text = trimmed(budget.get<std::string>());
        if (text == "fast" || text == "balanced" || text == "full") {
            return text == "fast" ? model.fast : text == "balanced" ? model.of_file
                                                                    : model.total_full;
        }
        number = number_of(text, is_share);
    } else if (budget.is_number()) {
        number   = budget.get<double>();
        is_share = !budget.is_number_integer();
    }
    // JavaScript writes 1.0 as 1; a single activation is enough for a model with one layer alone
    is_share = is_share || (number == 1 && model.n_moe_layers > 1);
    if (is_share && !(number > 0 && number <= 1)) {
        throw refuse(number > 1 ? "; a total is written without a decimal point" : "");
    }
    const double total = is_share ? std::floor(number * model.total_full + 0.5) : number;
    if (!(total >= model.least && total <= model.total_full)) { // not a number, too
        const bool percent = !is_share && number > 1 && number <= 100;
        throw refuse(percent ? "; per cent are written with their sign" : "");
    }
    return (int64_t) total;
}

void allocmoe_server_check(const std::string & body) {
    static constexpr int MAX_DEPTH = 500;
    const size_t first             = body.find_first_not_of(" \t\r\n");
    if (first == std::string::npos || (body[first] != '{' && body[first] != '[')) {
        return; // no JSON, or none that nests
    }
    int depth      = 0;
    bool in_string = false;
    for (size_t i = first; i < body.size(); ++i) {
        const char c = body[i];
        if (in_string) {
            i += c == '\\';
            in_string = c != '"';
        } else if (c == '"') {
            in_string = true;
        } else if (c == '{' || c == '[') {
            if (++depth > MAX_DEPTH) {
                throw std::invalid_argument("the request's JSON is nested more than " + std::to_string(MAX_DEPTH) + " deep");
            }
        } else if (c == '}' || c == ']') {
            --depth;
        }
    }
}

void allocmoe_server_parse(const common_json & body, allocmoe_request & request) {
    const auto model = served();
    const auto flag  = [&](const char * name, bool otherwise) {
        if (!body.contains(name) || body.at(name).is_null()) {
            return otherwise;
        }
        if (!body.at(name).is_boolean()) {
            throw std::invalid_argument(std::string(name) + ": found " + body.at(name).dump_safe() + ", want true or false");
        }
        return body.at(name).get<bool>();
    };
    const bool given = body.contains("budget") && !body.at("budget").is_null();
    if (given && !model->obstacle.empty()) {
        throw std::invalid_argument("budget: " + model->obstacle);
    }
    request.asked     = given ? body.at("budget").dump_safe() : "";
    request.total     = given ? total_of(body.at("budget"), *model) : model->obstacle.empty() ? model->total_default
                                                                                              : 0;
    request.adaptive  = !given && model->floor > 0;
    request.any_cache = flag("cache_any_budget", request.adaptive);
    request.per_layer = flag("budget_layers", false);
}

static int64_t sum_of(const std::vector<int32_t> & counts) {
    return std::accumulate(counts.begin(), counts.end(), (int64_t) 0);
}

// A variable of the environment, where allocmoe-server's own options are handed on.
static std::string setting(const char * name) {
    const char * value = std::getenv(name);
    return value ? value : "";
}

//
// the start
//

// what ends the process while it starts: in words of ours, else the first error that llama.cpp has logged
static std::mutex reason_mutex;
static std::string reason;

static void keep_first_error(ggml_log_level level, const char * text, void * /*user_data*/) {
    if (level == GGML_LOG_LEVEL_ERROR) {
        std::lock_guard<std::mutex> lock(reason_mutex);
        reason = reason.empty() ? trimmed(text) : reason;
    }
    common_log_default_callback(level, text, nullptr);
}

static bool refuse_to_start(const std::string & why) {
    LOG_ERR("allocmoe: %s\n", why.c_str());
    std::lock_guard<std::mutex> lock(reason_mutex);
    reason = why;
    return false;
}

void allocmoe_server_listen() {
    llama_log_set(keep_first_error, nullptr);
}

void allocmoe_server_ended(int status) {
    std::lock_guard<std::mutex> lock(reason_mutex);
    if (status != 0 && !reason.empty()) {
        fprintf(stderr, "allocmoe-server: error: %s\n", reason.c_str());
    }
}

bool allocmoe_server_init(llama_context * ctx) {
    auto model     = std::make_shared<allocmoe_served>();
    model->n_layer = allocmoe_n_layer(ctx);
    model->full.resize(model->n_layer);
    allocmoe_get_full(ctx, model->full.data(), model->n_layer);
    model->total_full   = sum_of(model->full);
    model->n_moe_layers = std::count_if(model->full.begin(), model->full.end(), [](int32_t k) { return k > 0; });

    const auto plan_file = setting("ALLOCMOE_SERVER_PLAN");
    const auto budget    = setting("ALLOCMOE_SERVER_BUDGET");
    const auto floor     = setting("ALLOCMOE_SERVER_ADAPTIVE");
    try {
        const auto check = [](int32_t status, const std::string & what) {
            if (status < 0) {
                throw std::invalid_argument(what + ": " + allocmoe_last_error());
            }
        };
        if (!plan_file.empty()) {
            check(allocmoe_load_plan_file(ctx, plan_file.c_str()), plan_file);
        }
        if (allocmoe_get_token_rule(ctx) == ALLOCMOE_RULE_BATCH) {
            // a request's text must not depend on whose tokens share its batch
            LOG_WRN("allocmoe: token rule batch shares a budget among the requests of a batch: another one is used\n");
            if (allocmoe_set_budget(ctx, ALLOCMOE_TOTAL_OF_FILE, ALLOCMOE_RULE_THRESHOLD, -1) < 0) {
                check(allocmoe_set_budget(ctx, ALLOCMOE_TOTAL_OF_FILE, ALLOCMOE_RULE_OFF, -1), "token rule");
            }
        }
        if (allocmoe_budget_range(ctx, &model->least, &model->of_file, &model->total_full) < 0) {
            model->obstacle = allocmoe_last_error();
            if (!budget.empty() || !floor.empty()) {
                throw std::invalid_argument("budget: " + model->obstacle);
            }
        } else {
            check(allocmoe_preset(ctx, "fast", allocmoe_get_token_rule(ctx), &model->fast), "budget");
        }
        if (!budget.empty()) {
            check(allocmoe_set_budget(ctx, total_of(common_json(budget), *model), allocmoe_get_token_rule(ctx), -1), "budget");
        }
        // a sequence's own budget leaves out single experts, which not every device can
        if (model->obstacle.empty() && allocmoe_set_budget_seq(ctx, 0, model->least) < 0) {
            model->obstacle = allocmoe_last_error();
        } else {
            allocmoe_set_budget_seq(ctx, 0, ALLOCMOE_TOTAL_OF_FILE);
        }
        if (!floor.empty() && !model->obstacle.empty()) {
            throw std::invalid_argument(model->obstacle);
        }
        if (!floor.empty()) {
            model->floor = total_of(common_json(floor), *model);
        }
    } catch (const std::exception & error) {
        return refuse_to_start(error.what());
    }

    if (setting("ALLOCMOE_SERVER_PREFETCH") == "on" && allocmoe_set_prefetch(ctx, true) > 0) {
        LOG_INF("allocmoe: experts are prefetched from the model's file\n");
    }
    std::vector<int32_t> plan(model->n_layer);
    allocmoe_get_plan(ctx, plan.data(), model->n_layer);
    model->total_default = sum_of(plan);
    if (model->floor > model->total_default) {
        return refuse_to_start("the adaptive budget's floor, " + std::to_string(model->floor) + " activations per token, is above the server's budget, " +
                               std::to_string(model->total_default));
    }

    static const char * const rules[] = { "off", "batch", "threshold", "estimate" };
    std::vector<float> threshold(model->n_layer);
    allocmoe_rule rule = {};
    allocmoe_get_rule(ctx, &rule, threshold.data(), model->n_layer);
    model->rule   = rules[rule.token_rule];
    model->strict = rule.strict;

    if (model->total_full > 0) {
        LOG_INF("allocmoe: requests have %lld of %lld expert activations per token, token rule %s%s\n",
            (long long) model->total_default, (long long) model->total_full, model->rule.c_str(),
            model->obstacle.empty() ? "" : (", and no choice: " + model->obstacle).c_str());
    }
    std::lock_guard<std::mutex> lock(served_mutex);
    served_now = std::move(model);
    return true;
}

std::string allocmoe_server_launch(llama_context * ctx, int32_t seq_id, allocmoe_request & request, allocmoe_spending & spending, allocmoe_totals & totals, size_t n_waiting, size_t n_slots) {
    const auto model = served();
    if (model->obstacle.empty()) {
        if (request.total == 0) {
            request.total = model->total_default; // no completion
        }
        if (request.adaptive) {
            // full share while nobody waits, the floor once as many wait as are served at a time
            const double load = std::min(1.0, (double) n_waiting / n_slots);
            request.total     = model->total_default - std::llround(load * (model->total_default - model->floor));
        }
        const bool own = request.total != model->total_default;
        if (allocmoe_set_budget_seq(ctx, seq_id, own ? request.total : (int64_t) ALLOCMOE_TOTAL_OF_FILE) < 0) {
            return std::string("budget: ") + allocmoe_last_error();
        }
    }
    spending         = {};
    spending.request = request;
    totals.n_requests++;
    totals.budget_now = request.total > 0 ? request.total : model->total_default;
    totals.budgets += totals.budget_now;
    return "";
}

//
// cached text
//

bool allocmoe_server_reusable(const allocmoe_origin & origin, const allocmoe_request & request) {
    return request.any_cache || origin.total == request.total;
}

void allocmoe_server_begin(allocmoe_origin & origin, const allocmoe_request & request, int32_t n_cached) {
    origin.total = n_cached == 0 || origin.total == request.total ? request.total : allocmoe_origin::MIXED;
}

void allocmoe_server_take(llama_context * ctx, int32_t seq_id, int32_t n_tokens, allocmoe_origin & origin) {
    const auto model = served();
    origin.left.clear();
    if (model->strict && n_tokens > 0) {
        origin.left.resize((size_t) model->n_layer * n_tokens);
        allocmoe_get_left_seq(ctx, seq_id, origin.left.data(), n_tokens);
    }
}

void allocmoe_server_put(llama_context * ctx, int32_t seq_id, allocmoe_origin & origin) {
    const auto model = served();
    if (model->strict && !origin.left.empty()) {
        allocmoe_set_left_seq(ctx, seq_id, origin.left.data(), origin.left.size() / model->n_layer);
    }
    origin.left = {};
}

void allocmoe_server_copy(llama_context * ctx, int32_t from, int32_t to, int32_t n_tokens) {
    allocmoe_origin origin;
    allocmoe_server_take(ctx, from, n_tokens, origin);
    allocmoe_server_put(ctx, to, origin);
}

void allocmoe_server_shift(llama_context * ctx, int32_t seq_id, int32_t first, int32_t last, int32_t by) {
    allocmoe_origin origin;
    const int32_t n_tokens = std::max(last, last + by);
    allocmoe_server_take(ctx, seq_id, n_tokens, origin);
    for (size_t row = 0; row < origin.left.size(); row += n_tokens) {
        const std::vector<float> moved(origin.left.begin() + row + first, origin.left.begin() + row + last);
        std::copy(moved.begin(), moved.end(), origin.left.begin() + row + first + by);
    }
    allocmoe_server_put(ctx, seq_id, origin);
}

// What stands beside a file with a slot's memory.
struct allocmoe_slot_header {
    char magic[8];
    int64_t total;
    int64_t n_left;
};
static constexpr char SLOT_MAGIC[8] = { 'a', 'l', 'l', 'o', 'c', 'm', 'o', '1' };

static std::string beside(const std::string & path) {
    return path + ".budget";
}

void allocmoe_server_write(llama_context * ctx, int32_t seq_id, int32_t n_tokens, const allocmoe_origin & origin, const std::string & path) {
    if (!served()->obstacle.empty()) {
        return;
    }
    allocmoe_origin copy = origin;
    allocmoe_server_take(ctx, seq_id, n_tokens, copy);
    allocmoe_slot_header header = { {}, copy.total, (int64_t) copy.left.size() };
    std::copy_n(SLOT_MAGIC, sizeof(SLOT_MAGIC), header.magic);
    std::ofstream file(beside(path), std::ios::binary);
    file.write((const char *) &header, sizeof(header));
    file.write((const char *) copy.left.data(), copy.left.size() * sizeof(float));
    if (!file.flush()) {
        LOG_WRN("allocmoe: %s: cannot write it; at another time this slot's text counts as computed at an unknown budget\n", beside(path).c_str());
    }
}

void allocmoe_server_read(llama_context * ctx, int32_t seq_id, int32_t n_tokens, allocmoe_origin & origin, const std::string & path) {
    const auto model = served();
    origin           = {};
    if (!model->obstacle.empty()) {
        return;
    }
    origin.total = allocmoe_origin::MIXED;
    allocmoe_slot_header header;
    std::ifstream file(beside(path), std::ios::binary);
    const int64_t n_left = model->strict ? (int64_t) model->n_layer * n_tokens : 0;
    if (!file.read((char *) &header, sizeof(header)) || !std::equal(SLOT_MAGIC, SLOT_MAGIC + sizeof(SLOT_MAGIC), header.magic) || header.n_left != n_left) {
        return;
    }
    origin.left.resize(n_left);
    if (file.read((char *) origin.left.data(), n_left * sizeof(float))) {
        origin.total = header.total;
        allocmoe_server_put(ctx, seq_id, origin);
    }
    origin.left = {};
}

//
// what is spent
//

void allocmoe_spending::part::add(int64_t n, const std::vector<int64_t> & more_activations, const std::vector<int64_t> & more_tokens) {
    n_tokens += n;
    activations.resize(more_activations.size());
    tokens.resize(more_tokens.size());
    for (size_t il = 0; il < activations.size(); ++il) {
        activations[il] += more_activations[il];
        tokens[il] += more_tokens[il];
    }
}

double allocmoe_spending::part::mean() const {
    double sum = 0;
    for (size_t il = 0; il < activations.size(); ++il) {
        sum += tokens[il] > 0 ? (double) activations[il] / tokens[il] : 0;
    }
    return sum;
}

void allocmoe_server_count(llama_context * ctx, const allocmoe_run & run, allocmoe_spending & spending, allocmoe_totals & totals) {
    const auto model = served();
    if (model->total_full == 0) {
        return;
    }
    std::vector<int64_t> activations(model->n_layer), tokens(model->n_layer);
    if (allocmoe_get_spent(ctx, run.seq_id, run.first, run.last, activations.data(), tokens.data(), model->n_layer) < 0) {
        return;
    }
    (run.is_prompt ? spending.prompt : spending.predicted).add(run.last - run.first, activations, tokens);
    (run.is_prompt ? totals.prompt : totals.predicted).add(run.last - run.first, activations, tokens);
    if (spending.request.per_layer) {
        spending.last.assign(model->n_layer, 0);
        allocmoe_get_spent(ctx, run.seq_id, run.last - 1, run.last, spending.last.data(), tokens.data(), model->n_layer);
    }
}

static common_json to_json(const allocmoe_spending::part & part, bool per_layer) {
    common_json json = { { "tokens", part.n_tokens }, { "activations_per_token", part.mean() } };
    if (per_layer) {
        std::vector<double> layers(part.activations.size());
        for (size_t il = 0; il < layers.size(); ++il) {
            layers[il] = part.tokens[il] > 0 ? (double) part.activations[il] / part.tokens[il] : 0;
        }
        json["layers"] = layers;
    }
    return json;
}

void allocmoe_spending::add_to(common_json & answer) const {
    const auto model = served();
    if (model->total_full == 0) {
        return;
    }
    const int64_t total = request.total > 0 ? request.total : model->total_default;
    common_json json    = {
        { "asked", request.asked.empty() ? common_json(nullptr) : common_json::parse(request.asked) },
        { "total", total },
        { "share", (double) total / model->total_full },
        { "prompt", to_json(prompt, request.per_layer) },
        { "predicted", to_json(predicted, request.per_layer) },
    };
    if (request.per_layer) {
        json["last"] = last;
    }
    answer["budget"] = json;
}

common_json allocmoe_server_props() {
    const auto model = served();
    if (model->total_full == 0) {
        return nullptr;
    }
    common_json json = {
        { "full", model->total_full },
        { "default", model->total_default },
        { "token_rule", model->rule },
        { "expert_used_count_full", model->full },
    };
    if (!model->obstacle.empty()) {
        json["obstacle"] = model->obstacle;
        return json;
    }
    json["least"]   = model->least;
    json["presets"] = common_json({ { "fast", model->fast }, { "balanced", model->of_file }, { "full", model->total_full } });
    if (model->floor > 0) {
        json["adaptive_floor"] = model->floor;
    }
    return json;
}

std::string allocmoe_totals::to_prometheus() const {
    const auto model = served();
    std::ostringstream out;
    if (model->total_full == 0) {
        return "";
    }
    const auto head = [&](const char * name, const char * type, const char * help) {
        out << "# HELP allocmoe:" << name << " " << help << "\n# TYPE allocmoe:" << name << " " << type << "\n";
    };
    const auto of_part = [](const allocmoe_spending::part & part) {
        return std::accumulate(part.activations.begin(), part.activations.end(), (int64_t) 0);
    };
    head("activations_total", "counter", "Expert activations, over all layers");
    out << "allocmoe:activations_total{phase=\"prompt\"} " << of_part(prompt) << "\n"
        << "allocmoe:activations_total{phase=\"predicted\"} " << of_part(predicted) << "\n";
    head("tokens_total", "counter", "Tokens that these were for");
    out << "allocmoe:tokens_total{phase=\"prompt\"} " << prompt.n_tokens << "\n"
        << "allocmoe:tokens_total{phase=\"predicted\"} " << predicted.n_tokens << "\n";
    const auto number = [&](const char * name, const char * type, const char * help, int64_t value) {
        head(name, type, help);
        out << "allocmoe:" << name << " " << value << "\n";
    };
    number("requests_total", "counter", "Requests that have begun", n_requests);
    number("request_budgets_total", "counter", "Sum of their budgets, in activations per token", budgets);
    number("budget_now", "gauge", "Budget of the request that began last", budget_now);
    number("budget_default", "gauge", "Budget of requests that do not say", model->total_default);
    number("budget_full", "gauge", "The model's own", model->total_full);
    return out.str();
}
