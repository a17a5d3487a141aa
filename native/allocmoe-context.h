// What a context has of its own beside its plan, and the way in from a llama_context.
#pragma once

#include "allocmoe-custom.h"
#include "allocmoe-file.h"
#include "allocmoe-instrument.h"
#include "allocmoe-plan.h"

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

struct llama_context;
class allocmoe_expert_cache;

// Under ALLOCMOE_RULE_ESTIMATE: which experts the token at each position of each sequence has run. So what is at hand for a token
// depends on the tokens before it in its sequence, whatever else the cache holds.
struct allocmoe_ran {
    // [block_count][n_seq_max][n_left][1 + most of a layer]: ALLOCMOE_RAN_*, ids by rank, -1 where they end
    std::shared_ptr<int16_t> entries;
    std::vector<int64_t> n_absent; // [block_count], skipped for being absent
    int64_t n_place = 0;           // of a layer
    int64_t n_entry = 0;
    int32_t n_left  = 0; // as allocmoe_spent has it

    int16_t * at(int il, int32_t place) { return entries.get() + (il * n_place + place) * n_entry; }
};

enum {
    ALLOCMOE_RAN_NOTHING = 0, // nobody knows, or another rule had the say
    ALLOCMOE_RAN_TOKEN   = 1,
    ALLOCMOE_RAN_FIRST   = 2, // with none before it
};

struct allocmoe_state {
    struct phase {
        std::vector<int64_t> activations; // [block_count], but for those that token rules count
        std::vector<int64_t> tokens;      // [block_count]
    };
    std::array<phase, 2> phases; // by ALLOCMOE_PHASE_*
    // [block_count], written by the nodes of the token rules, and by allocmoe_count() for layers without one: to be read after the context
    // has been synchronised
    std::shared_ptr<allocmoe_spent> spent;
    bool spent_on_devices = false; // the model's devices can write it too
    bool has_devices      = false; // the model has some

    int32_t n_layer_main = 0;     // layers before the model's heads for further tokens, if it has any
    bool prefetch        = false; // graphs ask the system for the chosen experts' pages

    std::shared_ptr<const allocmoe_model> file;          // what budgets are served from: the model's or a side file; null for none
    std::shared_ptr<const allocmoe_estimates> estimates; // a caller's, in place of the file's
    allocmoe_records records;

    allocmoe_expert_cache * cache = nullptr; // the model's, where its experts stay in the file
    std::string cache_error;                 // why the last run was void, "" if it was not
    allocmoe_ran ran;                        // where there is a cache
    double union_share  = 1.0;               // of the experts of several tokens, what runs
    float miss_handicap = 0.0f;              // by so much an absent expert's log size has to be above its threshold
};

// A plan as the model can run it: with its estimates, and another token rule where the model cannot run the plan's, with a
// warning in the log. Throws allocmoe_error where there is no estimator to go by.
std::shared_ptr<const allocmoe_plan> allocmoe_runnable(std::unique_ptr<allocmoe_plan> plan, const allocmoe_state & state, const llama_model & model);

// Whether the device's backend is one of ours that takes -1 for a slot without work; others would take it for an expert.
bool allocmoe_runs_token_rules(struct ggml_backend_device * device);

// the friend that llama_context grants us
struct allocmoe_access {
    static const llama_model & model(const llama_context * ctx);
    static allocmoe_state & state(const llama_context * ctx);
    static const allocmoe_settings & settings(const llama_context * ctx);

    // From the next decode on; graphs that exist are built anew where they differ.
    static void set_settings(llama_context * ctx, allocmoe_settings settings);

    // Puts a plan that the model can run in force, null for the model's own counts, and ends what single sequences had of their
    // own. Returns whether that changed anything.
    static bool set_plan(llama_context * ctx, std::shared_ptr<const allocmoe_plan> plan);

    static int64_t set_prefetch(llama_context * ctx, bool prefetch);
};
