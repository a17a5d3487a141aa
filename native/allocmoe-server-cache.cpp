// The text that llama.cpp's server keeps: which request may go on from it, and what goes with it where it is moved.
#include "allocmoe-server-model.h"
#include "allocmoe-server.h"

#include "allocmoe.h"

#include "llama.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <system_error>

bool allocmoe_server_reusable(const allocmoe_origin & origin, const allocmoe_request & request) {
    return request.any_cache || origin.total == request.total;
}

void allocmoe_server_begin(allocmoe_origin & origin, const allocmoe_request & request, int32_t n_cached) {
    origin.total = n_cached == 0 || origin.total == request.total ? request.total : allocmoe_origin::MIXED;
}

void allocmoe_server_take(llama_context * ctx, int32_t seq_id, int32_t n_tokens, allocmoe_origin & origin) {
    const auto model = allocmoe_served::now();
    const size_t n   = (size_t) allocmoe_n_layer(ctx) * std::max(n_tokens, 0);
    origin.left.assign(model->strict ? n : 0, 0.0f);
    origin.ran.assign(n * allocmoe_ran_size(ctx), 0);
    if (!origin.left.empty()) {
        allocmoe_get_left_seq(ctx, seq_id, origin.left.data(), n_tokens);
    }
    if (!origin.ran.empty()) {
        allocmoe_get_ran_seq(ctx, seq_id, origin.ran.data(), n_tokens);
    }
}

void allocmoe_server_put(llama_context * ctx, int32_t seq_id, allocmoe_origin & origin) {
    const auto model = allocmoe_served::now();
    if (model->strict && !origin.left.empty()) {
        allocmoe_set_left_seq(ctx, seq_id, origin.left.data(), origin.left.size() / model->n_layer);
    }
    if (!origin.ran.empty()) {
        allocmoe_set_ran_seq(ctx, seq_id, origin.ran.data(), origin.ran.size() / allocmoe_n_layer(ctx) / allocmoe_ran_size(ctx));
    }
    origin.left = {};
    origin.ran  = {};
}

void allocmoe_server_copy(llama_context * ctx, int32_t from, int32_t to, int32_t n_tokens) {
    allocmoe_origin origin;
    allocmoe_server_take(ctx, from, n_tokens, origin);
    allocmoe_server_put(ctx, to, origin);
}

void allocmoe_server_shift(llama_context * ctx, int32_t seq_id, int32_t first, int32_t last, int32_t by) {
    allocmoe_origin origin;
    const int32_t n_tokens = std::max(last, last + by);
    allocmoe_server_take(ctx, seq_id, n_tokens, origin);
    const auto move = [&](auto & values, size_t size) {
        for (size_t row = 0; row < values.size(); row += n_tokens * size) {
            const std::vector moved(values.begin() + row + first * size, values.begin() + row + last * size);
            std::copy(moved.begin(), moved.end(), values.begin() + row + (first + by) * size);
        }
    };
    move(origin.left, 1);
    move(origin.ran, allocmoe_ran_size(ctx));
    allocmoe_server_put(ctx, seq_id, origin);
}

// What stands beside a file with a slot's memory, before its `left` and `ran`.
struct allocmoe_slot_header {
    char magic[8];
    int64_t total;
    int64_t n_left;
};
static constexpr char SLOT_MAGIC[8] = { 'a', 'l', 'l', 'o', 'c', 'm', 'o', '1' };

static std::string beside(const std::string & path) {
    return path + ".budget";
}

// Whether it could be written in full.
static bool write(llama_context * ctx, int32_t seq_id, int32_t n_tokens, const allocmoe_origin & origin, const std::string & path) {
    allocmoe_origin copy = origin;
    allocmoe_server_take(ctx, seq_id, n_tokens, copy);
    allocmoe_slot_header header = { {}, copy.total, (int64_t) copy.left.size() };
    std::copy_n(SLOT_MAGIC, sizeof(SLOT_MAGIC), header.magic);
    std::ofstream file(path, std::ios::binary);
    file.write((const char *) &header, sizeof(header));
    file.write((const char *) copy.left.data(), copy.left.size() * sizeof(float));
    file.write((const char *) copy.ran.data(), copy.ran.size() * sizeof(int16_t));
    return (bool) file.flush();
}

size_t allocmoe_server_save(llama_context * ctx, const char * path, int32_t seq_id, const llama_token * tokens, size_t n, int32_t n_tokens, const allocmoe_origin & origin) {
    namespace fs           = std::filesystem;
    const bool has_budget  = allocmoe_served::now()->obstacle.empty();
    const std::string part = std::string(path) + ".part";
    size_t n_bytes         = llama_state_seq_save_file(ctx, part.c_str(), seq_id, tokens, n);
    std::error_code error; // of a name that is not there, too
    // what llama.cpp's stream still held when it was closed is not in what it returns
    if (fs::file_size(part, error) != n_bytes || (has_budget && !write(ctx, seq_id, n_tokens, origin, beside(part)))) {
        n_bytes = 0;
    }
    if (n_bytes > 0) {
        fs::remove(beside(path), error); // between the two the text counts as computed at an unknown budget
        fs::rename(part, path, error);
        n_bytes = error ? 0 : n_bytes;
    }
    if (n_bytes > 0 && has_budget) {
        fs::rename(beside(part), beside(path), error);
    }
    fs::remove(part, error);
    fs::remove(beside(part), error);
    return n_bytes;
}

void allocmoe_server_read(llama_context * ctx, int32_t seq_id, int32_t n_tokens, allocmoe_origin & origin, const std::string & path) {
    const auto model = allocmoe_served::now();
    origin           = {};
    allocmoe_set_ran_seq(ctx, seq_id, nullptr, n_tokens); // that of the slot's text before
    if (!model->obstacle.empty()) {
        return;
    }
    origin.total = allocmoe_origin::MIXED;
    allocmoe_slot_header header;
    std::ifstream file(beside(path), std::ios::binary);
    const int64_t n_left = model->strict ? (int64_t) model->n_layer * n_tokens : 0;
    if (!file.read((char *) &header, sizeof(header)) || !std::equal(SLOT_MAGIC, SLOT_MAGIC + sizeof(SLOT_MAGIC), header.magic) || header.n_left != n_left) {
        return;
    }
    origin.left.resize(n_left);
    if (file.read((char *) origin.left.data(), n_left * sizeof(float))) {
        origin.total = header.total;
        // a server without an expert cache has written none
        origin.ran.resize((size_t) allocmoe_n_layer(ctx) * n_tokens * allocmoe_ran_size(ctx));
        if (!file.read((char *) origin.ran.data(), origin.ran.size() * sizeof(int16_t))) {
            origin.ran = {};
        }
        allocmoe_server_put(ctx, seq_id, origin);
    }
    origin.left = {};
}
