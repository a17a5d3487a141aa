// The instrument: what calibration has a context record, keep and leave out. Nothing else uses it.
#pragma once

#include "allocmoe-calibration.h"

#include <array>
#include <cstdint>
#include <vector>

struct ggml_cgraph;
struct ggml_context;
struct ggml_tensor;
struct allocmoe_graph;

inline bool operator==(const allocmoe_instrument & a, const allocmoe_instrument & b) {
    return a.record == b.record && a.record_inputs == b.record_inputs && a.keep_outputs == b.keep_outputs && a.start_layer == b.start_layer &&
           a.skip_logits == b.skip_logits;
}

struct allocmoe_records {
    struct layer {
        std::vector<float> scores;                // [n_tokens][n_used], as values
        std::vector<int32_t> experts;             // [n_tokens][n_used]
        std::vector<double> errors;               // [n_used + 1]
        std::array<std::vector<float>, 4> floats; // by ALLOCMOE_FLOATS_*
    };
    std::vector<layer> layers;               // [block_count]
    std::vector<std::vector<float>> outputs; // [block_count], of the last micro-batch that kept them
};

// Where layers' outputs are kept: adds nodes for that. Where the graph starts at a later layer whose input has been kept:
// removes what only leads there. Where logits are skipped: removes what comes after the last layer, and sets them to null.
void allocmoe_edit_for_instrument(const allocmoe_instrument & instrument, allocmoe_records & records, allocmoe_graph & graph, ggml_context * ctx, ggml_cgraph * gf,
    ggml_tensor *& logits);
