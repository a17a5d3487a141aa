/* Experts that are not one matrix after the other in memory: how MUL_MAT_ID on the CPU finds each of them. Plain C, for ggml's
   CPU backend and for libllama. */
#pragma once

#include "ggml.h"

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The experts of one tensor. */
struct allocmoe_experts {
    /* Waits until the expert's matrix is in memory, in any thread. Where it cannot be read: memory of its size with anything in
       it; whoever runs the graph is told. */
    const char * (*data)(const struct allocmoe_experts * self, int64_t expert);
    /* Whether that would not have to wait. */
    bool (*ready)(const struct allocmoe_experts * self, int64_t expert);
};

#ifdef __cplusplus
}
#endif

/* At the end of a MUL_MAT_ID's op_params, which ggml leaves free. */
struct allocmoe_experts_param {
    uint64_t magic;
    const struct allocmoe_experts * experts;
};

#define ALLOCMOE_EXPERTS_MAGIC 0x73747265707865ull
#define ALLOCMOE_EXPERTS_OFFSET (GGML_MAX_OP_PARAMS - sizeof(struct allocmoe_experts_param))

static inline void allocmoe_set_experts(struct ggml_tensor * node, const struct allocmoe_experts * experts) {
    const struct allocmoe_experts_param param = { ALLOCMOE_EXPERTS_MAGIC, experts };
    memcpy((char *) node->op_params + ALLOCMOE_EXPERTS_OFFSET, &param, sizeof(param));
}

/* Null where they are one matrix after the other. */
static inline const struct allocmoe_experts * allocmoe_experts_of(const struct ggml_tensor * node) {
    struct allocmoe_experts_param param;
    memcpy(&param, (const char *) node->op_params + ALLOCMOE_EXPERTS_OFFSET, sizeof(param));
    return node->op == GGML_OP_MUL_MAT_ID && param.magic == ALLOCMOE_EXPERTS_MAGIC ? param.experts : NULL;
}

static inline const char * allocmoe_expert(const struct ggml_tensor * node, int64_t expert) {
    const struct allocmoe_experts * experts = allocmoe_experts_of(node);
    return experts ? experts->data(experts, expert) : (const char *) node->src[0]->data + expert * node->src[0]->nb[2];
}
