// Models larger than memory: routed experts stay in the model's file and are read when a layer's router has chosen them, into
// an arena of fixed size that keeps those used last. Asked for by an override of the key below when the model is loaded.
#pragma once

#include "allocmoe-experts.h"

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

struct ggml_backend_buffer_type;
struct ggml_cgraph;
struct ggml_context;
struct llama_model;
struct llama_model_loader;
struct llama_model_tensor_buft_override;

#define ALLOCMOE_KEY_EXPERT_CACHE "allocmoe.expert_cache_bytes"
// what contexts of the model begin with, see allocmoe_set_miss_price; 0 to have it measured, without it 1
#define ALLOCMOE_KEY_MISS_PRICE "allocmoe.miss_price"

// What was asked for, and what came of it, in one layer and phase.
struct allocmoe_cache_counts {
    int64_t hits;   // experts that were in memory: of one token, or the different ones of a micro-batch
    int64_t misses; // that had to be read
    int64_t bytes;  // read for them
};

class allocmoe_expert_cache {
public:
    // The experts of one layer that the same ids choose among.
    struct group;
    struct matrix;

    // What a graph's node asks for.
    struct request {
        allocmoe_expert_cache * cache;
        group * experts; // null: `obstacle` is why the graph cannot run
        std::string obstacle;
        int phase;                   // ALLOCMOE_PHASE_*
        std::vector<matrix *> order; // in which its products come
    };

    explicit allocmoe_expert_cache(int64_t n_bytes);
    ~allocmoe_expert_cache();
    allocmoe_expert_cache(const allocmoe_expert_cache &)             = delete;
    allocmoe_expert_cache & operator=(const allocmoe_expert_cache &) = delete;

    // Has the loader leave routed experts where they are.
    void claim(llama_model_loader & loader);

    // Finds the model's experts in its files. Throws std::runtime_error where the arena is too small, or cannot be had.
    void open(const llama_model_loader & loader, const llama_model & model);

    // Adds to the graph, ahead of a layer's first product with its experts, the node that asks for all that the layer has
    // chosen. A graph that uses experts in another way is replaced by one that fails.
    void add_requests(ggml_context * ctx, ggml_cgraph * gf, int phase, std::deque<request> & requests);

    // After a graph has run: what went wrong, "" if nothing did. What has not arrived is forgotten.
    std::string take_error();

    // of a layer; null where it has none
    const group * find(int il) const;
    static int64_t n_slots(const group & experts);

    // Sets miss_price, unless it has been given or measured before: the model's own products with some of its experts, in as
    // many threads, with the experts to be read and with them in memory. Leaves the cache empty. 1 where they cannot be read.
    void find_price(const llama_model & model, int n_threads);

    int64_t n_bytes() const { return n_arena; }
    double miss_price = 1.0; // 0 where it is still to be measured
    double miss_ms    = 0.0; // what an expert takes, where that has been measured
    double hit_ms     = 0.0;
    std::array<std::vector<allocmoe_cache_counts>, 2> counts; // by phase, [block_count]
    std::atomic<int64_t> waited_us{ 0 };                      // by threads that compute, added up

private:
    struct readers;
    struct job;

    static void compute_request(ggml_tensor * dst, int ith, int nth, void * userdata);
    void ask(request & what, const ggml_tensor * ids);
    void drop(group & experts);
    void empty();
    static void leave(const std::shared_ptr<readers> & pool);
    void fail(const std::string & what);
    std::string changed_file() const;
    const char * wait(const matrix & m, int64_t expert);
    char * slot(const group & experts, int32_t i) const;

    int64_t n_arena;
    char * arena          = nullptr;
    size_t n_mapped       = 0;
    char * staging        = nullptr; // what does not fit into a layer's slots, until the next layer
    group * staged        = nullptr; // whose that is
    bool opened           = false;
    std::atomic<bool> bad = { false };
    std::string error;

    struct file;
    std::vector<file> files;
    std::deque<group> groups;
    std::shared_ptr<readers> pool;
    std::vector<llama_model_tensor_buft_override> overrides;
    std::unique_ptr<ggml_backend_buffer_type> type;

    friend struct allocmoe_cache_buffer;
};
