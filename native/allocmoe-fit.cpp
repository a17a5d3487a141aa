// llama.cpp's choice of what goes on the GPU, which its programs make (--fit). In builds for GPUs alone.
#include "allocmoe.h"
#include "allocmoe-api.h"

#include "fit.h" // llama.cpp's common/
#include "json.h"
#include "log.h"

#include "ggml-backend.h"

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

static thread_local std::string last_said; // warning or error of llama.cpp's

int32_t allocmoe_fit(const char * path, llama_model_params * params, const llama_context_params * context_params, float * tensor_split,
    llama_model_tensor_buft_override * overrides, uint64_t margin) {
    return allocmoe_guarded([&] {
        // only what has its default is chosen
        auto context         = *context_params;
        params->n_gpu_layers = llama_model_default_params().n_gpu_layers;
        last_said            = "llama.cpp found no part of the model that fits";
        std::vector<size_t> margins(llama_max_devices(), margin);
        // a context of 0 tokens is as long as the model allows, and stays so
        const auto status = common_fit_params(
            path, params, &context, tensor_split, overrides, margins.data(), UINT32_MAX, nullptr, GGML_LOG_LEVEL_ERROR);
        if (status != COMMON_PARAMS_FIT_STATUS_SUCCESS) {
            return allocmoe_fail(ALLOCMOE_ERR_MEMORY, last_said.c_str());
        }
        return int32_t(ALLOCMOE_OK);
    });
}

//
// what common/fit.cpp logs, to the logger of llama.cpp's library: common/log.cpp would start a thread of its own for it
//

int common_log_get_verbosity_thold() {
    return LOG_LEVEL_WARN;
}

common_log * common_log_main() {
    return nullptr;
}

void common_log_add(common_log *, ggml_log_level level, const char * format, ...) {
    char text[1024];
    va_list args;
    va_start(args, format);
    (void) vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    if (level == GGML_LOG_LEVEL_WARN || level == GGML_LOG_LEVEL_ERROR) {
        last_said.assign(text, std::string(text).find_last_not_of('\n') + 1);
    }
    ggml_log_callback callback;
    void * data;
    llama_log_get(&callback, &data);
    callback(level, text, data);
}

bool common_log_get_jsonl() {
    return false;
}

void common_log_add_json(common_log *, const char *, const common_json &) {}
