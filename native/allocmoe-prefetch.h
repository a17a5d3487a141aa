// Models larger than memory: the experts' pages are asked for as soon as a layer's router has chosen them.
#pragma once

#include <cstdint>

struct ggml_cgraph;
struct ggml_context;
struct llama_model;

// Whether page faults in the model's experts shall read single pages instead of what lies around them, wherever the experts
// are in a mapped file. Returns the bytes of such experts, 0 too where the system takes no advice.
int64_t allocmoe_advise_experts(const llama_model & model, bool single_pages);

// Adds to the graph, ahead of each layer's first product with experts in a mapped file, a node that asks the system for the
// pages of all that the layer has chosen.
void allocmoe_add_prefetch(ggml_context * ctx, ggml_cgraph * gf);
