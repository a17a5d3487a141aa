// What is refused since llama.cpp would take all memory with it, or end the process.
#include "allocmoe-limits.h"

#include "llama-grammar.h"
#include "llama-impl.h"
#include "llama-model.h"

#include "ggml.h"
#include "llama.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

//
// grammars
//

// the parser calls itself for each parenthesis, and the search for left recursion for each rule
static constexpr int MAX_NESTING = 1000, MAX_DEPTH = 5000;
// elements that repetitions make; a string of 2,000 letters makes 8,000
static constexpr uint64_t MAX_ELEMENTS = 1000 * 1000;

void allocmoe_check_nesting(const char * grammar) {
    int depth = 0;
    for (const char * c = grammar; *c; ++c) {
        depth += (*c == '(') - (*c == ')');
        if (depth > MAX_NESTING) {
            throw std::runtime_error(format("more than %d parentheses inside each other", MAX_NESTING));
        }
    }
}

void allocmoe_check_repetition(uint64_t least, uint64_t most, size_t n_elements, uint64_t & n_made) {
    if (most < least) {
        throw std::runtime_error(format("repetition {%llu,%llu}: the most is less than the least", (unsigned long long) least, (unsigned long long) most));
    }
    // each optional one is a rule of three elements more; without an upper bound there is one of those
    n_made += least * n_elements + (most == UINT64_MAX ? 1 : most - least) * (n_elements + 3);
    if (n_made > MAX_ELEMENTS) {
        throw std::runtime_error(format("its repetitions make more than %llu elements", (unsigned long long) MAX_ELEMENTS));
    }
}

using rule = llama_grammar_rule;

static bool ends(const llama_grammar_element & element) {
    return element.type == LLAMA_GRETYPE_END || element.type == LLAMA_GRETYPE_ALT;
}

// Which rules may be empty: those with an alternative of nothing but such rules.
static std::vector<bool> find_empty(const std::vector<rule> & rules) {
    struct alternative {
        size_t of;
        size_t n_left; // elements that are not known to be empty
    };
    std::vector<alternative> alternatives;
    std::vector<std::vector<size_t>> used_in(rules.size());
    std::vector<bool> empty(rules.size());
    std::vector<size_t> found;
    const auto is_empty = [&](size_t rule) {
        if (!empty[rule]) {
            empty[rule] = true;
            found.push_back(rule);
        }
    };
    for (size_t of = 0; of < rules.size(); ++of) {
        size_t n = 0;
        for (const auto & element : rules[of]) {
            if (!ends(element)) {
                ++n;
                if (element.type == LLAMA_GRETYPE_RULE_REF) {
                    used_in[element.value].push_back(alternatives.size());
                }
                continue;
            }
            alternatives.push_back({ of, n });
            if (n == 0) {
                is_empty(of);
            }
            n = 0;
        }
    }
    while (!found.empty()) {
        const size_t rule = found.back();
        found.pop_back();
        for (const size_t i : used_in[rule]) {
            if (--alternatives[i].n_left == 0) {
                is_empty(alternatives[i].of);
            }
        }
    }
    return empty;
}

// The rules that a rule's alternatives may begin with, a letter or a token not before them.
template <class F>
static void each_first(const rule & rule, const std::vector<bool> & empty, F && f) {
    bool first = true;
    for (const auto & element : rule) {
        if (ends(element)) {
            first = true;
        } else if (first) {
            const bool is_rule = element.type == LLAMA_GRETYPE_RULE_REF;
            if (is_rule) {
                f(element.value);
            }
            first = is_rule && empty[element.value];
        }
    }
}

// Without a function that calls itself, as llama.cpp's search for left recursion is: a grammar may have any number of rules.
void allocmoe_check_rules(const std::vector<rule> & rules) {
    enum {
        UNKNOWN,
        IN_PROGRESS,
        KNOWN
    };
    const auto empty = find_empty(rules);
    std::vector<int> state(rules.size(), UNKNOWN), depth(rules.size(), 1);
    for (size_t begin = 0; begin < rules.size(); ++begin) {
        std::vector<size_t> stack = { begin };
        while (!stack.empty()) {
            const size_t of = stack.back();
            if (state[of] == UNKNOWN) {
                state[of] = IN_PROGRESS;
                each_first(rules[of], empty, [&](size_t next) {
                    if (state[next] == IN_PROGRESS) {
                        throw std::runtime_error("a rule begins with itself (left recursion)");
                    }
                    if (state[next] == UNKNOWN) {
                        stack.push_back(next);
                    }
                });
                continue;
            }
            stack.pop_back();
            if (state[of] == IN_PROGRESS) {
                state[of] = KNOWN;
                each_first(rules[of], empty, [&](size_t next) { depth[of] = std::max(depth[of], 1 + depth[next]); });
                if (depth[of] > MAX_DEPTH) {
                    throw std::runtime_error(format("more than %d rules begin with each other", MAX_DEPTH));
                }
            }
        }
    }
}

//
// positions
//

bool allocmoe_has_positions(const llama_model & model, const llama_batch & batch) {
    for (int32_t i = 0; model.pos_embd && i < batch.n_tokens; ++i) {
        if (batch.pos[i] < 0 || batch.pos[i] >= model.pos_embd->ne[1]) {
            LLAMA_LOG_ERROR("allocmoe: position %d: the model has learned the positions below %lld\n", batch.pos[i], (long long) model.pos_embd->ne[1]);
            return false;
        }
    }
    return true;
}
