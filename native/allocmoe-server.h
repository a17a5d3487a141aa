// What llama.cpp's server, patched by patches/08-server.patch, sees of ours: a budget for each request. The hooks add members
// to its structs and call these functions; what they do is in allocmoe-server*.cpp. Included by server-common.h.
#pragma once

#include "json.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

struct llama_context;

// Member of task_params: what a request asks for.
struct allocmoe_request {
    std::string asked;      // as the request has it, JSON; "" where it does not say
    int64_t total  = 0;     // activations per token over all layers; 0 where the model leaves no choice
    bool adaptive  = false; // the server's load decides
    bool any_cache = false; // tokens that were computed at another budget may be used again
    bool per_layer = false; // answers say what each layer spends
};

// Member of server_slot_stats: what a request has spent. Goes with every answer.
struct allocmoe_spending {
    struct part {
        int64_t n_tokens = 0;
        std::vector<int64_t> activations; // [n_layer]
        std::vector<int64_t> tokens;      // [n_layer], that have reached the layer's router

        // The next tokens' counts, [n_layer] each.
        void add(int64_t n, const std::vector<int64_t> & activations, const std::vector<int64_t> & tokens);
        // Per token, over all layers.
        double mean() const;
    };
    allocmoe_request request;
    part prompt;
    part predicted;
    std::vector<int64_t> last; // [n_layer], of the last tokens that were computed

    // As the member "budget" of an answer, or a part of one; not for a model without experts.
    void add_to(common_json & answer) const;
};

// Member of server_prompt: how its tokens were computed.
struct allocmoe_origin {
    static constexpr int64_t MIXED = -1; // at several budgets, or nobody knows

    int64_t total = 0;
    // only while they are not in the context
    std::vector<float> left;  // [n_layer][n_tokens], what a strict rule has left over
    std::vector<int16_t> ran; // [n_layer][n_tokens][allocmoe_ran_size()], which experts have run
};

// Member of server_metrics: since the server started.
struct allocmoe_totals {
    allocmoe_spending::part prompt;
    allocmoe_spending::part predicted;
    int64_t n_requests = 0;
    int64_t budgets    = 0; // sum of theirs
    int64_t budget_now = 0; // of the request that began last

    std::string to_prometheus() const;
};

// The tokens [first, last) of one sequence that a batch has computed.
struct allocmoe_run {
    int32_t seq_id;
    int32_t first;
    int32_t last;
    bool is_prompt;
};

// What ends a server that is starting comes again as the last line on stderr, after all that is logged: keeps the first error
// from now on, and prints it where the exit status is one of an error.
void allocmoe_server_listen();
void allocmoe_server_ended(int status);

// What `load` returns; false where it throws, with the reason in the log.
bool allocmoe_server_load(const std::function<bool()> & load);

// Puts the server's own budget in force. False, with the reason in the log, where that cannot be.
bool allocmoe_server_init(llama_context * ctx);

// Throws std::invalid_argument for JSON, or JSON in its strings, that is nested so deep that copies of it, which recurse, would run
// out of stack.
void allocmoe_server_check(const std::string & body);

// Reads a request's fields. Throws std::invalid_argument for what the model cannot serve.
void allocmoe_server_parse(const common_json & body, allocmoe_request & request);

// Whether a request may use what is cached.
bool allocmoe_server_reusable(const allocmoe_origin & origin, const allocmoe_request & request);

// Before a slot's first token: its budget, by the load if that decides. Returns what is wrong, "" for nothing.
std::string allocmoe_server_launch(llama_context * ctx, int32_t seq_id, allocmoe_request & request, allocmoe_spending & spending, allocmoe_totals & totals, size_t n_waiting, size_t n_slots);

// When it is known how many cached tokens a slot goes on from.
void allocmoe_server_begin(allocmoe_origin & origin, const allocmoe_request & request, int32_t n_cached);

// After a batch.
void allocmoe_server_count(llama_context * ctx, const allocmoe_run & run, allocmoe_spending & spending, allocmoe_totals & totals);

// The same for its tokens [off, off + n_tokens), where `of` gives a slot's spending.
template <class Tokens, class Of>
void allocmoe_server_count(llama_context * ctx, const Tokens & tokens, int32_t off, int32_t n_tokens, Of && of, allocmoe_totals & totals) {
    for (int32_t i = off; i < off + n_tokens;) {
        const auto & token = tokens[i];
        allocmoe_run run   = { token.id_slot, token.pos, token.pos, token.is_prompt };
        for (; i < off + n_tokens && tokens[i].id_slot == run.seq_id && tokens[i].pos == run.last && tokens[i].is_prompt == run.is_prompt; ++i) {
            ++run.last;
        }
        allocmoe_server_count(ctx, run, of(run.seq_id), totals);
    }
}

// What a strict rule has left over, and which experts have run, go with a sequence's memory: out of the context, into it, to
// another sequence, to other positions, to a file beside the one with that memory.
void allocmoe_server_take(llama_context * ctx, int32_t seq_id, int32_t n_tokens, allocmoe_origin & origin);
void allocmoe_server_put(llama_context * ctx, int32_t seq_id, allocmoe_origin & origin);
void allocmoe_server_copy(llama_context * ctx, int32_t from, int32_t to, int32_t n_tokens);
void allocmoe_server_shift(llama_context * ctx, int32_t seq_id, int32_t first, int32_t last, int32_t by);
// Writes both files, as llama_state_seq_save_file does the one; where that fails, those of before stay as they were.
size_t allocmoe_server_save(llama_context * ctx, const char * path, int32_t seq_id, const int32_t * tokens, size_t n, int32_t n_tokens, const allocmoe_origin & origin);
void allocmoe_server_read(llama_context * ctx, int32_t seq_id, int32_t n_tokens, allocmoe_origin & origin, const std::string & path);

// What /props says, null for a model without experts.
common_json allocmoe_server_props();
