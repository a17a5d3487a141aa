// For ggml's CPU backend. In MUL_MAT_ID, an expert id of -1 is a slot without work, and its row of the result is zero; in
// ADD_ID nothing is added to that row.
#pragma once

#include "allocmoe-experts.h"

#include "ggml.h"

#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// Whether the functions below do anything: true at first. To be changed between graphs only.
extern bool allocmoe_cpu_kernels;
void allocmoe_use_cpu_kernels(bool use);
// Whether these use AMX where there is any: true at first. For tests, which compare it with what it stands in for.
extern bool allocmoe_cpu_amx;
// Whether for a single token they ask for weights ahead, and read repacked Q4_K from several places at once: at first where the CPU
// gains by it. For tests, too.
extern bool allocmoe_cpu_streams;

// MUL_MAT_ID and MUL_MAT by our own kernels, skipped slots included. Returns false, in every thread, where they do not apply:
// nothing has been done then. Weights are in blocks of n_rows_together rows whose codes take turns, `step` bytes at a time,
// as llama.cpp's repacked layouts have them; 0, 0: as in the file.
bool allocmoe_mul_mat(const struct ggml_compute_params * params, struct ggml_tensor * dst, int n_rows_together, int step);

// MUL_MAT of few tokens by half-precision matrices that several heads share: the key-value cache. Returns false, in every
// thread, where dst is something else: nothing has been done then.
bool allocmoe_mul_mat_cache(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// MUL_MAT by a matrix of floats of no more than 1,024 rows, as routers are. Returns false, in every thread, where dst is something
// else: nothing has been done then.
bool allocmoe_mul_mat_floats(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// FLASH_ATTN_EXT, with keys and values of any type. Returns false, in every thread, where it does not apply: nothing has been
// done then.
bool allocmoe_flash_attention(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// CONT, CPY or DUP of a transposed matrix of two-byte elements. Returns false, in every thread, where dst is none: nothing
// has been done then.
bool allocmoe_transpose(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// Whether there is a kernel for the types of a node's operands. Where there is none, whatever loads the model or builds a
// graph refuses it; true for operations that are not looked at.
bool allocmoe_has_kernel(const struct ggml_tensor * op);

// Has the system back memory that has not been written yet by large pages, where it can: a weight that is read once a token then
// costs no walk through page tables.
void allocmoe_ask_for_large_pages(void * data, size_t size);

#ifdef __cplusplus
}
#endif

// Zeroes the rows of dst whose id is negative; thread ith of nth takes every nth token.
static inline void allocmoe_zero_skipped_rows(const struct ggml_tensor * ids, struct ggml_tensor * dst, int ith, int nth) {
    for (int64_t t = ith; t < ids->ne[1]; t += nth) {
        for (int64_t i = 0; i < ids->ne[0]; ++i) {
            const int32_t id = *(const int32_t *) ((const char *) ids->data + t * ids->nb[1] + i * ids->nb[0]);
            if (id < 0) {
                memset((char *) dst->data + t * dst->nb[2] + i * dst->nb[1], 0, dst->ne[0] * sizeof(float));
            }
        }
    }
}

// In ADD_ID, for a row of n: false if the id is an expert's. Otherwise the row stays as it is; src and dst may be the same.
static inline bool allocmoe_add_nothing(int32_t id, float * dst, const float * src, int64_t n) {
    if (id >= 0) {
        return false;
    }
    memmove(dst, src, n * sizeof(float));
    return true;
}
