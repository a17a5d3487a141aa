// AMX: up to 16 tokens times 16 rows times 64 columns in one instruction, of bytes in tiles. For K-quants, whose sub-blocks have
// integer scales: these are multiplied into the codes beforehand, so that a block's 256 columns are added up by the tiles. A code
// times its scale takes up to 14 bits, which are two tiles. The sums are those of the vector kernels, and so are the results.
//
// Instructions are written as assembly: some compilers drop stores that _tile_loadconfig() reads (GCC bug 114098), and ggml's own AMX
// code is left out with these. Nothing here depends on a compiler's options.
#pragma once

#include "allocmoe-panel.h"

#if defined(ALLOCMOE_AVX512) && defined(__linux__) && (__has_include(<amxtileintrin.h>) || __clang_major__ + 0 >= 11) // whose assemblers know it
#define ALLOCMOE_AMX

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__clang__)
#define ALLOCMOE_USES_AMX __attribute__((target("amx-tile,amx-int8"))) // for its assembler
#else
#define ALLOCMOE_USES_AMX
#endif

namespace allocmoe {

// Whether the CPU has it and the system lets this process use it, for which it has to be asked.
inline bool has_amx() {
    static const bool has = [] {
        constexpr unsigned TILES = 1 << 24, INT8 = 1 << 25;
        constexpr int REQUEST = 0x1023, TILE_DATA = 18; // of arch_prctl
        unsigned a, b, c, d;
        return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & TILES) && (d & INT8) && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    }();
    return has;
}

// A thread's tiles while it lives: lines of 64 bytes, n_tokens of sums and activations and 16 of weights. What there was before is put
// back afterwards: ggml's AMX code sets its shapes once a thread.
struct amx_shapes {
    struct shapes {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = { 64, 64, 64, 64, 64, 64, 64, 64 };
        uint8_t lines[16]  = { 16, 16, 16, 16, 16, 16, 16, 16 };
    };
    shapes before;

    ALLOCMOE_USES_AMX explicit amx_shapes(int n_tokens) {
        shapes now;
        std::fill(now.lines, now.lines + 6, (uint8_t) n_tokens);
        asm volatile("sttilecfg %0" : "=m"(before));
        asm volatile("ldtilecfg %0" : : "m"(now));
    }
    ALLOCMOE_USES_AMX ~amx_shapes() { asm volatile("ldtilecfg %0" : : "m"(before)); }
    amx_shapes(const amx_shapes &) = delete;
};

template <int T>
ALLOCMOE_USES_AMX inline void zero_tile() { asm volatile("tilezero %%tmm%c0" : : "i"(T)); }
template <int T>
ALLOCMOE_USES_AMX inline void load_tile(const void * from) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"((int64_t) 64), "i"(T), "m"(*(const char (*)[1024]) from));
}
template <int T>
ALLOCMOE_USES_AMX inline void store_tile(int32_t * to) {
    asm volatile("tilestored %%tmm%c3, (%1,%2,1)" : "=m"(*(int32_t (*)[256]) to) : "r"(to), "r"((int64_t) 64), "i"(T));
}
// tile SUM += X times WEIGHTS, whose bytes are signed or not
template <bool SIGNED, int SUM, int X, int WEIGHTS>
ALLOCMOE_USES_AMX inline void multiply_tiles() {
    if (SIGNED) {
        asm volatile("tdpbssd %%tmm%c0, %%tmm%c1, %%tmm%c2" : : "i"(WEIGHTS), "i"(X), "i"(SUM));
    } else {
        asm volatile("tdpbsud %%tmm%c0, %%tmm%c1, %%tmm%c2" : : "i"(WEIGHTS), "i"(X), "i"(SUM));
    }
}

constexpr int TILE_TOKENS = 16, TILE_COLUMNS = 64;

// Tokens of a tile, n in all: about as many in each, because a token that is none takes as long.
inline int amx_tile_size(int n) {
    const int n_tiles = (n + TILE_TOKENS - 1) / TILE_TOKENS;
    return (n + n_tiles - 1) / n_tiles;
}

using tile_sums = int32_t[TILE_TOKENS * ROWS];

// What a block's sums are multiplied with.
struct block_scaling {
    alignas(64) int32_t mins[CHUNK / 32][ROWS]; // 16 bits of two sub-blocks each
    alignas(64) float d[ROWS], m[ROWS];
};

// Tokens t0 to t1 of a tile whose sums are yet to be scaled.
struct unfinished {
    const block_scaling * by;
    tile x;
    int size, t0, t1;       // tokens of x
    const tile_sums * sums; // of low and of high bytes
    bool first;             // block of the rows: acc holds nothing yet
    float * acc;            // [size][ROWS]
    float * const * out;    // for the last block instead of acc: each token's results for these rows
    int64_t row;
    __mmask16 rows;
};

// Tiles are multiplied two by two in four steps. That takes long and leaves the rest of the core idle: so after each step a part of
// what was multiplied LAG steps before is scaled, and does not have to wait for the tiles.
constexpr int STEPS = CHUNK / TILE_COLUMNS, LAG = 6, MAX_UNFINISHED = 8;

// The weights of a block of 16 rows, and what is on its way.
struct amx_panel {
    alignas(64) uint8_t low[CHUNK * ROWS], high[CHUNK * ROWS]; // [CHUNK/4][ROWS][4]
    alignas(64) tile_sums sums[2][4];                          // of two pairs of tiles in turns, low and high of each
    block_scaling by[3];                                       // of three blocks in turns
    unfinished queue[MAX_UNFINISHED];
};

// Of how many bits of a scale the low bytes are multiples; 0: bytes are halves of products of 16 bits.
template <typename F>
constexpr int LOW_BITS = F::OFFSET ? 0 : F::LARGEST * 15 < 256 ? 4
                                                               : 3;

// Codes times scales, in two bytes each.
template <typename F>
inline void multiply_scales(const panel & p, amx_panel & amx, block_scaling & by) {
    constexpr int BITS = LOW_BITS<F>;
    static_assert(BITS == 0 || F::LARGEST * ((1 << BITS) - 1) < 256, "two products at once");
    memcpy(by.d, p.whole.d, sizeof(by.d));
    if (F::MIN) {
        memcpy(by.m, p.whole.m, sizeof(by.m));
        memcpy(by.mins, p.whole.pairs, CHUNK / F::SUB / 2 * sizeof(by.mins[0]));
    }
    const __m512i low_byte = _mm512_set1_epi16(0xff);
    const auto choose      = [&](__m512i low, __m512i high) { return _mm512_ternarylogic_epi32(low_byte, low, high, 0xca); };
    for (int s = 0; s < CHUNK / F::SUB; ++s) {
        const __m512i word  = load_bytes(p.whole.scale[s]);
        const __m512i scale = either(word, shift_left<16>(word));
        for (int at = s * F::SUB * ROWS; at < (s + 1) * F::SUB * ROWS; at += 64) {
            const __m512i codes = load_bytes(p.q + at);
            __m512i low, high;
            if constexpr (BITS) {
                low  = _mm512_mullo_epi16(codes, _mm512_and_si512(scale, _mm512_set1_epi16((1 << BITS) - 1)));
                high = _mm512_mullo_epi16(codes, _mm512_srli_epi16(scale, BITS));
            } else {
                const __m512i offset = _mm512_set1_epi16(F::OFFSET);
                const __m512i even   = _mm512_mullo_epi16(_mm512_sub_epi16(_mm512_and_si512(codes, low_byte), offset), scale);
                const __m512i odd    = _mm512_mullo_epi16(_mm512_sub_epi16(_mm512_srli_epi16(codes, 8), offset), scale);
                low                  = choose(even, _mm512_slli_epi16(odd, 8));
                high                 = choose(_mm512_srli_epi16(even, 8), odd);
            }
            _mm512_store_si512(amx.low + at, low);
            _mm512_store_si512(amx.high + at, high);
        }
    }
}

// Products of one or two tiles of tokens with a block; after each step meanwhile(step) is called.
template <typename F, int N, typename G>
ALLOCMOE_USES_AMX inline void multiply_block_amx(
    const amx_panel & amx, const int8_t * x, const int8_t * x1, int size, tile_sums * sums, const G & meanwhile) {
    constexpr bool SIGNED = LOW_BITS<F> == 0; // high bytes
    zero_tile<0>(), zero_tile<1>();
    if (N == 2) {
        zero_tile<2>(), zero_tile<3>();
    }
#pragma GCC unroll 4
    for (int k = 0; k < STEPS; ++k) {
        load_tile<4>(x + k * size * TILE_COLUMNS);
        load_tile<6>(amx.low + k * TILE_COLUMNS * ROWS);
        multiply_tiles<false, 0, 4, 6>();
        load_tile<7>(amx.high + k * TILE_COLUMNS * ROWS);
        multiply_tiles<SIGNED, 1, 4, 7>();
        if (N == 2) {
            load_tile<5>(x1 + k * size * TILE_COLUMNS);
            multiply_tiles<false, 2, 5, 6>();
            multiply_tiles<SIGNED, 3, 5, 7>();
        }
        meanwhile(k);
    }
    store_tile<0>(sums[0]), store_tile<1>(sums[1]);
    if (N == 2) {
        store_tile<2>(sums[2]), store_tile<3>(sums[3]);
    }
}

template <typename F>
static void finish(const unfinished & u) {
    constexpr int SHIFT = LOW_BITS<F> ? LOW_BITS<F> : 8, N_MINS = CHUNK / F::SUB / 2;
    const vf d = load(u.by->d), m = load(u.by->m);
    vi mins[N_MINS];
    for (int s = 0; s < N_MINS; ++s) {
        mins[s] = load_bytes(u.by->mins[s]);
    }
    const __mmask16 so_far = u.first ? 0 : 0xffff;
#pragma GCC unroll 2
    for (int t = u.t0; t < u.t1; ++t) {
        const vi sum = add(load_bytes(u.sums[0] + t * ROWS), shift_left<SHIFT>(load_bytes(u.sums[1] + t * ROWS)));
        const vf xd  = broadcast(u.x.d + t);
        vf y         = fma(to_float(sum), mul(d, xd), _mm512_maskz_load_ps(so_far, u.acc + t * ROWS));
        if (F::MIN) {
            vi second = zero();
#pragma GCC unroll 8
            for (int s = 0; s < N_MINS; ++s) {
                second = add_products(second, mins[s], broadcast(u.x.init + s * u.size + t));
            }
            y = fma(to_float(second), mul(m, xd), y);
        }
        if (u.out) {
            _mm512_mask_storeu_ps(u.out[t] + u.row, u.rows, y);
        } else {
            store(u.acc + t * ROWS, y);
        }
    }
}

} // namespace allocmoe

#else

namespace allocmoe {
inline bool has_amx() { return false; }
} // namespace allocmoe

#endif
