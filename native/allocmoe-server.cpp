// A budget for each request of llama.cpp's server: what it may be, and when it is put in force.
#include "allocmoe-server-model.h"
#include "allocmoe-server.h"

#include "allocmoe.h"

#include "log.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <locale>
#include <mutex>
#include <numeric>
#include <sstream>
#include <stdexcept>

static std::mutex served_mutex;

// Made where it is first asked for, and never freed: threads may still read it while the process ends.
static std::shared_ptr<const allocmoe_served> & served_now() {
    static auto & served = *new std::shared_ptr<const allocmoe_served>(std::make_shared<allocmoe_served>());
    return served;
}

std::shared_ptr<const allocmoe_served> allocmoe_served::now() {
    std::lock_guard<std::mutex> lock(served_mutex);
    return served_now();
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

// The string of JSON that begins after body[i - 1], a quotation mark; i becomes where it ends. Blanks stand for control characters
// and for what \u makes of more than ASCII.
static std::string read_string(const std::string & body, size_t & i) {
    std::string text;
    for (; i < body.size() && body[i] != '"'; ++i) {
        if (body[i] != '\\') {
            text += body[i];
        } else if (++i < body.size() && body[i] == 'u') {
            const long code = std::strtol(body.substr(i + 1, 4).c_str(), nullptr, 16);
            text += code > 0 && code < 0x80 ? (char) code : ' ';
            i += 4;
        } else if (i < body.size()) {
            text += std::strchr("bfnrt", body[i]) ? ' ' : body[i];
        }
    }
    return text;
}

// Up to where it is no JSON, which a parser reads no further. outer: levels that it is nested in, strings of JSON among them
static void check_depth(const std::string & text, int outer) {
    static constexpr int MAX_DEPTH = 500, OF_STRING = 50;                 // a string of JSON is so many levels: each is copied to be read
    const size_t begin = text.compare(0, 3, "\xef\xbb\xbf") == 0 ? 3 : 0; // a mark of UTF-8, which the parser skips
    const size_t first = text.find_first_not_of(" \t\r\n", begin);
    if (first == std::string::npos || (text[first] != '{' && text[first] != '[')) {
        return; // no JSON, or none that nests
    }
    int depth = outer;
    for (size_t i = first; i < text.size(); ++i) {
        const char c = text[i];
        if (c == '"') {
            check_depth(read_string(text, ++i), depth + OF_STRING); // as a tool's arguments are
        } else if (c == '{' || c == '[') {
            if (++depth > MAX_DEPTH) {
                throw std::invalid_argument("the request's JSON is nested more than " + std::to_string(MAX_DEPTH) + " deep");
            }
        } else if (c == '}' || c == ']') {
            --depth;
        } else if (!std::strchr(" \t\r\n,:+-.0123456789eEtrufalsn", c)) {
            return;
        }
    }
}

void allocmoe_server_check(const std::string & body) {
    check_depth(body, 0);
}

void allocmoe_server_parse(const common_json & body, allocmoe_request & request) {
    const auto model = allocmoe_served::now();
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

bool allocmoe_server_load(const std::function<bool()> & load) {
    try {
        return load();
    } catch (const std::exception & error) {
        return refuse_to_start(error.what());
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
    allocmoe_get_total(ctx, &model->total_default);
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
    served_now() = std::move(model);
    return true;
}

std::string allocmoe_server_launch(llama_context * ctx, int32_t seq_id, allocmoe_request & request, allocmoe_spending & spending, allocmoe_totals & totals, size_t n_waiting, size_t n_slots) {
    const auto model = allocmoe_served::now();
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
