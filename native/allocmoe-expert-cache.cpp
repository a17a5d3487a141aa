#include "allocmoe-expert-cache.h"

#include "allocmoe-graph.h"
#include "allocmoe-hooks.h"
#include "allocmoe.h"

#include "llama-impl.h"
#include "llama-mmap.h"
#include "llama-model-loader.h"
#include "llama-model.h"

#include "ggml-backend-impl.h"
#include "ggml-backend.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <map>
#include <stdexcept>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <csignal>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#define ALLOCMOE_EXPERT_CACHE
#endif

// What direct reads are aligned to, in the file and in memory: no less than any disk's block.
static constexpr size_t ALIGNED   = 4096;
static constexpr int N_READERS    = 4;
static constexpr size_t HUGE_PAGE = 2 << 20;
// Of the experts that the price of a miss is measured with, a token's: more than processors keep in their caches, where those at
// hand would be found sooner than in the memory that they are in when a token comes.
static constexpr size_t MEASURED   = 512 << 20;
static constexpr int N_MEASURED    = 8;
static constexpr auto MEASURED_FOR = std::chrono::milliseconds(100);
static constexpr auto LONG_ENOUGH  = std::chrono::seconds(1); // for a single round

static size_t round_down(size_t n) {
    return n / ALIGNED * ALIGNED;
}

static size_t round_up(size_t n) {
    return round_down(n + ALIGNED - 1);
}

struct allocmoe_expert_cache::file {
    int fd      = -1; // past the page cache where the system can
    bool direct = false;
    size_t size = 0;
    int64_t changed[2]; // when it was written last
};

// The experts of one tensor.
struct allocmoe_expert_cache::matrix : allocmoe_experts {
    allocmoe_expert_cache * cache;
    group * owner;
    const ggml_tensor * tensor;
    uint16_t file;
    size_t offset; // of the first one, in the file
    size_t size;   // of one
    size_t room;   // for one with what is read around it
    size_t at;     // in a slot
    int number;    // in the group

    size_t begin(int64_t expert) const { return round_down(offset + expert * size); }
    size_t end(int64_t expert) const { return offset + (expert + 1) * size; }
};

struct allocmoe_expert_cache::group {
    int il;
    int64_t n_expert;
    std::deque<matrix> matrices;
    size_t slot_size = 0;
    int32_t n_slots  = 0;
    char * base      = nullptr;
    int64_t clock    = 0;

    std::vector<int32_t> slot_of;              // [n_expert], -1 for none; from n_slots on: staged
    std::vector<int32_t> expert_in;            // [n_slots], -1 for none
    std::vector<int64_t> last_use;             // [n_expert]
    std::unique_ptr<std::atomic<bool>[]> here; // [n_expert][matrices]

    std::atomic<bool> & arrived(const matrix & m, int64_t expert) { return here[expert * matrices.size() + m.number]; }
};

struct allocmoe_expert_cache::job {
    matrix * what;
    int64_t expert;
    char * to; // the slot
};

// Threads that read, and what they are to read. Left behind in the child of a fork, which has none of these threads.
struct allocmoe_expert_cache::readers {
    std::mutex mutex;
    std::condition_variable work, arrival;
    std::deque<job> jobs;
    int n_reading = 0;
    bool stop     = false;
    std::vector<std::thread> threads;
#if defined(ALLOCMOE_EXPERT_CACHE)
    pid_t process = getpid();
#endif

    void end() {
        {
            std::lock_guard<std::mutex> lock(mutex);
            stop = true;
        }
        work.notify_all();
        for (auto & thread : threads) {
            thread.join();
        }
    }
};

// Keeps them for good: their threads are another process's, and cannot be ended here.
void allocmoe_expert_cache::leave(const std::shared_ptr<readers> & pool) {
    if (pool) {
        new std::shared_ptr<readers>(pool);
    }
}

//
// the buffer type: addresses without memory, for ggml to tell tensors by
//

struct allocmoe_cache_buffer {
    static const char * name(ggml_backend_buffer_type_t) { return "CPU_Expert_Cache"; }
    static size_t alignment(ggml_backend_buffer_type_t) { return ALIGNED; }
    static bool is_host(ggml_backend_buffer_type_t) { return true; }

    static void free(ggml_backend_buffer_t buffer) {
#if defined(ALLOCMOE_EXPERT_CACHE)
        munmap(buffer->context, std::max(buffer->size, ALIGNED));
#else
        GGML_UNUSED(buffer);
#endif
    }
    static void * base(ggml_backend_buffer_t buffer) { return buffer->context; }
    static void set(ggml_backend_buffer_t, ggml_tensor *, const void *, size_t, size_t) {} // stays in the file
    static void clear(ggml_backend_buffer_t, uint8_t) {}

    static ggml_backend_buffer_t alloc(ggml_backend_buffer_type_t type, size_t size) {
        if (((allocmoe_expert_cache *) type->context)->opened) {
            // LoRA adapters ask for memory of the kind that a model's tensors are in
            return ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
        }
#if defined(ALLOCMOE_EXPERT_CACHE)
        void * reserved = mmap(nullptr, std::max(size, ALIGNED), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (reserved == MAP_FAILED) {
            return nullptr;
        }
        ggml_backend_buffer_i functions = {};
        functions.free_buffer           = free;
        functions.get_base              = base;
        functions.set_tensor            = set;
        functions.clear                 = clear;
        return ggml_backend_buffer_init(type, functions, reserved, size);
#else
        return nullptr;
#endif
    }
};

static allocmoe_expert_cache * cache_of(const ggml_tensor * tensor) {
    const auto * type = tensor && tensor->buffer ? tensor->buffer->buft : nullptr;
    return type && type->iface.get_name == allocmoe_cache_buffer::name ? (allocmoe_expert_cache *) type->context : nullptr;
}

bool allocmoe_stays_in_file(const ggml_tensor * tensor) {
    return cache_of(tensor) != nullptr;
}

//
// loading
//

std::shared_ptr<allocmoe_expert_cache> allocmoe_make_expert_cache(llama_model_loader & loader) {
    const auto found = loader.kv_overrides.find(ALLOCMOE_KEY_EXPERT_CACHE);
    if (found == loader.kv_overrides.end()) {
        return nullptr;
    }
    const auto & value = found->second;
    if (value.tag != LLAMA_KV_OVERRIDE_TYPE_INT || value.val_i64 < 1) {
        throw std::runtime_error(ALLOCMOE_KEY_EXPERT_CACHE ": want a whole number of bytes");
    }
#if defined(ALLOCMOE_EXPERT_CACHE)
    auto cache       = std::make_shared<allocmoe_expert_cache>(value.val_i64);
    const auto price = loader.kv_overrides.find(ALLOCMOE_KEY_MISS_PRICE);
    if (price != loader.kv_overrides.end()) {
        cache->miss_price = price->second.tag == LLAMA_KV_OVERRIDE_TYPE_FLOAT ? price->second.val_f64 : -1.0;
        if (cache->miss_price != 0.0 && !(cache->miss_price >= 1.0 && cache->miss_price <= 1e6)) {
            throw std::runtime_error(ALLOCMOE_KEY_MISS_PRICE ": want a float from 1 to 1e6, or 0 to have it measured");
        }
    }
    cache->claim(loader);
    return cache;
#else
    throw std::runtime_error(ALLOCMOE_KEY_EXPERT_CACHE ": not on this system");
#endif
}

void allocmoe_open_expert_cache(const std::shared_ptr<allocmoe_expert_cache> & cache, const llama_model_loader & loader, const llama_model & model) {
    if (cache) {
        cache->open(loader, model);
    }
}

allocmoe_expert_cache::allocmoe_expert_cache(int64_t n_bytes) : n_arena(n_bytes) {}

allocmoe_expert_cache::~allocmoe_expert_cache() {
#if defined(ALLOCMOE_EXPERT_CACHE)
    if (pool && pool->process == getpid()) {
        pool->end();
    } else {
        leave(pool);
    }
    if (arena) {
        munmap(arena, n_mapped);
    }
    for (const auto & file : files) {
        if (file.fd >= 0) {
            close(file.fd);
        }
    }
#endif
}

void allocmoe_expert_cache::claim(llama_model_loader & loader) {
    type          = std::make_unique<ggml_backend_buffer_type>();
    type->iface   = { allocmoe_cache_buffer::name, allocmoe_cache_buffer::alloc, allocmoe_cache_buffer::alignment, nullptr, nullptr, allocmoe_cache_buffer::is_host };
    type->device  = nullptr;
    type->context = this;
    overrides.push_back({ "\\.ffn_(up|down|gate|gate_up)_(ch|)exps\\.weight$", type.get() });
    for (const auto * given = loader.tensor_buft_overrides; given && given->pattern; ++given) {
        overrides.push_back(*given);
    }
    overrides.push_back({ nullptr, nullptr });
    loader.tensor_buft_overrides = overrides.data();
    // All else is in memory of its own. Pages of a mapped file would come and go, and end the process where the file does.
    loader.use_mmap = false;
}

#if defined(ALLOCMOE_EXPERT_CACHE)

static bool when_changed(int fd, int64_t changed[2], size_t & size) {
    struct stat found;
    if (fstat(fd, &found) != 0) {
        return false;
    }
#if defined(__APPLE__)
    const auto & at = found.st_mtimespec;
#else
    const auto & at = found.st_mtim;
#endif
    changed[0] = at.tv_sec;
    changed[1] = at.tv_nsec;
    size       = found.st_size;
    return true;
}

// A file of its own for what another one reads: it has its own position, and reads past the page cache.
static int open_again(int fd, bool & direct) {
    direct = false;
#if defined(__linux__) && defined(O_DIRECT)
    const auto path = "/proc/self/fd/" + std::to_string(fd);
    int own         = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
    if (own >= 0) {
        // some file systems open so and cannot read so
        void * block = nullptr;
        direct       = posix_memalign(&block, ALIGNED, ALIGNED) == 0 && pread(own, block, ALIGNED, 0) > 0;
        ::free(block);
        if (direct) {
            return own;
        }
        close(own);
    }
#endif
    int copy = fcntl(fd, F_DUPFD_CLOEXEC, 0);
#if defined(__APPLE__)
    direct = copy >= 0 && fcntl(copy, F_NOCACHE, 1) == 0;
#endif
    return copy;
}

#endif

void allocmoe_expert_cache::open(const llama_model_loader & loader, const llama_model & model) {
    opened = true;
#if defined(ALLOCMOE_EXPERT_CACHE)
    for (auto & of_phase : counts) {
        of_phase.resize(model.hparams.n_layer_all);
    }
    std::map<std::pair<int, int64_t>, group *> found;
    for (const auto & named : model.tensors_by_name) {
        const ggml_tensor * tensor = named.second;
        const auto * weight        = cache_of(tensor) == this ? loader.get_weight(named.first.c_str()) : nullptr;
        int il                     = -1;
        // NOLINTNEXTLINE(cert-err34-c,bugprone-unchecked-string-to-number-conversion): llama.cpp made the name, of a layer that there is
        if (!weight || sscanf(named.first.c_str(), "blk.%d.", &il) != 1) {
            continue;
        }
        group *& experts = found[{ il, tensor->ne[2] }];
        if (!experts) {
            groups.emplace_back();
            experts           = &groups.back();
            experts->il       = il;
            experts->n_expert = tensor->ne[2];
        }
        experts->matrices.emplace_back();
        matrix & m = experts->matrices.back();
        m.data     = [](const allocmoe_experts * self, int64_t expert) {
            const auto & what = *static_cast<const matrix *>(self);
            return what.cache->wait(what, expert);
        };
        m.ready = [](const allocmoe_experts * self, int64_t expert) {
            const auto & what = *static_cast<const matrix *>(self);
            return what.owner->arrived(what, expert).load(std::memory_order_acquire);
        };
        m.cache  = this;
        m.owner  = experts;
        m.tensor = tensor;
        m.file   = weight->idx;
        m.offset = weight->offs;
        m.size   = tensor->nb[2];
        m.at     = experts->slot_size;
        m.number = experts->matrices.size() - 1;
        m.room   = 0;
        for (int64_t e = 0; e < experts->n_expert; ++e) {
            m.room = std::max(m.room, round_up(m.end(e)) - m.begin(e));
        }
        experts->slot_size += m.room;
    }
    if (groups.empty()) {
        throw std::runtime_error("expert cache: the model has no routed experts");
    }

    // The same share of each layer's experts has slots, and one layer's others room beside them.
    const auto needed = [&](const std::vector<int32_t> & n_slots) {
        size_t slots = 0, beside = 0;
        for (size_t i = 0; i < groups.size(); ++i) {
            slots += n_slots[i] * groups[i].slot_size;
            beside = std::max(beside, (groups[i].n_expert - n_slots[i]) * groups[i].slot_size);
        }
        return slots + beside;
    };
    std::vector<int32_t> n_slots(groups.size(), 0);
    if (needed(n_slots) > (size_t) n_arena) {
        throw std::runtime_error(format("expert cache: found %lld bytes, want at least %zu, one layer's experts", (long long) n_arena, needed(n_slots)));
    }
    for (bool more = true; more;) {
        more = false;
        for (size_t i = 0; i < groups.size(); ++i) {
            if (n_slots[i] < groups[i].n_expert) {
                ++n_slots[i];
                const bool fits = needed(n_slots) <= (size_t) n_arena;
                n_slots[i] -= !fits;
                more = more || fits;
            }
        }
    }
    n_mapped = needed(n_slots) + HUGE_PAGE; // and what kernels read behind the last row
    arena    = (char *) mmap(nullptr, n_mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (arena == MAP_FAILED) {
        arena = nullptr;
        throw std::runtime_error(format("expert cache: no memory for %zu bytes", n_mapped));
    }
#if defined(MADV_HUGEPAGE)
    madvise(arena, n_mapped, MADV_HUGEPAGE);
#endif
    char * next = arena;
    for (size_t i = 0; i < groups.size(); ++i) {
        group & experts = groups[i];
        experts.n_slots = n_slots[i];
        experts.base    = next;
        next += n_slots[i] * experts.slot_size;
        experts.slot_of.assign(experts.n_expert, -1);
        experts.expert_in.assign(experts.n_slots, -1);
        experts.last_use.assign(experts.n_expert, 0);
        const size_t n = experts.n_expert * experts.matrices.size();
        experts.here.reset(new std::atomic<bool>[n]);
        for (size_t j = 0; j < n; ++j) {
            experts.here[j] = false;
        }
    }
    staging = next;
    for (const auto & from : loader.files) {
        files.emplace_back();
        file & own = files.back();
        own.fd     = open_again(from->file_id(), own.direct);
        if (own.fd < 0 || !when_changed(own.fd, own.changed, own.size)) {
            throw std::runtime_error(format("expert cache: cannot open the model's file again: %s", strerror(errno)));
        }
    }
    int64_t n_experts = 0, n_kept = 0;
    for (const auto & experts : groups) {
        n_experts += experts.n_expert;
        n_kept += experts.n_slots;
    }
    LLAMA_LOG_INFO("allocmoe: experts stay in the file, %lld of %lld in %.2f GB of memory, read %s\n", (long long) n_kept, (long long) n_experts,
        n_arena / 1e9, files[0].direct ? "directly" : "through the page cache");
#else
    GGML_UNUSED(loader);
    GGML_UNUSED(model);
#endif
}

//
// reading
//

char * allocmoe_expert_cache::slot(const group & experts, int32_t i) const {
    return i < experts.n_slots ? experts.base + i * experts.slot_size : staging + (i - experts.n_slots) * experts.slot_size;
}

void allocmoe_expert_cache::fail(const std::string & what) {
    {
        std::lock_guard<std::mutex> lock(pool->mutex);
        if (!bad) {
            error = what;
        }
        bad = true;
    }
    pool->arrival.notify_all();
}

#if defined(ALLOCMOE_EXPERT_CACHE)

// What is wrong, "" if nothing is: at least `wanted` bytes of up to n have been read.
static std::string read_at(int fd, char * to, size_t n, size_t wanted, size_t offset) {
    size_t done = 0;
    while (done < wanted) {
        const ssize_t got = pread(fd, to + done, n - done, offset + done);
        if (got == 0) {
            return "the model's file is shorter than when it was loaded";
        }
        if (got < 0 && errno != EINTR) {
            return std::string("the model's file cannot be read: ") + strerror(errno);
        }
        const size_t before = done;
        done += std::max<ssize_t>(got, 0);
        if (done < wanted) {
            // a direct read goes on from a block's beginning
            done = round_down(done);
            if (got > 0 && done == before) {
                return "the model's file is shorter than when it was loaded";
            }
        }
    }
    return "";
}

#endif

std::string allocmoe_expert_cache::changed_file() const {
#if defined(ALLOCMOE_EXPERT_CACHE)
    for (const auto & file : files) {
        int64_t changed[2];
        size_t size;
        if (!when_changed(file.fd, changed, size)) {
            return std::string("the model's file cannot be read: ") + strerror(errno);
        }
        if (size != file.size) {
            return size < file.size ? "the model's file is shorter than when it was loaded" : "the model's file has grown since it was loaded";
        }
        if (changed[0] != file.changed[0] || changed[1] != file.changed[1]) {
            return "the model's file has been written to since it was loaded";
        }
    }
#endif
    return "";
}

const char * allocmoe_expert_cache::wait(const matrix & m, int64_t expert) {
    group & experts    = *m.owner;
    const int32_t slot = experts.slot_of[expert];
    if (slot < 0) {
        fail("an expert was used that had not been asked for");
        return arena;
    }
    auto & arrived = experts.arrived(m, expert);
    if (!arrived.load(std::memory_order_acquire)) {
        const auto begin = std::chrono::steady_clock::now();
        {
            std::unique_lock<std::mutex> lock(pool->mutex);
            pool->arrival.wait(lock, [&] { return arrived.load(std::memory_order_acquire) || bad; });
        }
        waited_us += std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() - begin).count();
    }
    return this->slot(experts, slot) + m.at + (m.offset + expert * m.size) % ALIGNED;
}

// Forgets what has not arrived as a whole.
void allocmoe_expert_cache::drop(group & experts) {
    for (int64_t e = 0; e < experts.n_expert; ++e) {
        const bool whole = std::all_of(experts.matrices.begin(), experts.matrices.end(), [&](const matrix & m) { return experts.arrived(m, e).load(); });
        if (experts.slot_of[e] >= 0 && !whole) {
            if (experts.slot_of[e] < experts.n_slots) {
                experts.expert_in[experts.slot_of[e]] = -1;
            }
            experts.slot_of[e] = -1;
        }
    }
}

std::string allocmoe_expert_cache::take_error() {
    if (!bad) {
        return "";
    }
    {
        std::unique_lock<std::mutex> lock(pool->mutex);
        pool->jobs.clear();
        pool->arrival.wait(lock, [&] { return pool->n_reading == 0; });
    }
    for (auto & experts : groups) {
        drop(experts);
    }
    bad = false;
    return std::move(error);
}

// Which experts stay depends on the ids that came before, in their order, and on nothing else.
void allocmoe_expert_cache::ask(request & what, const ggml_tensor * ids) {
#if defined(ALLOCMOE_EXPERT_CACHE)
    if (!pool || pool->process != getpid()) {
        leave(pool);
        pool = std::make_shared<readers>();
        // signals are for the threads that there were before
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        for (int i = 0; i < N_READERS; ++i) {
            pool->threads.emplace_back([this, own = pool.get()] {
                std::unique_lock<std::mutex> lock(own->mutex);
                for (;;) {
                    own->work.wait(lock, [&] { return own->stop || !own->jobs.empty(); });
                    if (own->stop) {
                        return;
                    }
                    const job next = own->jobs.front();
                    own->jobs.pop_front();
                    ++own->n_reading;
                    lock.unlock();
                    const matrix & m  = *next.what;
                    const file & from = files[m.file];
                    const size_t at   = m.begin(next.expert);
                    const size_t n    = round_up(m.end(next.expert)) - at;
                    auto problem      = read_at(from.fd, next.to + m.at, n, m.end(next.expert) - at, at);
#if defined(__linux__)
                    if (!from.direct) {
                        posix_fadvise(from.fd, at, n, POSIX_FADV_DONTNEED);
                    }
#endif
                    lock.lock();
                    --own->n_reading;
                    if (problem.empty()) {
                        m.owner->arrived(m, next.expert).store(true, std::memory_order_release);
                    } else if (!bad) {
                        error = std::move(problem);
                        bad   = true;
                    }
                    own->arrival.notify_all();
                }
            });
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }
    if (!what.experts) {
        return fail(what.obstacle);
    }
    group & experts = *what.experts;
    {
        // of a graph that was not run to its end
        std::unique_lock<std::mutex> lock(pool->mutex);
        pool->arrival.wait(lock, [&] { return (pool->jobs.empty() || bad) && pool->n_reading == 0; });
    }
    if (bad) {
        return;
    }
    if (staged) {
        for (auto & slot : staged->slot_of) {
            slot = slot >= staged->n_slots ? -1 : slot;
        }
        staged = nullptr;
    }

    std::vector<bool> used(experts.n_expert);
    for (int64_t t = 0; t < ids->ne[1]; ++t) {
        // of a token's experts the best counts as used last: where not even those of one token stay, it is they that do
        for (int64_t r = ids->ne[0] - 1; r >= 0; --r) {
            const int32_t id = *(const int32_t *) ((const char *) ids->data + t * ids->nb[1] + r * ids->nb[0]);
            if (id >= 0 && id < experts.n_expert) {
                used[id]             = true;
                experts.last_use[id] = ++experts.clock;
            }
        }
    }
    auto & count = counts[what.phase][experts.il];
    std::vector<int32_t> missing, free;
    for (int32_t e = 0; e < experts.n_expert; ++e) {
        if (used[e] && experts.slot_of[e] < 0) {
            missing.push_back(e);
        }
        count.hits += used[e] && experts.slot_of[e] >= 0;
    }
    if (missing.empty()) {
        return;
    }
    auto changed = changed_file();
    if (!changed.empty()) {
        return fail(changed);
    }
    for (int32_t i = 0; i < experts.n_slots; ++i) {
        if (experts.expert_in[i] < 0 || !used[experts.expert_in[i]]) {
            free.push_back(i);
        }
    }
    // those used last take the places of those used longest ago
    const auto last_use_in = [&](int32_t i) { return experts.expert_in[i] < 0 ? 0 : experts.last_use[experts.expert_in[i]]; };
    std::stable_sort(free.begin(), free.end(), [&](int32_t a, int32_t b) { return last_use_in(a) < last_use_in(b); });
    std::vector<int32_t> by_use = missing;
    std::sort(by_use.begin(), by_use.end(), [&](int32_t a, int32_t b) { return experts.last_use[a] > experts.last_use[b]; });
    for (size_t i = 0; i < by_use.size(); ++i) {
        const int32_t e = by_use[i];
        if (i < free.size()) {
            int32_t & there = experts.expert_in[free[i]];
            if (there >= 0) {
                experts.slot_of[there] = -1;
            }
            there              = e;
            experts.slot_of[e] = free[i];
        } else {
            experts.slot_of[e] = experts.n_slots + i - free.size();
            staged             = &experts;
        }
        for (const auto & m : experts.matrices) {
            experts.arrived(m, e).store(false, std::memory_order_relaxed);
        }
    }
    count.misses += missing.size();
    {
        std::lock_guard<std::mutex> lock(pool->mutex);
        for (matrix * m : what.order) {
            for (int32_t e : missing) {
                pool->jobs.push_back({ m, e, slot(experts, experts.slot_of[e]) });
                count.bytes += round_up(m->end(e)) - m->begin(e);
            }
        }
    }
    pool->work.notify_all();
#else
    GGML_UNUSED(what);
    GGML_UNUSED(ids);
#endif
}

//
// in the graph
//

const allocmoe_expert_cache::group * allocmoe_expert_cache::find(int il) const {
    const auto it = std::find_if(groups.begin(), groups.end(), [il](const group & x) { return x.il == il; });
    return it == groups.end() ? nullptr : &*it;
}

int64_t allocmoe_expert_cache::n_slots(const group & experts) {
    return experts.n_slots;
}

// node: asks for the experts in src[0], the ids; what it computes is of no use
void allocmoe_expert_cache::compute_request(ggml_tensor * dst, int ith, int /* nth */, void * userdata) {
    if (ith == 0) {
        auto & what = *(request *) userdata;
        what.cache->ask(what, dst->src[0]);
    }
}

void allocmoe_expert_cache::add_requests(ggml_context * ctx, ggml_cgraph * gf, int phase, std::deque<request> & requests) {
    std::vector<ggml_tensor *> nodes;
    std::map<ggml_tensor *, request *> asked; // by the first product that it is for
    request * last          = nullptr;
    const ggml_tensor * ids = nullptr;
    ggml_tensor * any_node  = nullptr;
    std::string obstacle;
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        ggml_tensor * node = ggml_graph_node(gf, i);
        nodes.push_back(node);
        for (int s = 0; s < GGML_MAX_SRC; ++s) {
            const ggml_tensor * src = node->src[s];
            if (!src || cache_of(src->view_src ? src->view_src : src) != this) {
                continue;
            }
            any_node       = node;
            group * of     = nullptr;
            matrix * which = nullptr;
            for (auto & experts : groups) {
                for (auto & m : experts.matrices) {
                    if (m.tensor == src) {
                        of    = &experts;
                        which = &m;
                    }
                }
            }
            if (!of || s != 0 || node->op != GGML_OP_MUL_MAT_ID) {
                obstacle = format("%s uses experts in a way that an expert cache cannot serve", node->name);
                continue;
            }
            allocmoe_set_experts(node, which);
            if (last && last->experts == of && ids == node->src[2]) {
                last->order.push_back(which);
                continue;
            }
            const bool again = std::any_of(requests.begin(), requests.end(), [of](const request & x) { return x.experts == of; });
            if (again) {
                obstacle = format("%s comes back to experts of a layer that is over, which an expert cache cannot serve", node->name);
                continue;
            }
            requests.push_back({ this, of, "", phase, { which } });
            last        = &requests.back();
            ids         = node->src[2];
            asked[node] = &requests.back();
        }
    }
    if (!any_node) {
        return;
    }

    allocmoe_clear_graph(ctx, gf);
    const auto add = [&](request * what, ggml_tensor * ids) {
        ggml_tensor * node = ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, &ids, 1, compute_request, 1, what);
        ggml_set_name(node, "allocmoe_experts");
        ggml_build_forward_expand(gf, node);
    };
    if (!obstacle.empty()) {
        requests.push_back({ this, nullptr, obstacle, phase, {} });
        ggml_tensor * none = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 1);
        ggml_set_input(none);
        add(&requests.back(), none);
        return;
    }
    for (ggml_tensor * node : nodes) {
        const auto found = asked.find(node);
        if (found != asked.end()) {
            add(found->second, node->src[2]);
        }
        ggml_build_forward_order(gf, node);
    }
}

//
// what a miss costs
//

void allocmoe_expert_cache::empty() {
    for (auto & experts : groups) {
        std::fill(experts.slot_of.begin(), experts.slot_of.end(), -1);
        std::fill(experts.expert_in.begin(), experts.expert_in.end(), -1);
        std::fill(experts.last_use.begin(), experts.last_use.end(), 0);
        experts.clock = 0;
    }
    staged = nullptr;
    for (auto & of_phase : counts) {
        std::fill(of_phase.begin(), of_phase.end(), allocmoe_cache_counts{});
    }
    waited_us = 0;
}

void allocmoe_expert_cache::find_price(const llama_model & model, int n_threads) {
    if (miss_price > 0.0) {
        return;
    }
    miss_price = 1.0;
    std::vector<std::pair<group *, int64_t>> chosen; // and how many of its experts
    size_t n_bytes = 0;
    for (auto & experts : groups) {
        const int64_t n = std::min<int64_t>(model.hparams.n_expert_used(experts.il), experts.n_slots);
        if (n > 0 && n_bytes < MEASURED) {
            chosen.emplace_back(&experts, n);
            n_bytes += n * experts.slot_size;
        }
    }
    const ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    const std::unique_ptr<ggml_backend, void (*)(ggml_backend_t)> cpu(device ? ggml_backend_dev_init(device, nullptr) : nullptr, ggml_backend_free);
    if (chosen.empty() || !cpu) {
        return;
    }
    void * set_n_threads = ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), "ggml_backend_set_n_threads");
    if (set_n_threads) {
        reinterpret_cast<ggml_backend_set_n_threads_t>(set_n_threads)(cpu.get(), n_threads);
    }

    const size_t n_tensors = 64 + 16 * chosen.size();
    const std::unique_ptr<ggml_context, void (*)(ggml_context *)> ctx(
        ggml_init({ n_tensors * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }), ggml_free);
    ggml_cgraph * gf = ggml_new_graph(ctx.get());
    std::vector<ggml_tensor *> all_ids;
    int64_t n_experts = 0;
    for (const auto & [experts, n] : chosen) {
        ggml_tensor * ids = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, n, 1);
        ggml_set_input(ids);
        all_ids.push_back(ids);
        n_experts += n;
        for (const auto & m : experts->matrices) {
            ggml_tensor * x = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, m.tensor->ne[0], 1, 1);
            ggml_set_input(x);
            ggml_tensor * product = ggml_mul_mat_id(ctx.get(), const_cast<ggml_tensor *>(m.tensor), x, ids);
            if (!ggml_backend_supports_op(cpu.get(), product)) {
                return; // the context's graph is refused for it
            }
            ggml_build_forward_expand(gf, product);
        }
    }
    std::deque<request> requests;
    add_requests(ctx.get(), gf, ALLOCMOE_PHASE_DECODE, requests);
    const std::unique_ptr<ggml_backend_buffer, void (*)(ggml_backend_buffer_t)> memory(
        ggml_backend_alloc_ctx_tensors(ctx.get(), cpu.get()), ggml_backend_buffer_free);
    if (!memory) {
        return;
    }
    ggml_backend_buffer_clear(memory.get(), 0);
    for (const auto & [experts, n] : chosen) {
        memset(slot(*experts, 0), 0, n * experts->slot_size); // fresh pages would be part of the first reading
    }
    const auto run = [&] {
        const auto begin = std::chrono::steady_clock::now();
        ggml_backend_graph_compute(cpu.get(), gf);
        return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count() / n_experts;
    };
    // the shortest times, since others may be at work too; of other experts each time, which no disk remembers
    double cold = 1e9, warm = 1e9;
    const auto begin = std::chrono::steady_clock::now();
    for (int round = 0; round < N_MEASURED; ++round) {
        const auto so_far = std::chrono::steady_clock::now() - begin;
        if (round > 0 && so_far > (round == 1 ? LONG_ENOUGH : MEASURED_FOR)) {
            break;
        }
        for (size_t i = 0; i < chosen.size(); ++i) {
            const auto & [experts, n] = chosen[i];
            std::vector<int32_t> ids(n);
            for (int64_t r = 0; r < n; ++r) {
                ids[r] = (r * experts->n_expert / n + round) % experts->n_expert;
            }
            ggml_backend_tensor_set(all_ids[i], ids.data(), 0, ids.size() * sizeof(int32_t));
        }
        cold         = std::min(cold, run());
        double spent = 0.0;
        for (int i = 0; i < N_MEASURED && (i < 3 || spent < 100.0); ++i) {
            const double ms = run();
            warm            = std::min(warm, ms);
            spent += ms * n_experts;
        }
        if (bad) {
            take_error();
            empty();
            return; // the first token will say so
        }
        empty();
    }
    miss_ms = cold;
    hit_ms  = warm;
    // a power of two, for the same one again from about the same times
    miss_price = std::exp2(std::round(std::log2(std::min(std::max(miss_ms / hit_ms, 1.0), 1e5))));
    LLAMA_LOG_INFO("allocmoe: an expert takes %.3g ms that has to be read, %.3g ms at hand: miss price %g\n", miss_ms, hit_ms, miss_price);
}
