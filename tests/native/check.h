// What the tests of the kernels share: counting checks, opening a random model.
#pragma once
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "edgetune_native.h"
#include "random_model.h"
#include "unit.h"

extern int failures, checks;
extern double worst; // largest share of its bound that any difference came to
extern std::string folder;

// Whether all numbers are within `bound` of those wanted; a line where they are not.
inline void expect(const std::string &what, const float *got, const double *want, size_t count,
                   double bound) {
    checks++;
    for (size_t i = 0; i < count; i++) {
        const double difference = std::fabs(double(got[i]) - want[i]);
        if (difference <= bound) {
            worst = std::max(worst, difference / bound);
            continue;
        }
        if (failures++ < 40)
            std::printf("%s: [%zu of %zu] is %.9g, wanted %.9g within %.3g\n", what.c_str(), i, count,
                        double(got[i]), want[i], bound);
        return;
    }
}

inline void expect(const std::string &what, bool holds) {
    checks++;
    if (!holds && failures++ < 40) std::printf("%s\n", what.c_str());
}

inline double largest(const reference::Numbers &numbers) {
    double high = 1e-9;
    for (double v : numbers) high = std::max(high, std::fabs(v));
    return high;
}

inline std::string written(const RandomModel &model) {
    const std::string path = folder + "/model.data";
    std::FILE *file = std::fopen(path.c_str(), "wb");
    if (!file || std::fwrite(model.data.data(), 1, model.data.size(), file) != model.data.size())
        std::abort();
    std::fclose(file);
    return path;
}

// The kernels that this processor runs, the scalar ones first.
std::vector<const edgetune::Unit *> units();
void test_units(const edgetune::Unit &unit);
void test_models(const edgetune::Unit &unit);
