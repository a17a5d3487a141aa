// The estimator: its matrices as a file stores them, and as the graph reads them.
#pragma once

#include "allocmoe-calibration.h"

#include "ggml-cpp.h"

#include <cstdint>
#include <memory>
#include <vector>

struct llama_model;

// Largest number in an estimator: float16's, in which some of it is stored.
static constexpr float ALLOCMOE_LARGEST = 65504.0f;

// As stored: down and up are bytes of the types that they run in. One entry for each layer that has one.
struct allocmoe_matrices {
    int32_t n_down   = 0;
    int32_t rank     = 0;
    int32_t n_relu   = 0;
    int32_t n_expert = 0;
    int32_t n_embd   = 0;

    std::vector<int32_t> entry;  // [block_count], -1 where a layer has none
    std::vector<uint8_t> down;   // [n_entries][n_down] rows of n_embd, down_type()
    std::vector<uint8_t> up;     // [n_entries][n_embd] rows of n_columns(), Q4_0
    std::vector<float> log_norm; // [n_entries][n_expert][n_down + 1]
    std::vector<float> output;   // [n_entries][n_expert][rank]

    ggml_type down_type() const; // Q4_0, or F16 where n_embd is no multiple of its block
    int64_t n_columns() const;   // rank padded to whole blocks; float16 would be multiplied 64 columns at a time or one by one
    size_t down_bytes() const;   // of one entry
    size_t up_bytes() const;
};

// As the graph reads them.
struct allocmoe_estimates {
    // where the layers' routers are
    std::vector<ggml_context_ptr> contexts;
    std::vector<ggml_backend_buffer_ptr> buffers;

    struct layer {
        ggml_tensor * down;     // Q4_0 or F16, [n_embd, n_down]; null for a layer without routed experts
        ggml_tensor * log_norm; // F32 [n_down + 1, n_expert]
        ggml_tensor * output;   // F32 [rank, n_expert], null for rank 0
        ggml_tensor * up;       // Q4_0 [rank padded with zeros, n_embd], null for rank 0
    };
    std::vector<layer> layers; // [block_count]
    int32_t n_relu = 0;
};

// Null if they are in order, else what is wrong.
const char * allocmoe_matrices_fault(const allocmoe_matrices & matrices);

// Whether all of a caller's floats are; its sizes are.
bool allocmoe_in_range(const allocmoe_estimator & estimator, int32_t n_layer, int32_t n_expert, int32_t n_embd);

// From a caller's floats that are in range, an entry for every layer.
allocmoe_matrices allocmoe_round(const allocmoe_estimator & estimator, int32_t n_layer, int32_t n_expert, int32_t n_embd);

// Puts them beside the model's routers; null where there is no memory for them.
std::shared_ptr<const allocmoe_estimates> allocmoe_upload(const allocmoe_matrices & matrices, const llama_model & model);
