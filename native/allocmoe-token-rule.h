// Token rules (Alloc-T): which of a layer's candidate experts each token of a micro-batch activates.
#pragma once

#include "allocmoe.h"

#include <cstdint>

struct allocmoe_token_rule_params {
    int32_t rule;      // ALLOCMOE_RULE_*
    int32_t k_base;    // experts that every token keeps
    int32_t k;         // planned mean
    float   threshold;
    bool    strict;    // threshold: never let the running mean rise above k; estimate: keep it near k
    int32_t value;     // ALLOCMOE_VALUE_*, what rules compare
};

// Turns a token's n_used scores, by falling rank, into values; in place.
void allocmoe_to_values(int32_t value, float * scores, int64_t n_used);

// ALLOCMOE_RULE_ESTIMATE for one token: keep[r] for each of its n_used experts, from their estimated sizes, in any order; a
// NaN counts as -infinity. Returns how many are kept. left: as below.
int64_t allocmoe_apply_estimate(const allocmoe_token_rule_params & params, const float * sizes, int64_t n_used, bool * keep, float & left);

// How many experts each token keeps: its first n_kept[t] of n_used, which are sorted by falling score.
// scores: [n_tokens][n_used]. A NaN counts as -infinity. left: activations left over by the tokens before, for `strict`; updated.
// Returns the sum of n_kept.
int64_t allocmoe_apply_token_rule(
        const allocmoe_token_rule_params & params,
        const float * scores,
        int64_t       n_used,
        int64_t       n_tokens,
        int32_t     * n_kept,
        float       & left);
