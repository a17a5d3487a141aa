// What the CUDA backend runs of ours, on CPU threads: cases from stdin, results to stdout (test_device_code.py).
#include <pthread.h>

#include <atomic>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __forceinline__ inline
static thread_local struct {
    int x;
} threadIdx, blockDim;

#include "allocmoe-cuda.cuh"
#include "allocmoe-token-rule.h"

struct shared_block {
    explicit shared_block(int size) : size(size) { pthread_barrier_init(&barrier, nullptr, size); }
    ~shared_block() { pthread_barrier_destroy(&barrier); }
    int size;
    pthread_barrier_t barrier;
    std::atomic<int> counter{ 0 };
};

// the operations of a CUDA block, each thread of it a thread
struct thread_block {
    shared_block & shared;
    int thread;
    int rank() const { return thread; }
    int size() const { return shared.size; }
    void sync() const { pthread_barrier_wait(&shared.barrier); }
    int count(bool condition) const {
        shared.counter += condition;
        sync();
        const int n = shared.counter;
        sync();
        if (thread == 0) {
            shared.counter = 0;
        }
        sync();
        return n;
    }
    void add(int32_t * address, int32_t value) const { __atomic_fetch_add(address, value, __ATOMIC_RELAXED); }
};

template <class F>
static void run_block(int n_threads, F && f) {
    std::vector<std::thread> threads;
    for (int i = 0; i < n_threads; ++i) {
        threads.emplace_back(f, i);
    }
    for (auto & thread : threads) {
        thread.join();
    }
}

template <typename T>
static std::vector<T> read(size_t n) {
    std::vector<T> data(n);
    if (n > 0 && fread(data.data(), sizeof(T), n, stdin) != n) {
        exit(2);
    }
    return data;
}

template <typename T>
static void write(const std::vector<T> & data) {
    fwrite(data.data(), sizeof(T), data.size(), stdout);
}

// what a rule leaves over at the positions from `first` on, in a ring that has room for them
static const int N_LEFT = 140;

static int place_of(int position) {
    return position < 0 ? -1 : position % N_LEFT;
}

static std::vector<allocmoe_place> places_from(int first, int n_tokens) {
    std::vector<allocmoe_place> places(n_tokens);
    for (int t = 0; t < n_tokens; ++t) {
        places[t] = { place_of(first + t - 1), place_of(first + t) };
    }
    return places;
}

static void route(const std::vector<int32_t> & h) {
    const int n_threads = h[1], n_used = h[7], n_expert = h[8], n_tokens = h[9];
    const auto left_0 = read<float>(1);
    const auto limits = read<allocmoe_limit>(n_tokens);
    const auto ids    = read<int32_t>((size_t) n_tokens * n_expert); // all ranked, as an argsort leaves them
    const auto scores = read<float>((size_t) n_tokens * n_expert);

    std::vector<int32_t> routed((size_t) n_tokens * n_used);
    const auto places = places_from(5, n_tokens);
    std::vector<float> left(N_LEFT);
    std::vector<uint16_t> kept(N_LEFT);
    allocmoe_spent spent   = { {}, left.data(), kept.data(), N_LEFT };
    left[places[0].before] = left_0[0];

    allocmoe_route_args args = {};
    args.ids                 = ids.data();
    args.scores              = scores.data();
    args.limits              = limits.data();
    args.places              = places.data();
    args.routed              = routed.data();
    args.stride_ids          = n_expert;
    args.stride_scores       = n_expert;
    args.n_used              = n_used;
    args.n_tokens            = n_tokens;
    args.node.rule           = h[2];
    args.node.value          = h[3];
    args.node.k_base         = h[4];
    args.node.strict         = h[6];
    args.node.phase          = 1;
    args.node.spent          = &spent;

    shared_block block(n_threads);
    auto shared = std::make_unique<allocmoe_route_shared>();
    run_block(n_threads, [&](int i) {
        thread_block thread{ block, i };
        allocmoe_route(thread, args, *shared);
    });
    write(routed);
    write<double>({ (double) spent.activations[0], (double) spent.activations[1], left[place_of(4 + (h[6] ? n_tokens : 0))] });
    std::vector<int32_t> noted(n_tokens);
    for (int t = 0; t < n_tokens; ++t) {
        noted[t] = kept[places[t].own] - 1;
    }
    write(noted);
}

// the end of mm_ids_helper, after every expert has written its own
static void mark(const std::vector<int32_t> & h) {
    const int n_used = h[1], n_tokens = h[2], stride = h[3], n_valid = h[4];
    const bool inverse = h[5];
    const auto ids     = read<int32_t>((size_t) n_tokens * stride);
    auto src1          = read<int32_t>((size_t) n_tokens * n_used);
    run_block(32, [&](int i) {
        threadIdx.x = i;
        blockDim.x  = 32;
        allocmoe_mark_skipped(ids.data(), src1.data(), n_valid, n_tokens, n_used, stride, inverse);
    });
    write(src1);

    std::vector<int32_t> to_sorted(n_valid, 7), from_sorted((size_t) n_tokens * n_used, 9);
    std::vector<char> bytes((const char *) ids.data(), (const char *) (ids.data() + ids.size()));
    ggml_tensor tensor = {};
    tensor.ne[0]       = n_used;
    tensor.ne[1]       = n_tokens;
    tensor.nb[0]       = sizeof(int32_t);
    tensor.nb[1]       = stride * sizeof(int32_t);
    if (allocmoe_pad_skipped(&tensor, bytes, to_sorted, from_sorted) != n_valid) {
        exit(3);
    }
    write(to_sorted);
    write(from_sorted);
}

// slots of n_rows rows, computed n_rows_block at a time
static void skip(const std::vector<int32_t> & h) {
    const int n_rows = h[1], n_rows_block = h[2], n_slots = h[3];
    const auto ids = read<int32_t>(n_slots);
    auto dst       = read<float>((size_t) n_slots * n_rows);
    for (int slot = 0; slot < n_slots; ++slot) {
        for (int row0 = 0; row0 < n_rows; row0 += n_rows_block) {
            for (int tid = 0; tid < 64; ++tid) {
                float * rows = &dst[(size_t) slot * n_rows];
                if (allocmoe_skip_slot(ids[slot], rows, row0, n_rows_block, n_rows, tid) != (ids[slot] < 0)) {
                    exit(4);
                }
            }
        }
        if (allocmoe_sort_last(ids[slot]) != (ids[slot] < 0 ? INT_MAX : ids[slot])) {
            exit(5);
        }
        const float bias = 3.0f; // of no expert when the slot is skipped: nothing may read it
        if (allocmoe_bias(ids[slot], ids[slot] < 0 ? nullptr : &bias, 0) != (ids[slot] < 0 ? 0.0f : bias)) {
            exit(6);
        }
    }
    write(dst);
}

// both nodes of the rule that goes by estimates, the second on the first one's ids
static void estimate(const std::vector<int32_t> & h) {
    const int n_threads = h[1], n_used = h[2], n_expert = h[3], n_tokens = h[4], n_down = h[5], rank = h[6], n_columns = h[7];
    const int k          = h[9]; // 0 for a rule that is not strict
    const auto threshold = read<float>(1);
    const std::vector<allocmoe_limit> limits(n_tokens, { (float) k, threshold[0] });
    const auto ids      = read<int32_t>((size_t) n_tokens * n_expert);
    const auto weights  = read<float>((size_t) n_tokens * n_used);
    const auto reduced  = read<float>((size_t) n_tokens * n_down);
    const auto log_norm = read<float>((size_t) n_expert * (n_down + 1));
    const auto output   = read<float>((size_t) n_expert * rank);

    std::vector<int32_t> routed((size_t) n_tokens * n_used);
    std::vector<float> skipped((size_t) n_tokens * n_columns);
    // half way the text goes back to its fourth token, where tokens come one after the other
    std::vector<allocmoe_place> places;
    for (int t = 0; t < n_tokens; ++t) {
        const int position = k > 0 && n_tokens > 6 && t >= n_tokens / 2 ? t - n_tokens / 2 + 3 : t;
        places.push_back({ position - 1, position });
    }
    std::vector<float> left(n_tokens);
    std::vector<uint16_t> kept(n_tokens);
    allocmoe_spent spent = { {}, left.data(), kept.data(), n_tokens };

    allocmoe_estimate_args args = {};
    args.ids                    = ids.data();
    args.weights                = weights.data();
    args.reduced                = reduced.data();
    args.limits                 = limits.data();
    args.places                 = places.data();
    args.table                  = log_norm.data();
    args.routed                 = routed.data();
    args.skipped                = skipped.data();
    args.stride_ids             = n_expert;
    args.stride_weights         = n_used;
    args.stride_weights_rank    = 1;
    args.stride_reduced         = n_down;
    args.stride_table           = n_down + 1;
    args.n_used                 = n_used;
    args.n_tokens               = n_tokens;
    args.n_down                 = n_down;
    args.rank                   = rank;
    args.n_columns              = n_columns;
    args.node.k_base            = h[8];
    args.node.n_relu            = h[10];
    args.node.strict            = k > 0;
    args.node.phase             = 1;
    args.node.spent             = &spent;

    auto shared = std::make_unique<allocmoe_estimate_shared>();
    shared_block block(n_threads);
    run_block(n_threads, [&](int i) {
        thread_block thread{ block, i };
        allocmoe_route_by_size(thread, args, *shared);
    });
    args.table        = output.data();
    args.stride_table = rank;
    shared_block token(n_columns);
    for (int t = 0; t < n_tokens; ++t) {
        run_block(n_columns, [&](int i) {
            thread_block thread{ token, i };
            allocmoe_sum_skipped(thread, args, t);
        });
    }
    write(routed);
    write(skipped);
    write<int64_t>({ spent.activations[0], spent.activations[1] });
    write(kept);
}

int main() {
    int32_t kind;
    while (fread(&kind, sizeof(kind), 1, stdin) == 1) {
        std::vector<int32_t> header = read<int32_t>(10);
        header.insert(header.begin(), kind);
        (kind == 0 ? route : kind == 1 ? mark
                         : kind == 2   ? skip
                                       : estimate)(header);
    }
    return 0;
}
