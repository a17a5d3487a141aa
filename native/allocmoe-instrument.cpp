#include "allocmoe-instrument.h"

#include "allocmoe-api.h"
#include "allocmoe-context.h"
#include "allocmoe-estimator.h"
#include "allocmoe-graph.h"
#include "allocmoe-hooks.h"

#include "llama-graph.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <new>

// What the record's node is computed from, and what it fills: the last n_tokens rows of the layer's record.
struct record_args {
    const allocmoe_graph::layer & layer;
    allocmoe_records::layer & record;
    const ggml_tensor * experts;
    const ggml_tensor * weights;
    int64_t n_embd;
    int64_t n_used;
    int64_t n_tokens;

    template <typename T>
    T * row(std::vector<T> & values, int64_t t, int64_t n) const { return values.data() + values.size() - (n_tokens - t) * n; }
};

// Before each run, where memory can be had: room in the records for what the nodes will write.
class allocmoe_input_records : public llm_graph_input_i {
public:
    allocmoe_input_records(allocmoe_graph::layer & layer, int64_t n_used, int64_t n_embd) : layer(layer), n_used(n_used), n_embd(n_embd) {}

    void set_input(const llama_ubatch * /* ubatch */) override {
        auto & record = layer.state->records.layers[layer.il];
        try {
            make_room(record);
            layer.has_room = true;
        } catch (const std::bad_alloc &) {
            LLAMA_LOG_ERROR("allocmoe: no memory for the record of layer %d, which is lost\n", layer.il);
            record         = {};
            layer.has_room = false;
        }
    }
    bool can_reuse(const llm_graph_params & /* params */) override { return true; }

private:
    void make_room(allocmoe_records::layer & record) {
        if (layer.n_tokens == 0) {
            return; // does not run
        }
        const auto grow = [&](auto & values, int64_t n) { values.resize(values.size() + layer.n_tokens * n); };
        grow(record.scores, n_used);
        grow(record.experts, n_used);
        record.errors.resize(n_used + 1);
        if (layer.instrument.record_inputs) {
            grow(record.floats[ALLOCMOE_FLOATS_INPUT], layer.input->ne[0]);
            grow(record.floats[ALLOCMOE_FLOATS_WEIGHT], n_used);
            grow(record.floats[ALLOCMOE_FLOATS_NORM], n_used);
            grow(record.floats[ALLOCMOE_FLOATS_MISSING], layer.reduced ? n_embd : 0);
        }
    }

    allocmoe_graph::layer & layer;
    int64_t n_used, n_embd;
};

// What of token t goes into record.floats; sizes: null unless the rule goes by them.
static void record_inputs(const record_args & a, const ggml_tensor * weighted, const ggml_tensor * input, int64_t t, const float * sizes) {
    auto & floats = a.record.floats;
    std::copy_n(allocmoe_row<float>(input, t), input->ne[0], a.row(floats[ALLOCMOE_FLOATS_INPUT], t, input->ne[0]));

    int32_t keys[LLAMA_MAX_EXPERTS];
    float * missing = nullptr;
    if (sizes) {
        std::transform(sizes, sizes + a.n_used, keys, allocmoe_size_key);
        allocmoe_keep_by_size(keys, a.n_used, a.layer.rule.k_base, a.layer.plan->threshold[a.layer.il]);
        missing = a.row(floats[ALLOCMOE_FLOATS_MISSING], t, a.n_embd);
        std::fill_n(missing, a.n_embd, 0.0f);
    }
    float * weight = a.row(floats[ALLOCMOE_FLOATS_WEIGHT], t, a.n_used);
    float * norm   = a.row(floats[ALLOCMOE_FLOATS_NORM], t, a.n_used);
    for (int64_t r = 0; r < a.n_used; ++r) {
        const float w        = allocmoe_weight(a.weights, t, r);
        const float * y      = (const float *) weighted->data + (t * a.n_used + r) * a.n_embd;
        const double squares = allocmoe_sum(a.n_embd, [&](int64_t i) { return (double) y[i] * y[i]; });
        if (sizes && (uint32_t) keys[r] < allocmoe_key(a.layer.plan->threshold[a.layer.il])) {
            std::transform(y, y + a.n_embd, missing, missing, std::plus<float>());
        }
        weight[r] = w;
        norm[r]   = w != 0.0f ? std::sqrt(squares) / std::abs(w) : 0.0f;
    }
}

// node: the weighted experts as they are; on the way, scores, ids and errors are recorded. A copy, so that it can run on
// the CPU between nodes that do not.
static void compute_record(ggml_tensor * dst, int ith, int /* nth */, void * userdata) {
    if (ith != 0) {
        return;
    }
    auto & layer        = *(allocmoe_graph::layer *) userdata;
    const record_args a = { layer, layer.state->records.layers[layer.il], dst->src[0], dst->src[1], dst->ne[0], dst->ne[1], dst->ne[2] };

    const ggml_tensor * ids      = dst->src[2];
    const ggml_tensor * scores   = dst->src[3];
    const ggml_tensor * input    = dst->src[4];
    const ggml_tensor * reduced  = dst->src[5];
    const ggml_tensor * log_norm = dst->src[6];

    allocmoe_estimate_args estimate = {};
    if (reduced) {
        estimate             = allocmoe_estimate_args_of(ids, a.weights, reduced, log_norm);
        estimate.node.n_relu = layer.plan->estimates->n_relu;
    }
    if (!layer.has_room) {
        for (int64_t i = 0; i < a.n_used * a.n_tokens; ++i) {
            const auto * row = (const char *) a.experts->data + (i / a.n_used) * a.experts->nb[2] + (i % a.n_used) * a.experts->nb[1];
            memcpy((float *) dst->data + i * a.n_embd, row, a.n_embd * sizeof(float));
        }
        return;
    }
    float * sums = layer.outputs.data(); // outputs with the first k experts, not renormalised
    float weight[LLAMA_MAX_EXPERTS + 1];
    std::fill_n(sums, a.n_embd, 0.0f);
    weight[0] = 0.0f;
    for (int64_t t = 0; t < a.n_tokens; ++t) {
        const int32_t * id  = allocmoe_row<int32_t>(ids, t);
        const float * score = allocmoe_row<float>(scores, t);
        float * values      = a.row(a.record.scores, t, a.n_used);
        std::copy_n(id, a.n_used, a.row(a.record.experts, t, a.n_used));
        float state = 0.0f;
        for (int64_t r = 0; r < a.n_used; ++r) {
            const auto * row = (const float *) ((const char *) a.experts->data + t * a.experts->nb[2] + r * a.experts->nb[1]);
            std::copy(row, row + a.n_embd, (float *) dst->data + (t * a.n_used + r) * a.n_embd);
            for (int64_t i = 0; i < a.n_embd; ++i) {
                sums[(r + 1) * a.n_embd + i] = sums[r * a.n_embd + i] + row[i];
            }
            weight[r + 1] = weight[r] + allocmoe_weight(a.weights, t, r);
            if (reduced) {
                const float part = allocmoe_size_part(estimate, t, r, 0, 1);
                values[r]        = allocmoe_size(estimate, t, r, &part, 1);
            } else {
                values[r] = allocmoe_next_value(layer.rule.value, score[id[r]], r == 0, state);
            }
        }
        if (layer.instrument.record_inputs) {
            record_inputs(a, dst, input, t, reduced ? values : nullptr);
        }
        const float * all = &sums[a.n_used * a.n_embd];
        for (int64_t k = 0; k <= a.n_used; ++k) {
            const float scale  = layer.renormalised && weight[k] > 0.0f ? weight[a.n_used] / weight[k] : 1.0f;
            const float * some = &sums[k * a.n_embd];
            a.record.errors[k] += allocmoe_sum(a.n_embd, [&](int64_t i) {
                const float d = all[i] - scale * some[i];
                return (double) (d * d);
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
    layer->outputs.resize((experts->ne[1] + 1) * experts->ne[0]);
    res.add_input(std::make_unique<allocmoe_input_records>(*layer, experts->ne[1], experts->ne[0]));

    ggml_tensor * log_norm = layer->reduced ? layer->plan->estimates->layers[il].log_norm : nullptr;
    ggml_tensor * args[]   = { experts, weights, layer->selected, layer->scores, layer->input, layer->reduced, log_norm };
    const int n_args       = layer->reduced ? 7 : layer->instrument.record_inputs ? 5
                                                                                  : 4;
    return ggml_custom_4d(ctx, GGML_TYPE_F32, experts->ne[0], experts->ne[1], experts->ne[2], 1, args, n_args, compute_record, 1, layer);
}

// node: keeps its argument, for which there is room
static void compute_keep(ggml_tensor * dst, int ith, int /* nth */, void * userdata) {
    if (ith == 0) {
        const auto * values = (const float *) dst->src[0]->data;
        std::copy_n(values, ggml_nelements(dst->src[0]), ((std::vector<float> *) userdata)->data());
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
    // NOLINTNEXTLINE(cert-err34-c,bugprone-unchecked-string-to-number-conversion): llama.cpp made the name, of a layer that there is
    const bool named = sscanf(node->name, "l_out-%d", &il) == 1;
    return named && node->type == GGML_TYPE_F32 && ggml_is_contiguous(node) ? il : -1;
}

void allocmoe_edit_for_instrument(const allocmoe_instrument & instrument, allocmoe_records & records, allocmoe_graph & graph, ggml_context * ctx, ggml_cgraph * gf,
    ggml_tensor *& logits) {
    if (!instrument.keep_outputs && instrument.start_layer == 0 && !instrument.skip_logits) {
        return;
    }
    auto & kept = records.outputs;

    std::vector<ggml_tensor *> nodes;
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        nodes.push_back(ggml_graph_node(gf, i));
    }
    if (instrument.skip_logits) {
        const auto last = std::find_if(nodes.begin(), nodes.end(), [&](const ggml_tensor * node) {
            return layer_of_output(node) == (int) kept.size() - 1;
        });
        if (last != nodes.end()) {
            nodes.erase(last + 1, nodes.end());
            logits = nullptr;
        }
    }

    const int il     = instrument.start_layer - 1;
    const auto first = std::find_if(nodes.begin(), nodes.end(), [&](ggml_tensor * node) {
        return il >= 0 && layer_of_output(node) == il && ggml_nelements(node) == (int64_t) kept[il].size();
    });
    // A graph of as many nodes as the one that memory was reserved for must have them, and its leafs, in the same order. So where
    // nothing is added, as in a model whose layers' outputs have no name, and nothing left out, it stays as it is.
    const bool keeps = instrument.keep_outputs && std::any_of(nodes.begin(), nodes.end(), [](const ggml_tensor * node) { return layer_of_output(node) >= 0; });
    if (first == nodes.end() && !keeps && logits) {
        return;
    }

    allocmoe_clear_graph(ctx, gf);

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
        ggml_build_forward_expand(gf, start);
        for (auto & layer : graph.layers) {
            if (layer.il <= il) {
                layer.n_tokens = layer.activations = 0; // does not run
            }
        }
    }

    for (ggml_tensor * node : nodes) {
        ggml_build_forward_order(gf, node);
        const int layer = instrument.keep_outputs ? layer_of_output(node) : -1;
        if (layer >= 0 && layer < (int) kept.size()) {
            kept[layer].resize(ggml_nelements(node));
            ggml_build_forward_expand(gf, ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, &node, 1, compute_keep, 1, &kept[layer]));
        }
    }
}

//
// C API
//

int32_t allocmoe_set_instrument(llama_context * ctx, const allocmoe_instrument * instrument) {
    return allocmoe_guarded([&] {
        allocmoe_settings settings       = allocmoe_access::settings(ctx);
        const allocmoe_instrument wanted = instrument ? *instrument : allocmoe_instrument{};
        const int32_t n_layer            = allocmoe_n_layer(ctx);
        if (wanted.start_layer < 0 || wanted.start_layer >= std::max(1, n_layer)) {
            return allocmoe_fail(ALLOCMOE_ERR_N_LAYER, format("start_layer: found %d, want 0 to %d", wanted.start_layer, n_layer - 1).c_str());
        }
        if (settings.instrument == wanted) {
            return (int32_t) ALLOCMOE_OK;
        }
        settings.instrument = wanted;
        allocmoe_access::set_settings(ctx, std::move(settings));
        return (int32_t) ALLOCMOE_CHANGED;
    });
}

int32_t allocmoe_set_estimator(llama_context * ctx, const allocmoe_estimator * estimator, int32_t n_layer, int32_t n_expert, int32_t n_embd) {
    return allocmoe_guarded([&] {
        const auto & model   = allocmoe_access::model(ctx);
        const auto & hparams = model.hparams;
        auto & current       = allocmoe_access::state(ctx).estimates;
        if (!estimator) {
            current = nullptr;
            return (int32_t) ALLOCMOE_OK;
        }
        if (n_layer != (int32_t) hparams.n_layer_all) {
            return allocmoe_fail(ALLOCMOE_ERR_N_LAYER, format("estimator: found %d layers, want %u, the model's", n_layer, hparams.n_layer_all).c_str());
        }
        if (n_expert != (int32_t) hparams.n_expert || n_embd != (int32_t) hparams.n_embd) {
            return allocmoe_fail(ALLOCMOE_ERR_ESTIMATOR, format("the estimator is for another model, of n_embd %d and %d experts", n_embd, n_expert).c_str());
        }
        allocmoe_matrices sizes;
        sizes.n_down       = estimator->n_down;
        sizes.rank         = estimator->rank;
        sizes.n_relu       = estimator->n_relu;
        const char * fault = allocmoe_matrices_fault(sizes);
        if (!fault && !allocmoe_in_range(*estimator, n_layer, n_expert, n_embd)) {
            fault = "estimator: found a number beyond the range of float16";
        }
        if (fault) {
            return allocmoe_fail(ALLOCMOE_ERR_ESTIMATOR, fault);
        }
        auto placed = allocmoe_upload(allocmoe_round(*estimator, n_layer, n_expert, n_embd), model);
        if (!placed) {
            return allocmoe_fail(ALLOCMOE_ERR_MEMORY, "no memory for the estimator where the model is");
        }
        current = std::move(placed);
        return (int32_t) ALLOCMOE_OK;
    });
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
