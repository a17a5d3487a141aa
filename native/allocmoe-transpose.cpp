// CONT of a transposed matrix of two-byte elements. Without flash attention, models with latent attention (MLA) make one of
// their whole value cache, for every token and layer, and ggml copies it element by element.

#include "allocmoe-cpu.h"

#include "ggml-cpu-impl.h"

#include <algorithm>

// lines of the cache: what is read of each is used before it is displaced
constexpr int64_t TILE = 32;

bool allocmoe_transpose(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * src = dst->src[0];
    if (src->type != dst->type || ggml_blck_size(src->type) != 1 || ggml_type_size(src->type) != 2 ||
            !ggml_are_same_shape(src, dst) || !ggml_is_contiguous(dst) || src->nb[1] != 2 || src->nb[0] % 2 != 0) {
        return false;
    }
    const int64_t n_in = dst->ne[0], n_out = dst->ne[1], n_tiles = (n_out + TILE - 1)/TILE;
    for (int64_t i = params->ith; i < n_tiles*dst->ne[2]*dst->ne[3]; i += params->nth) {
        const int64_t i2 = i/n_tiles % dst->ne[2], i3 = i/n_tiles/dst->ne[2];
        const int64_t row0 = i % n_tiles*TILE, row1 = std::min(row0 + TILE, n_out);
        const char * from = (const char *) src->data + i2*src->nb[2] + i3*src->nb[3];
        char       * to   = (char *)       dst->data + i2*dst->nb[2] + i3*dst->nb[3];
        for (int64_t k0 = 0; k0 < n_in; k0 += TILE) {
            const int64_t k1 = std::min(k0 + TILE, n_in);
            for (int64_t row = row0; row < row1; ++row) {
                auto * out = (uint16_t *) (to + row*dst->nb[1]);
                for (int64_t k = k0; k < k1; ++k) {
                    out[k] = *(const uint16_t *) (from + k*src->nb[0] + 2*row);
                }
            }
        }
    }
    return true;
}
