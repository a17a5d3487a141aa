// For a process of its own: a projector's file that would crash llama.cpp crashes this process.
#include "mtmd.h"

// Builds the projector's graphs, and leaves its weights in the file. What throws or asserts is refused wherever it is loaded, so
// nothing is returned.
extern "C" MTMD_API void allocmoe_try_projector(const char * path) {
    auto params    = mtmd_context_params_default();
    params.use_gpu = false;
    mtmd_get_memory_usage(path, params);
}
