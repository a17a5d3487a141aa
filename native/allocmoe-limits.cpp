// What is refused since llama.cpp would not come to an end with it, or end the process.
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
// stacks that llama.cpp goes through from a place in a grammar to the next letter, and from all that it may be to the one after
// it; each is looked up among the others
static constexpr double MAX_CHOICES = 10000, MAX_AFTER = 100000;

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

namespace {

// What may come from a place in a rule on, or from a rule's begin.
struct choices {
    double n      = 1; // stacks that are gone through to the next letter
    double after  = 0; // from each such letter to the one after it, in sum
    double last   = 0; // such letters after which the rule may end
    bool is_empty = true;

    void add(const choices & alternative) {
        n += alternative.n;
        after += alternative.after;
        last += alternative.last;
    }
};

// Of each rule what it may begin with, and how deep rules are inside each other there. Without a function that calls itself: a
// grammar may have any number of rules.
struct rule_sizes {
    enum {
        UNKNOWN,
        IN_PROGRESS,
        KNOWN
    };
    const std::vector<rule> & rules;
    const std::vector<bool> empty;
    std::vector<int> state;
    std::vector<size_t> order; // those that a rule begins with before it
    std::vector<choices> begins;
    std::vector<int> depth;

    explicit rule_sizes(const std::vector<rule> & rules) : rules(rules), empty(find_empty(rules)), state(rules.size(), UNKNOWN), begins(rules.size()), depth(rules.size(), 1) {
        for (size_t i = 0; i < rules.size(); ++i) {
            find(i);
        }
        // first the stacks to a letter, then, of all rules, what comes after it
        for (int pass = 0; pass < 2; ++pass) {
            for (const size_t of : order) {
                choices found;
                each_place(of, [&](const choices & place, bool is_begin) {
                    if (is_begin) {
                        found.add(place);
                    }
                });
                begins[of] = found;
            }
        }
    }

    // Calls f for each rule that is entered without a letter before it.
    template <class F>
    void each_first(size_t of, F && f) const {
        bool first = true;
        for (const auto & element : rules[of]) {
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

    void find(size_t begin) {
        std::vector<size_t> stack = { begin };
        while (!stack.empty()) {
            const size_t of = stack.back();
            if (state[of] == UNKNOWN) {
                state[of] = IN_PROGRESS;
                each_first(of, [&](size_t rule) {
                    if (state[rule] == IN_PROGRESS) {
                        throw std::runtime_error("a rule begins with itself (left recursion)");
                    }
                    if (state[rule] == UNKNOWN) {
                        stack.push_back(rule);
                    }
                });
                continue;
            }
            stack.pop_back();
            if (state[of] == KNOWN) {
                continue;
            }
            state[of] = KNOWN;
            each_first(of, [&](size_t rule) { depth[of] = std::max(depth[of], 1 + depth[rule]); });
            order.push_back(of);
        }
    }

    // Calls f with what may come from each place of a rule on, and whether the rule may begin there.
    template <class F>
    void each_place(size_t of, F && f) const {
        choices behind;
        for (size_t i = rules[of].size(); i-- > 0;) {
            const auto & element = rules[of][i];
            const bool is_begin  = i == 0 || ends(rules[of][i - 1]);
            if (element.type == LLAMA_GRETYPE_CHAR_ALT || element.type == LLAMA_GRETYPE_CHAR_RNG_UPPER) {
                continue; // of one letter with what stands before
            }
            choices here;
            if (element.type == LLAMA_GRETYPE_RULE_REF) {
                here = begins[element.value];
                here.after += here.last * behind.n;
                here.last *= behind.is_empty;
                here.is_empty = empty[element.value] && behind.is_empty;
                if (empty[element.value]) {
                    here.add(behind);
                }
            } else if (!ends(element)) {
                here = { 1, behind.n, behind.is_empty ? 1.0 : 0.0, false };
            }
            behind = here;
            f(here, is_begin);
        }
    }
};

} // namespace

static void check(const choices & found) {
    if (found.n > MAX_CHOICES || found.after > MAX_AFTER) {
        throw std::runtime_error(format("too many ways to go on from one place: %.0f, and %.0f after the next letter", found.n, found.after));
    }
}

void allocmoe_check_rules(const std::vector<rule> & rules) {
    const rule_sizes sizes(rules);
    for (size_t i = 0; i < rules.size(); ++i) {
        if (sizes.depth[i] > MAX_DEPTH) {
            throw std::runtime_error(format("more than %d rules begin with each other", MAX_DEPTH));
        }
        check(sizes.begins[i]);
        sizes.each_place(i, [](const choices & place, bool) { check(place); });
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
