// What patched files of llama.cpp ask before they compute what would take all memory, or end the process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

struct llama_batch;
struct llama_grammar_element;
struct llama_model;

// Grammars come with the requests of a server. These throw std::runtime_error for what is absurd in one: before it is parsed;
// before n_elements of a rule are repeated, where n_made counts what repetitions have made of the grammar; and when it is parsed.
void allocmoe_check_nesting(const char * grammar);
void allocmoe_check_repetition(uint64_t least, uint64_t most, size_t n_elements, uint64_t & n_made);
void allocmoe_check_rules(const std::vector<std::vector<llama_grammar_element>> & rules);

// Whether the model has a row for each position of the batch, if it has learned positions one by one. Logs which it has not.
bool allocmoe_has_positions(const llama_model & model, const llama_batch & batch);
