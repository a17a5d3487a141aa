#include "allocmoe-instrument.h"

#include "allocmoe-context.h"
#include "allocmoe-graph.h"
#include "allocmoe-hooks.h"

#include "llama-graph.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <memory>

// What of token t goes into record.floats; sizes: null unless the rule goes by them.
static void record_inputs(const allocmoe_graph::layer & layer, allocmoe_records::layer & record, const ggml_tensor * weighted, const ggml_tensor * weights, const ggml_tensor * input, int64_t t, const float * sizes) {
    const int64_t n_embd = weighted->ne[0];
    const int64_t n_used = weighted->ne[1];

    const float * x = allocmoe_row<float>(input, t);
    auto & inputs = record.floats[ALLOCMOE_FLOATS_INPUT];
    inputs.insert(inputs.end(), x, x + input->ne[0]);

    std::unique_ptr<bool[]> keep(new bool[n_used]);
    auto & missing = record.floats[ALLOCMOE_FLOATS_MISSING];
    if (sizes) {
        float left = 0.0f;
        allocmoe_apply_estimate(layer.params, sizes, n_used, keep.get(), left);
        missing.resize(missing.size() + n_embd);
    }
    for (int64_t r = 0; r < n_used; ++r) {
        const float   w = allocmoe_weight(weights, t, r);
        const float * y = (const float *) weighted->data + (t*n_used + r)*n_embd;
        const double norm = allocmoe_sum(n_embd, [&](int64_t i) { return (double) y[i]*y[i]; });
        if (sizes && !keep[r]) {
            float * sum = missing.data() + missing.size() - n_embd;
            std::transform(y, y + n_embd, sum, sum, std::plus<float>());
        }
        record.floats[ALLOCMOE_FLOATS_WEIGHT].push_back(w);
        record.floats[ALLOCMOE_FLOATS_NORM  ].push_back(w != 0.0f ? std::sqrt(norm)/std::abs(w) : 0.0f);
    }
}

// node: the weighted experts as they are; on the way, scores, ids and errors are recorded. A copy, so that it can run on
// the CPU between nodes that do not.
static void compute_record(ggml_tensor * dst, int ith, int /* nth */, void * userdata) {
    if (ith != 0) {
        return;
    }
    const auto & layer   = *(const allocmoe_graph::layer *) userdata;
    auto       & record = layer.state->records.layers[layer.il];

    const ggml_tensor * experts  = dst->src[0];
    const ggml_tensor * weights  = dst->src[1];
    const ggml_tensor * ids      = dst->src[2];
    const ggml_tensor * scores   = dst->src[3];
    const ggml_tensor * input    = dst->src[4];
    const ggml_tensor * reduced  = dst->src[5];
    const ggml_tensor * log_norm = dst->src[6];

    const int64_t n_embd   = dst->ne[0];
    const int64_t n_used   = dst->ne[1];
    const int64_t n_tokens = dst->ne[2];

    record.errors.resize(n_used + 1);
    std::vector<float> sums((n_used + 1)*n_embd); // outputs with the first k experts, not renormalised
    std::vector<float> weight(n_used + 1);
    std::vector<float> u(reduced ? reduced->ne[0] : 0);
    for (int64_t t = 0; t < n_tokens; ++t) {
        const auto * id    = (const int32_t *) ((const char *) ids   ->data + t*ids   ->nb[1]);
        const auto * score = (const float   *) ((const char *) scores->data + t*scores->nb[1]);
        for (int64_t r = 0; r < n_used; ++r) {
            record.experts.push_back(id[r]);
            record.scores .push_back(score[id[r]]);
            const auto * row = (const float *) ((const char *) experts->data + t*experts->nb[2] + r*experts->nb[1]);
            std::copy(row, row + n_embd, (float *) dst->data + (t*n_used + r)*n_embd);
            for (int64_t i = 0; i < n_embd; ++i) {
                sums[(r + 1)*n_embd + i] = sums[r*n_embd + i] + row[i];
            }
            weight[r + 1] = weight[r] + *(const float *) ((const char *) weights->data + t*weights->nb[2] + r*weights->nb[1]);
        }
        float * values = &record.scores[record.scores.size() - n_used];
        if (reduced) {
            allocmoe_estimate_sizes(log_norm, id, weights, reduced, layer.estimates->n_relu, t, n_used, u.data(), values);
        } else {
            allocmoe_to_values(layer.params.value, values, n_used);
        }
        if (layer.instrument.record_inputs) {
            record_inputs(layer, record, dst, weights, input, t, reduced ? values : nullptr);
        }
        const float * all = &sums[n_used*n_embd];
        for (int64_t k = 0; k <= n_used; ++k) {
            const float scale = layer.renormalised && weight[k] > 0.0f ? weight[n_used]/weight[k] : 1.0f;
            const float * some = &sums[k*n_embd];
            record.errors[k] += allocmoe_sum(n_embd, [&](int64_t i) {
                const float d = all[i] - scale*some[i];
                return (double) (d*d);
            });
        }
    }
}

ggml_tensor * allocmoe_build_record(ggml_context * ctx, llm_graph_result & res, int il, ggml_tensor * experts, ggml_tensor * weights, bool renormalised) {
    auto * layer = res.allocmoe ? res.allocmoe->find(il) : nullptr;
    if (!layer || !layer->instrument.record || layer->recorded || !layer->selected) {
        return experts;
    }
    layer->recorded     = true;
    layer->renormalised = renormalised;

    ggml_tensor * log_norm = layer->reduced ? layer->estimates->layers[il].log_norm : nullptr;
    ggml_tensor * args[] = { experts, weights, layer->selected, layer->scores, layer->input, layer->reduced, log_norm };
    const int n_args = layer->reduced ? 7 : layer->instrument.record_inputs ? 5 : 4;
    return ggml_custom_4d(ctx, GGML_TYPE_F32, experts->ne[0], experts->ne[1], experts->ne[2], 1, args, n_args, compute_record, 1, layer);
}

// node: keeps its argument
static void compute_keep(ggml_tensor * dst, int ith, int /* nth */, void * userdata) {
    if (ith == 0) {
        const auto * values = (const float *) dst->src[0]->data;
        ((std::vector<float> *) userdata)->assign(values, values + ggml_nelements(dst->src[0]));
    }
}

// node: what was kept
static void compute_kept(ggml_tensor * dst, int ith, int /* nth */, void * userdata) {
    if (ith == 0) {
        const auto & kept = *(const std::vector<float> *) userdata;
        std::copy(kept.begin(), kept.end(), (float *) dst->data);
    }
}

// The layer that a node is the output of, -1 if it is none. Nearly every architecture names it so.
static int layer_of_output(const ggml_tensor * node) {
    int il = -1;
    const bool named = sscanf(node->name, "l_out-%d", &il) == 1;
    return named && node->type == GGML_TYPE_F32 && ggml_is_contiguous(node) ? il : -1;
}

void allocmoe_edit_for_instrument(const allocmoe_instrument & instrument, allocmoe_records & records, allocmoe_graph & graph, ggml_context * ctx, ggml_cgraph * gf) {
    if (!instrument.keep_outputs && instrument.start_layer == 0) {
        return;
    }
    auto & kept = records.outputs;

    std::vector<ggml_tensor *> nodes;
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        nodes.push_back(ggml_graph_node(gf, i));
    }

    const int   il    = instrument.start_layer - 1;
    const auto  first = std::find_if(nodes.begin(), nodes.end(), [&](ggml_tensor * node) {
        return il >= 0 && layer_of_output(node) == il && ggml_nelements(node) == (int64_t) kept[il].size();
    });
    // a graph of as many nodes as the one that memory was reserved for must have them, and its leafs, in the same order
    if (first == nodes.end() && !instrument.keep_outputs) {
        return;
    }

    ggml_graph_clear(gf);
    // inputs are set whether a node reads them or not, so all of them need memory
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
        if (t->flags & GGML_TENSOR_FLAG_INPUT) {
            ggml_build_forward_expand(gf, t);
        }
    }

    if (first != nodes.end()) {
        ggml_tensor * output = *first;
        ggml_tensor * start  = ggml_custom_4d(ctx, GGML_TYPE_F32, output->ne[0], output->ne[1], output->ne[2], output->ne[3], nullptr, 0,
                compute_kept, 1, &kept[il]);
        for (auto it = first + 1; it != nodes.end(); ++it) {
            std::replace(std::begin((*it)->src), std::end((*it)->src), output, start);
            if ((*it)->view_src == output) {
                (*it)->view_src = start;
            }
        }
        nodes.erase(nodes.begin(), first + 1);
        // layers that do not run activate nothing
        while (!graph.layers.empty() && graph.layers.front().il <= il) {
            graph.layers.pop_front();
        }
    }

    for (ggml_tensor * node : nodes) {
        ggml_build_forward_expand(gf, node);
        const int layer = instrument.keep_outputs ? layer_of_output(node) : -1;
        if (layer >= 0 && layer < (int) kept.size()) {
            ggml_build_forward_expand(gf, ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, &node, 1, compute_keep, 1, &kept[layer]));
        }
    }
}

//
// C API
//

int32_t allocmoe_set_instrument(llama_context * ctx, const allocmoe_instrument * instrument) {
    allocmoe_settings settings = allocmoe_access::settings(ctx);
    const allocmoe_instrument wanted = instrument ? *instrument : allocmoe_instrument{};
    if (wanted.start_layer < 0 || wanted.start_layer >= std::max(1, allocmoe_n_layer(ctx))) {
        return ALLOCMOE_ERR_N_LAYER;
    }
    const auto & current = settings.instrument;
    if (current.record == wanted.record && current.record_inputs == wanted.record_inputs &&
            current.keep_outputs == wanted.keep_outputs && current.start_layer == wanted.start_layer) {
        return ALLOCMOE_OK;
    }
    settings.instrument = wanted;
    allocmoe_access::set_settings(ctx, std::move(settings));
    return ALLOCMOE_CHANGED;
}

static allocmoe_records::layer * record_of(llama_context * ctx, int32_t il) {
    auto & layers = allocmoe_access::state(ctx).records.layers;
    return il < 0 || il >= (int32_t) layers.size() ? nullptr : &layers[il];
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
    for (auto & record : allocmoe_access::state(ctx).records.layers) {
        record = {};
    }
}

int64_t allocmoe_get_kept_output(const llama_context * ctx, int32_t il, float * output, int64_t n_max) {
    const auto & outputs = allocmoe_access::state(ctx).records.outputs;
    if (il < 0 || il >= (int32_t) outputs.size()) {
        return 0;
    }
    const int64_t n = outputs[il].size();
    if (output) {
        std::copy_n(outputs[il].begin(), std::min(n, n_max), output);
    }
    return n;
}
