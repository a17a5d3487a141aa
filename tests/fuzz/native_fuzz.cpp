// libFuzzer's target (make fuzz): what the library reads of a file that is a stranger's, and what it makes of a budget that is
// a request's. An input is a GGUF file, and at its end the numbers and the name that are asked for.
#include "allocmoe-file.h"
#include "allocmoe.h"

#include "llama-model.h"
#include "llama.h"

#include "gguf.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

// of ALLOCMOE_FUZZ_MODEL: whose layers and experts the files are to be for
static const llama_model * model = nullptr;

struct wish {
    int64_t total;
    int8_t rule;
    int8_t strict;
    char name[10];
};

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    model = llama_model_load_from_file(getenv("ALLOCMOE_FUZZ_MODEL"), llama_model_default_params());
    if (!model) {
        fprintf(stderr, "ALLOCMOE_FUZZ_MODEL names no model\n");
        exit(1);
    }
    return 0;
}

// Every error that is meant for a user is this one.
template <class F>
static void allowed_to_fail(F && f) {
    try {
        f();
    } catch (const allocmoe_error &) {
    }
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    wish wanted;
    if (size < sizeof(wanted) + 1) {
        return 0;
    }
    size -= sizeof(wanted);
    memcpy(&wanted, data + size, sizeof(wanted));

    const std::unique_ptr<FILE, decltype(&fclose)> file(fmemopen((void *) data, size, "rb"), fclose);
    const std::unique_ptr<gguf_context, decltype(&gguf_free)> meta(gguf_init_from_file_ptr(file.get(), { true, nullptr }), gguf_free);
    std::unique_ptr<allocmoe_model> found;
    if (meta) {
        allowed_to_fail([&] { found = allocmoe_read_file(meta.get(), model->hparams); });
    }
    const std::string name(wanted.name, strnlen(wanted.name, sizeof(wanted.name)));
    for (const int64_t total : { wanted.total, wanted.total % 64, (int64_t) ALLOCMOE_TOTAL_OF_FILE }) {
        allowed_to_fail([&] {
            const auto plan = allocmoe_plan_budget(found.get(), *model, total, wanted.rule, wanted.strict);
            if (plan && (plan->expert_used_count.size() != model->hparams.n_layer_all || allocmoe_token_rule_out_of_range(*plan) ||
                            allocmoe_out_of_range(model->hparams, plan->expert_used_count))) {
                abort(); // one that a context would not take
            }
        });
    }
    allowed_to_fail([&] { allocmoe_preset_total(name, found.get(), *model, wanted.rule % 4); });
    if (found && found->has_estimator) {
        allowed_to_fail([&] { found->estimates(*model); });
    }
    return 0;
}
