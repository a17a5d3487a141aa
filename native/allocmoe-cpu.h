// For ggml's CPU backend: an expert id of -1 in MUL_MAT_ID is a slot without work, and its row of the result is zero.
#pragma once

#include "ggml.h"

#include <stdint.h>
#include <string.h>

// Zeroes the rows of dst whose id is negative; thread ith of nth takes every nth token.
static inline void allocmoe_zero_skipped_rows(const struct ggml_tensor * ids, struct ggml_tensor * dst, int ith, int nth) {
    for (int64_t t = ith; t < ids->ne[1]; t += nth) {
        for (int64_t i = 0; i < ids->ne[0]; ++i) {
            const int32_t id = *(const int32_t *) ((const char *) ids->data + t*ids->nb[1] + i*ids->nb[0]);
            if (id < 0) {
                memset((char *) dst->data + t*dst->nb[2] + i*dst->nb[1], 0, dst->ne[0]*sizeof(float));
            }
        }
    }
}
