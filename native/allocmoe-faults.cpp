// For files of strangers: what ggml ends the process for while a model is loaded is an error like any other.
#include "allocmoe-hooks.h"

#include "llama-impl.h"
#include "llama-model.h"
#include "llama-vocab.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <cstdio>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

static thread_local int caught = 0; // guards of this thread

// threads that have some, and what was called before the first of them
static std::mutex mutex;
static int n_threads                = 0;
static ggml_abort_callback_t before = nullptr;

static void on_abort(const char * message) {
    if (caught > 0) {
        const char * name = strrchr(message, '/'); // of the source file
        throw std::runtime_error(name ? name + 1 : message);
    }
    if (before) {
        before(message);
    } else {
        (void) fprintf(stderr, "%s\n", message);
    }
}

allocmoe_catch_faults::allocmoe_catch_faults() {
    const std::lock_guard<std::mutex> lock(mutex);
    if (caught++ == 0 && n_threads++ == 0) {
        before = ggml_set_abort_callback(on_abort);
    }
}

allocmoe_catch_faults::~allocmoe_catch_faults() {
    const std::lock_guard<std::mutex> lock(mutex);
    if (--caught == 0 && --n_threads == 0) {
        ggml_set_abort_callback(before);
    }
}

void allocmoe_check_adapter(const ggml_tensor & weight, const ggml_tensor & a, const ggml_tensor & b) {
    for (const auto * part : { &a, &b }) {
        if (part->ne[2] != weight.ne[2] || part->ne[3] != weight.ne[3]) {
            throw std::runtime_error(format("LoRA tensor '%s' is for %lld experts, and the model has %lld",
                part->name, (long long) part->ne[2], (long long) weight.ne[2]));
        }
        if (part->type != GGML_TYPE_F32 && !ggml_get_type_traits(part->type)->to_float) {
            throw std::runtime_error(format("LoRA tensor '%s' has the type %s, which no kernel multiplies", part->name, ggml_type_name(part->type)));
        }
    }
}

// The input that a tensor is, or is the scheduler's copy of for another backend: "BACKEND#NAME#0", which is filled only when the
// graph is computed. Null if there is none.
static const ggml_tensor * input_of(ggml_cgraph * graph, const ggml_tensor * tensor) {
    const char * begin = strchr(tensor->name, '#');
    const char * end   = strrchr(tensor->name, '#');
    if (!(tensor->flags & GGML_TENSOR_FLAG_INPUT) && begin != end) {
        tensor = ggml_graph_get_tensor(graph, std::string(begin + 1, end).c_str());
    }
    return tensor && tensor->flags & GGML_TENSOR_FLAG_INPUT ? tensor : nullptr;
}

void allocmoe_check_rows(ggml_cgraph * graph) {
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        const auto * node  = ggml_graph_node(graph, i);
        const auto * input = node->op == GGML_OP_GET_ROWS ? input_of(graph, node->src[1]) : nullptr;
        if (!input || input->type != GGML_TYPE_I32) {
            continue;
        }
        std::vector<int32_t> rows(ggml_nelements(input));
        ggml_backend_tensor_get(input, rows.data(), 0, ggml_nbytes(input));
        for (const int32_t row : rows) {
            if (row < 0 || row >= node->src[0]->ne[1]) {
                throw std::runtime_error(format("row %d of '%s' is wanted, which has %lld", row, node->src[0]->name, (long long) node->src[0]->ne[1]));
            }
        }
    }
}

void allocmoe_try_vocab(const llama_model & model) {
    const auto & vocab = model.vocab;
    if (vocab.get_type() == LLAMA_VOCAB_TYPE_NONE) {
        return;
    }
    const std::string text = "Hello 123,\tworld!\n \xc3\xa9\xe2\x96\x81\xf0\x9f\x98\x80\xff\x01 <s></s>";
    for (const bool special : { false, true }) {
        vocab.tokenize(text, special, special);
    }
    char piece[256];
    for (llama_token token = 0; token < (llama_token) vocab.n_tokens(); ++token) {
        for (const bool special : { false, true }) {
            vocab.token_to_piece(token, piece, sizeof(piece), 0, special);
        }
    }
}
