// What allocmoe-server*.cpp share.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

// What the loaded model can serve. Made when it is loaded, and never changed: requests are read in several threads.
struct allocmoe_served {
    int32_t n_layer      = 0;
    int32_t n_moe_layers = 0;
    std::vector<int32_t> full; // [n_layer], the model's own experts per token
    int64_t total_full    = 0; // 0: a model without experts
    int64_t total_default = 0; // what requests have that do not say
    std::string rule;
    bool strict = false;
    std::string obstacle; // why there is no choice, "" if there is one
    int64_t least   = 0;
    int64_t fast    = 0;
    int64_t of_file = 0;
    int64_t floor   = 0; // of the budget that the load decides; 0 where it does not

    static std::shared_ptr<const allocmoe_served> now();
};
