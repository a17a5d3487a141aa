// The estimator's matrices as the graph reads them.
#pragma once

#include "allocmoe.h"

#include "ggml-cpp.h"

#include <cstdint>
#include <memory>
#include <vector>

struct llama_model;

struct allocmoe_estimates {
    // where the layers' routers are
    std::vector<ggml_context_ptr>        contexts;
    std::vector<ggml_backend_buffer_ptr> buffers;

    struct layer {
        ggml_tensor * down;     // Q4_0, or F16 where n_embd is no multiple of its block, [n_embd, n_down]
        ggml_tensor * log_norm; // F32 [n_down + 1, n_expert]
        ggml_tensor * output;   // F32 [rank, n_expert], null for rank 0
        ggml_tensor * up;       // Q4_0 [rank padded with zeros, n_embd], null for rank 0
    };
    std::vector<layer> layers; // [block_count]
    int32_t            n_relu = 0;
};

// Checks the estimator and puts it beside the model's routers. Returns ALLOCMOE_OK or ALLOCMOE_ERR_*.
int32_t allocmoe_make_estimates(
        const llama_model                         & model,
        const allocmoe_estimator                  & estimator,
        int32_t                                     n_layer,
        int32_t                                     n_expert,
        int32_t                                     n_embd,
        std::shared_ptr<const allocmoe_estimates> & made);
