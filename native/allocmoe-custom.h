// Tells a backend what a custom node of ours computes, in the part of op_params that ggml leaves free, so that the backend
// needs neither libllama's functions nor its structs. The CPU backend ignores it and calls the node's function.
#pragma once

#include "ggml.h"

#include <cstdint>
#include <cstring>

// For which a backend registry has an address, by ggml_backend_reg_get_proc_address, if it runs the nodes below and takes an
// expert id of -1 in MUL_MAT_ID for a slot without work. Which node runs where, ggml asks each device.
#define ALLOCMOE_PROC_TOKEN_RULES "allocmoe_token_rules"

#if defined(__CUDACC__) || defined(__HIPCC__) || defined(__MUSACC__)
#define ALLOCMOE_FN static __device__ __forceinline__
#else
#define ALLOCMOE_FN static inline
#endif

// What a layer's token rule has spent, in memory that the host and every device that runs the rule can write.
struct allocmoe_spent {
    int64_t activations[2]; // by ALLOCMOE_PHASE_*
    // Activations that a strict rule has left over after the token at each position of each sequence, [n_seq_max][n_left],
    // positions beyond taking the first places again. So a token's experts depend on the tokens before it in its sequence,
    // and not on what else the context has read, or has removed since. A token of several sequences counts for the one with the least id.
    float * left;
    // What the token at each position has spent, in the same order: its activations and 1, or 0 where it has not reached the
    // router.
    uint16_t * kept;
    int32_t n_left;
};

// Where in `left` a token finds what is left over before it, and where in `left` and `kept` its own places are; -1 for
// nowhere. A sequence's first token finds nothing.
struct allocmoe_place {
    int32_t before;
    int32_t own;
};

// What a token may activate in a layer: its sequence's planned count, and threshold.
struct allocmoe_limit {
    float k;
    float threshold;
};

// How far a strict threshold on log sizes moves for each activation that is left over, and how many of those count. A
// hundredth: a text that would spend an eighth too little takes some 50 tokens to be met, and the threshold hardly moves
// from token to token.
static constexpr float ALLOCMOE_STRICT_STEP = 0.01f;
static constexpr float ALLOCMOE_STRICT_LEFT = 400.0f;

enum {
    ALLOCMOE_NODE_IDS = 1, // ids by rank, -1 where the token rule skips; src: ids [n_used, n_tokens], scores [n_expert, n_tokens],
                           // limits [2, n_tokens, n_layer] (allocmoe_limit), places [2, n_tokens] (allocmoe_place)
    ALLOCMOE_NODE_WEIGHTS, // weights, `skipped` where the ids are -1;    src: weights [1, n_used, n_tokens], ids [n_used, n_tokens]
    // under ALLOCMOE_RULE_ESTIMATE, u being [n_down, n_tokens]
    ALLOCMOE_NODE_IDS_BY_SIZE, // as ALLOCMOE_NODE_IDS; src: ids, weights, u, log_norm [n_down + 1, n_expert], limits, places
    ALLOCMOE_NODE_SKIPPED,     // sum of w_e (output_e + u) over what is skipped, [rank padded with zeros, n_tokens];
                               // src: ids, weights, u, ids with -1, output [rank, n_expert]
};

// ALLOCMOE_RULE_* and ALLOCMOE_VALUE_*, for those who do not see llama.h
enum {
    ALLOCMOE_NODE_RULE_BATCH     = 1,
    ALLOCMOE_NODE_RULE_THRESHOLD = 2,
};
enum {
    ALLOCMOE_NODE_VALUE_SCORE     = 0,
    ALLOCMOE_NODE_VALUE_RELATIVE  = 1,
    ALLOCMOE_NODE_VALUE_REMAINING = 2,
};

enum {
    ALLOCMOE_NODE_STRICT       = 1,
    ALLOCMOE_NODE_STRICT_ALONE = 2, // nothing is left over from token to token
};

struct allocmoe_node {
    uint32_t magic;
    int16_t kind;   // ALLOCMOE_NODE_*
    int8_t phase;   // ALLOCMOE_PHASE_*
    int8_t strict;  // 0, or ALLOCMOE_NODE_STRICT*
    int16_t rule;   // ALLOCMOE_NODE_RULE_*
    int16_t n_relu; // of the last so many of u, what is positive
    int32_t k_base; // experts that every token keeps, as far as its count goes
    int32_t il;     // layer
    float skipped;
    int32_t value; // ALLOCMOE_NODE_VALUE_*
    allocmoe_spent * spent;
};

static constexpr uint32_t ALLOCMOE_NODE_MAGIC = 0x6f6c6c61;
static constexpr size_t ALLOCMOE_NODE_OFFSET  = GGML_MAX_OP_PARAMS - sizeof(allocmoe_node);
static_assert(ALLOCMOE_NODE_OFFSET >= 3 * sizeof(void *), "ggml's own parameters of a custom node come first");

static inline void allocmoe_set_node(ggml_tensor * tensor, allocmoe_node node) {
    node.magic = ALLOCMOE_NODE_MAGIC;
    memcpy((char *) tensor->op_params + ALLOCMOE_NODE_OFFSET, &node, sizeof(node));
}

// False if the tensor is no node of ours.
static inline bool allocmoe_get_node(const ggml_tensor * tensor, allocmoe_node & node) {
    memcpy(&node, (const char *) tensor->op_params + ALLOCMOE_NODE_OFFSET, sizeof(node));
    return tensor->op == GGML_OP_CUSTOM && node.magic == ALLOCMOE_NODE_MAGIC;
}
