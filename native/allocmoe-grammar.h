// The letters that a grammar takes. Included in the midst of llama-grammar.cpp, for what is static there.
#pragma once

#include <map>
#include <unordered_map>

// The candidates that none of the stacks takes. llama.cpp goes on from each stack by itself, letter after letter: where many take
// the same letters (an optional one a hundred times) that is not done in a lifetime. Here all stacks take a letter together, and
// those that are the same after it are one.
static llama_grammar_candidates allocmoe_reject(const llama_grammar_rules & rules, const llama_grammar_stacks & stacks, const llama_grammar_candidates & candidates) {
    llama_grammar_stacks of_letters, of_tokens;
    for (const auto & stack : stacks) {
        const bool is_token = !stack.empty() && (stack.back()->type == LLAMA_GRETYPE_TOKEN || stack.back()->type == LLAMA_GRETYPE_TOKEN_NOT);
        (is_token ? of_tokens : of_letters).push_back(stack);
    }
    // of a token that has ended, in the midst of a letter or not
    const auto ends = [&](const llama_grammar_candidate & token) {
        return token.partial_utf8.n_remain == 0 || std::any_of(of_letters.begin(), of_letters.end(), [&](const auto & stack) {
            return !stack.empty() && llama_grammar_match_partial_char(stack.back(), token.partial_utf8);
        });
    };

    llama_grammar_candidates rejects;
    using taking = std::vector<const llama_grammar_stack *>;
    std::map<taking, llama_grammar_candidates> groups; // by the stacks that take the next letter
    std::unordered_map<uint32_t, llama_grammar_candidates *> group_of;
    for (const auto & token : candidates) {
        const uint32_t letter = *token.code_points;
        if (letter == 0) {
            if (!ends(token)) {
                rejects.push_back(token);
            }
            continue;
        }
        if (std::any_of(of_tokens.begin(), of_tokens.end(), [&](const auto & stack) { return llama_grammar_match_token(stack.back(), token.id); })) {
            continue;
        }
        auto & group = group_of[letter];
        if (!group) {
            taking found;
            for (const auto & stack : of_letters) {
                if (!stack.empty() && llama_grammar_match_char(stack.back(), letter).first) {
                    found.push_back(&stack);
                }
            }
            group = &groups[found];
        }
        group->push_back({ token.index, token.code_points + 1, token.partial_utf8, token.id });
    }
    for (const auto & [stacks_taking, tokens] : groups) {
        llama_grammar_stacks after;
        for (const auto * stack : stacks_taking) {
            llama_grammar_stack moved(stack->begin(), stack->end() - 1);
            const auto * next = llama_grammar_match_char(stack->back(), 0).second;
            if (!llama_grammar_is_end_of_sequence(next)) {
                moved.push_back(next);
            }
            llama_grammar_advance_stack(rules, moved, after);
        }
        for (const auto & token : after.empty() ? tokens : allocmoe_reject(rules, after, tokens)) {
            rejects.push_back({ token.index, token.code_points - 1, token.partial_utf8, token.id });
        }
    }
    return rejects;
}
