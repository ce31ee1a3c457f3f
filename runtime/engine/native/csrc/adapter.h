// Adapters in half precision, as the products add them.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "bundle.h"

namespace edgetune {

struct OpenAdapter {
    explicit OpenAdapter(const OpenModel &model);
    // Throws std::runtime_error for an unknown site, a rank out of range, numbers that are not finite.
    void add(const std::string &site, int rank, const float *a, const float *b);

    const OpenModel &open;
    Adapter adapter;
    size_t bytes = 0;

  private:
    std::vector<SiteAdapter> sites;
    std::vector<std::unique_ptr<uint16_t[]>> halves;
    std::vector<std::unique_ptr<Ranks[]>> ranges;
};

} // namespace edgetune
