// What requests of llama.cpp's server spend: counted, and as answers, /props and /metrics have it.
#include "allocmoe-server-model.h"
#include "allocmoe-server.h"

#include "allocmoe.h"

#include <cmath>
#include <numeric>
#include <sstream>

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
    return std::round(sum * 1e6) / 1e6; // 97, not 96.99999999999999
}

void allocmoe_server_count(llama_context * ctx, const allocmoe_run & run, allocmoe_spending & spending, allocmoe_totals & totals) {
    const auto model = allocmoe_served::now();
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
    const auto model = allocmoe_served::now();
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
    const auto model = allocmoe_served::now();
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
    const auto model = allocmoe_served::now();
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
