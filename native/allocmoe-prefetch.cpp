#include "allocmoe-prefetch.h"

#include "allocmoe-graph.h"

#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <bitset>
#include <cstring>
#include <map>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#define ALLOCMOE_MADVISE
#endif

static bool in_mapped_file(const ggml_tensor * tensor) {
#if defined(ALLOCMOE_MADVISE)
    return tensor && tensor->buffer && strcmp(ggml_backend_buft_name(ggml_backend_buffer_get_type(tensor->buffer)), "CPU_Mapped") == 0;
#else
    return tensor && false;
#endif
}

// Linux cuts a request off at the disk's read-ahead, which by default is this much.
static constexpr size_t REQUEST = 128 * 1024;

static void ask_for(const char * data, size_t n_bytes) {
#if defined(ALLOCMOE_MADVISE)
    const size_t page = sysconf(_SC_PAGESIZE);
    const auto begin  = (uintptr_t) data / page * page;
    const auto end    = (uintptr_t) data + n_bytes;
    for (uintptr_t at = begin; at < end; at += REQUEST) {
        // advice: where it fails, the pages are read when they are needed
        (void) posix_madvise((void *) at, std::min<size_t>(REQUEST, end - at), POSIX_MADV_WILLNEED);
    }
#else
    (void) data;
    (void) n_bytes;
#endif
}

int64_t allocmoe_advise_experts(const llama_model & model, bool single_pages) {
    int64_t n_bytes = 0;
#if defined(ALLOCMOE_MADVISE)
    const size_t page = sysconf(_SC_PAGESIZE);
    for (const auto & layer : model.layers) {
        for (const auto * tensor : { layer.ffn_gate_exps, layer.ffn_up_exps, layer.ffn_down_exps, layer.ffn_gate_up_exps }) {
            if (!in_mapped_file(tensor)) {
                continue;
            }
            const auto begin = (uintptr_t) tensor->data / page * page;
            const auto end   = (uintptr_t) tensor->data + ggml_nbytes(tensor);
            (void) posix_madvise((void *) begin, end - begin, single_pages ? POSIX_MADV_RANDOM : POSIX_MADV_NORMAL);
            n_bytes += ggml_nbytes(tensor);
        }
    }
#else
    (void) model;
    (void) single_pages;
#endif
    return n_bytes;
}

// node: asks for the experts in src[0], the ids, of every tensor after it; what it computes is of no use
static void compute_prefetch(ggml_tensor * dst, int ith, int nth, void * /* userdata */) {
    const ggml_tensor * ids = dst->src[0];

    std::bitset<LLAMA_MAX_EXPERTS> chosen;
    for (int64_t t = 0; t < ids->ne[1]; ++t) {
        for (int64_t r = 0; r < ids->ne[0]; ++r) {
            const int32_t id = *(const int32_t *) ((const char *) ids->data + t * ids->nb[1] + r * ids->nb[0]);
            if (id >= 0) {
                chosen[id] = true;
            }
        }
    }
    int turn = 0;
    for (int s = 1; s < GGML_MAX_SRC && dst->src[s]; ++s) {
        const ggml_tensor * experts = dst->src[s];
        for (int64_t e = 0; e < experts->ne[2]; ++e) {
            if (chosen[e] && turn++ % nth == ith) {
                ask_for((const char *) experts->data + e * experts->nb[2], experts->nb[2]);
            }
        }
    }
}

void allocmoe_add_prefetch(ggml_context * ctx, ggml_cgraph * gf) {
    std::vector<ggml_tensor *> nodes;
    std::map<ggml_tensor *, std::vector<ggml_tensor *>> args; // by ids: these, and the experts that they choose
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        ggml_tensor * node = ggml_graph_node(gf, i);
        nodes.push_back(node);
        if (node->op == GGML_OP_MUL_MAT_ID && in_mapped_file(node->src[0])) {
            auto & found = args.insert({ node->src[2], { node->src[2] } }).first->second;
            if (found.size() + 1 < GGML_MAX_SRC) {
                found.push_back(node->src[0]);
            }
        }
    }
    if (args.empty()) {
        return;
    }

    allocmoe_clear_graph(ctx, gf);
    for (ggml_tensor * node : nodes) {
        const auto found = node->op == GGML_OP_MUL_MAT_ID ? args.find(node->src[2]) : args.end();
        if (found != args.end()) {
            ggml_tensor * prefetch = ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, found->second.data(), (int) found->second.size(),
                compute_prefetch, GGML_N_TASKS_MAX, nullptr);
            ggml_set_name(prefetch, "allocmoe_prefetch");
            ggml_build_forward_expand(gf, prefetch);
            args.erase(found);
        }
        ggml_build_forward_order(gf, node);
    }
}
