// CONT of a transposed matrix of two-byte elements. Without flash attention, models with latent attention (MLA) make one of
// their whole value cache, for every token and layer, and ggml copies it element by element.

#include "allocmoe-cpu.h"

#include "ggml-cpu-impl.h"

#include <algorithm>

#include <cstring>

// lines of the cache: what is read of each is used before it is displaced
constexpr int64_t TILE = 32;

static void transpose(const char * from, size_t from_stride, char * to, size_t to_stride, int64_t n_in, int64_t n_out) {
    for (int64_t row = 0; row < n_out; ++row) {
        for (int64_t k = 0; k < n_in; ++k) {
            memcpy(to + row * to_stride + 2 * k, from + k * from_stride + 2 * row, 2);
        }
    }
}

#if defined(__GNUC__)
typedef uint16_t eight __attribute__((vector_size(16)));
#if defined(__clang__)
#define ALLOCMOE_PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define ALLOCMOE_PICK(a, b, ...) __builtin_shuffle(a, b, eight{ __VA_ARGS__ })
#endif

static void transpose_8x8(const char * from, size_t from_stride, char * to, size_t to_stride) {
    eight a[8], b[8];
    for (int i = 0; i < 8; ++i) {
        memcpy(&a[i], from + i * from_stride, 16);
    }
    // rows i and i + 4 take turns, three times over
    for (int step = 0; step < 3; ++step) {
        for (int i = 0; i < 4; ++i) {
            b[2 * i]     = ALLOCMOE_PICK(a[i], a[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
            b[2 * i + 1] = ALLOCMOE_PICK(a[i], a[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
        }
        memcpy(a, b, sizeof(a));
    }
    for (int i = 0; i < 8; ++i) {
        memcpy(to + i * to_stride, &a[i], 16);
    }
}
#else
static void transpose_8x8(const char * from, size_t from_stride, char * to, size_t to_stride) {
    transpose(from, from_stride, to, to_stride, 8, 8);
}
#endif

bool allocmoe_transpose(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * src = dst->src[0];
    if (!allocmoe_cpu_kernels || src->type != dst->type || ggml_blck_size(src->type) != 1 || ggml_type_size(src->type) != 2 ||
        !ggml_are_same_shape(src, dst) || !ggml_is_contiguous(dst) || src->nb[1] != 2 || src->nb[0] % 2 != 0) {
        return false;
    }
    const int64_t n_in = dst->ne[0], n_out = dst->ne[1], n_tiles = (n_out + TILE - 1) / TILE;
    for (int64_t i = params->ith; i < n_tiles * dst->ne[2] * dst->ne[3]; i += params->nth) {
        const int64_t i2 = i / n_tiles % dst->ne[2], i3 = i / n_tiles / dst->ne[2];
        const int64_t row0 = i % n_tiles * TILE, row1 = std::min(row0 + TILE, n_out);
        const char * from = (const char *) src->data + i2 * src->nb[2] + i3 * src->nb[3];
        char * to         = (char *) dst->data + i2 * dst->nb[2] + i3 * dst->nb[3];
        for (int64_t k0 = 0; k0 < n_in; k0 += TILE) {
            const int64_t k1 = std::min(k0 + TILE, n_in), n_whole = (k1 - k0) / 8 * 8;
            int64_t row = row0;
            for (; row + 8 <= row1; row += 8) {
                for (int64_t k = k0; k < k0 + n_whole; k += 8) {
                    transpose_8x8(from + k * src->nb[0] + 2 * row, src->nb[0], to + row * dst->nb[1] + 2 * k, dst->nb[1]);
                }
                const int64_t k = k0 + n_whole;
                transpose(from + k * src->nb[0] + 2 * row, src->nb[0], to + row * dst->nb[1] + 2 * k, dst->nb[1], k1 - k, 8);
            }
            transpose(from + k0 * src->nb[0] + 2 * row, src->nb[0], to + row * dst->nb[1] + 2 * k0, dst->nb[1], k1 - k0, row1 - row);
        }
    }
    return true;
}
