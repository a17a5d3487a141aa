// A limit on the experts that the tokens of one verification run: what several tokens cost is their union.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

// Leaves a share of the experts that any token keeps, rounded up, those of the largest value summed over the tokens that keep
// them; and of every token the one that is worth most to it, also beyond that. A value is exp(2*size): the square of an
// estimated size, with which the divergence goes; sizes that are no numbers are worth nothing, and of equal values the expert
// with the lower id stays.
//
// sizes: [n_tokens][n_used]. routed: the same, ids, -1 where a token skips; what is left out becomes -1. n_dropped: [n_tokens].
static inline void allocmoe_limit_union(const float * sizes, int32_t n_used, int32_t n_tokens, int32_t n_expert, double share, int32_t * routed, int32_t * n_dropped) {
    double largest = -INFINITY;
    for (int64_t i = 0; i < (int64_t) n_tokens * n_used; ++i) {
        if (routed[i] >= 0 && sizes[i] > largest) {
            largest = sizes[i];
        }
    }
    const auto value_of = [&](int64_t i) {
        const double value = std::exp(2.0 * (sizes[i] - largest));
        return std::isfinite(value) ? value : 0.0;
    };
    std::vector<double> value(n_expert, -1.0); // of those that no token keeps
    std::vector<bool> stays(n_expert, false);
    for (int64_t t = 0; t < n_tokens; ++t) {
        int64_t best = -1;
        for (int64_t i = t * n_used; i < (t + 1) * n_used; ++i) {
            if (routed[i] >= 0) {
                value[routed[i]] = std::max(value[routed[i]], 0.0) + value_of(i);
                best             = best < 0 || value_of(i) > value_of(best) ? i : best;
            }
        }
        if (best >= 0) {
            stays[routed[best]] = true;
        }
    }
    std::vector<int32_t> others;
    int64_t n_union = 0, n_stay = 0;
    for (int32_t e = 0; e < n_expert; ++e) {
        n_union += value[e] >= 0.0;
        n_stay += stays[e];
        if (value[e] >= 0.0 && !stays[e]) {
            others.push_back(e);
        }
    }
    std::stable_sort(others.begin(), others.end(), [&](int32_t a, int32_t b) { return value[a] > value[b]; });
    const int64_t n_limit = std::ceil(share * n_union);
    for (size_t i = 0; i < others.size() && n_stay < n_limit; ++i, ++n_stay) {
        stays[others[i]] = true;
    }
    for (int64_t t = 0; t < n_tokens; ++t) {
        n_dropped[t] = 0;
        for (int64_t i = t * n_used; i < (t + 1) * n_used; ++i) {
            if (routed[i] >= 0 && !stays[routed[i]]) {
                routed[i] = -1;
                ++n_dropped[t];
            }
        }
    }
}
