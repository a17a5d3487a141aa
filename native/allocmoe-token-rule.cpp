#include "allocmoe-token-rule.h"

#include "allocmoe-custom.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

void allocmoe_to_values(int32_t value, float * scores, int64_t n_used) {
    if (value == ALLOCMOE_VALUE_RELATIVE) {
        const float best = scores[0];
        for (int64_t r = 0; r < n_used; ++r) {
            scores[r] = best > 0.0f ? scores[r]/best : 0.0f;
        }
    }
    if (value == ALLOCMOE_VALUE_REMAINING) {
        float remaining = 1.0f;
        for (int64_t r = 0; r < n_used; ++r) {
            const float score = scores[r];
            scores[r]  = remaining;
            remaining -= score;
        }
    }
}

static int64_t apply_batch(const allocmoe_token_rule_params & params, const float * scores, int64_t n_used, int64_t n_tokens, int32_t * n_kept) {
    const int64_t n_rest   = n_used - params.k_base;
    const int64_t n_chosen = n_tokens*(params.k - params.k_base);

    std::vector<float> pool;
    pool.reserve(n_tokens*n_rest);
    for (int64_t t = 0; t < n_tokens; ++t) {
        for (int64_t r = params.k_base; r < n_used; ++r) {
            const float score = scores[t*n_used + r];
            pool.push_back(std::isnan(score) ? -INFINITY : score);
        }
    }

    // the lowest score that is chosen, and how many candidates with exactly that score are: of equals, the better
    // rank goes first, then the earlier token
    float   cut   = INFINITY;
    int64_t equal = 0;
    if (n_chosen > 0) {
        auto sorted = pool;
        std::nth_element(sorted.begin(), sorted.begin() + (n_chosen - 1), sorted.end(), std::greater<float>());
        cut   = sorted[n_chosen - 1];
        equal = n_chosen - std::count_if(pool.begin(), pool.end(), [&](float x) { return x > cut; });
    }

    std::fill(n_kept, n_kept + n_tokens, params.k_base);
    for (int64_t i = 0; i < (int64_t) pool.size(); ++i) {
        n_kept[i/n_rest] += pool[i] > cut;
    }
    for (int64_t r = 0; r < n_rest && equal > 0; ++r) {
        for (int64_t t = 0; t < n_tokens && equal > 0; ++t) {
            if (pool[t*n_rest + r] == cut) {
                n_kept[t]++;
                equal--;
            }
        }
    }

    return n_tokens*params.k;
}

static int64_t apply_threshold(const allocmoe_token_rule_params & params, const float * scores, int64_t n_used, int64_t n_tokens, int32_t * n_kept, float & left) {
    int64_t total = 0;
    for (int64_t t = 0; t < n_tokens; ++t) {
        int32_t n = params.k_base;
        while (n < n_used && scores[t*n_used + n] >= params.threshold) {
            n++;
        }
        if (params.strict) {
            const auto allowed = (int32_t) std::min<float>(left + params.k, n_used);
            n = std::min(n, std::max(allowed, params.k_base));
            left += params.k - n;
        }
        n_kept[t] = n;
        total += n;
    }
    return total;
}

int64_t allocmoe_apply_estimate(const allocmoe_token_rule_params & params, const float * sizes, int64_t n_used, bool * keep, float & left) {
    const float threshold = params.strict ? params.threshold - ALLOCMOE_STRICT_STEP*left : params.threshold;

    int64_t n_kept = 0;
    for (int64_t r = 0; r < n_used; ++r) {
        keep[r] = sizes[r] >= threshold;
        n_kept += keep[r];
    }
    while (n_kept < std::min<int64_t>(params.k_base, n_used)) {
        int64_t best = -1;
        for (int64_t r = 0; r < n_used; ++r) {
            if (!keep[r] && (best < 0 || sizes[r] > sizes[best] || (std::isnan(sizes[best]) && !std::isnan(sizes[r])))) {
                best = r;
            }
        }
        keep[best] = true;
        n_kept++;
    }
    if (params.strict) {
        left = std::clamp(left + (params.k - n_kept), -ALLOCMOE_STRICT_LEFT, ALLOCMOE_STRICT_LEFT);
    }
    return n_kept;
}

int64_t allocmoe_apply_token_rule(const allocmoe_token_rule_params & params, const float * scores, int64_t n_used, int64_t n_tokens, int32_t * n_kept, float & left) {
    std::vector<float> values;
    if (params.value != ALLOCMOE_VALUE_SCORE) {
        values.assign(scores, scores + n_tokens*n_used);
        for (int64_t t = 0; t < n_tokens; ++t) {
            allocmoe_to_values(params.value, &values[t*n_used], n_used);
        }
        scores = values.data();
    }
    switch (params.rule) {
        case ALLOCMOE_RULE_BATCH:     return apply_batch    (params, scores, n_used, n_tokens, n_kept);
        case ALLOCMOE_RULE_THRESHOLD: return apply_threshold(params, scores, n_used, n_tokens, n_kept, left);
    }
    std::fill(n_kept, n_kept + n_tokens, params.k);
    return n_tokens*params.k;
}
