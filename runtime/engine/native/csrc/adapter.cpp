#include "adapter.h"

#include <cmath>
#include <stdexcept>

#include "half.h"

namespace edgetune {

namespace {

// The power of two that brings the largest number to 128 to 256; 1 where all are zero.
float unit_of(const float *numbers, size_t count, const std::string &site) {
    float high = 0;
    for (size_t i = 0; i < count; i++) {
        if (!std::isfinite(numbers[i]))
            throw std::runtime_error("the adapter has a number at " + site + " that is not finite");
        high = std::fmax(high, std::fabs(numbers[i]));
    }
    int exponent = 0;
    if (!(high > 0)) return 1;
    std::frexp(high, &exponent);
    return std::ldexp(1.0f, exponent - 8);
}

} // namespace

OpenAdapter::OpenAdapter(const OpenModel &model)
    : open(model), sites(model.sites.size()) {
    adapter.sites = sites.data();
}

void OpenAdapter::add(const std::string &name, int rank, const float *a, const float *b) {
    size_t at = 0;
    while (at < open.sites.size() && open.sites[at].name != name) at++;
    if (at == open.sites.size()) throw std::runtime_error("the model has no site " + name);
    if (rank < 0 || rank > MOST_RANKS)
        throw std::runtime_error("a rank of " + std::to_string(rank) + " at " + name +
                                 ", expected at most " + std::to_string(MOST_RANKS));
    SiteAdapter &site = sites[at];
    site = SiteAdapter();
    if (!rank) return;
    const Matrix &m = *open.sites[at].matrix;
    const int line = round_up(m.inputs, LANES);
    const float unit_a = unit_of(a, size_t(m.inputs) * rank, name);
    const float unit_b = unit_of(b, size_t(m.outputs) * rank, name);
    const size_t a_size = size_t(rank) * line;
    halves.emplace_back(new uint16_t[a_size]());
    uint16_t *to_a = halves.back().get();
    for (int first = 0, side; first < rank; first += side) { // ranks that lie side by side
        side = rank - first >= 8 ? 8 : rank - first >= 4 ? 4 : 1;
        uint16_t *to = to_a + size_t(first) * line;
        for (int64_t k = 0; k < m.inputs; k++)
            for (int j = 0; j < side; j++)
                to[(k / LANES * side + j) * LANES + k % LANES] =
                    float_to_half(a[k * rank + first + j] / unit_a);
    }
    auto value = [&](int group, int j, int lane) {
        const int32_t row = m.rows[group * LANES + lane];
        return row < 0 ? 0.0f : b[int64_t(j) * m.outputs + row];
    };
    ranges.emplace_back(new Ranks[size_t(m.groups)]);
    Ranks *ranks = ranges.back().get();
    int32_t b_size = 0;
    for (int group = 0; group < m.groups; group++) {
        Ranks &own = ranks[group] = {b_size, 0, 0};
        for (int j = 0; j < rank; j++)
            for (int lane = 0; lane < LANES; lane++)
                if (value(group, j, lane) != 0) {
                    if (!own.last) own.first = int16_t(j);
                    own.last = int16_t(j + 1);
                }
        b_size += (own.last - own.first) * LANES;
    }
    halves.emplace_back(new uint16_t[size_t(b_size)]());
    uint16_t *to_b = halves.back().get();
    for (int group = 0; group < m.groups; group++)
        for (int j = ranks[group].first; j < ranks[group].last; j++)
            for (int lane = 0; lane < LANES; lane++)
                to_b[ranks[group].at + (j - ranks[group].first) * LANES + lane] =
                    float_to_half(value(group, j, lane) / unit_b);
    site.rank = rank;
    site.multiplier = unit_a * unit_b;
    site.a = to_a;
    site.b = to_b;
    site.ranks = ranks;
    bytes += (a_size + size_t(b_size)) * 2 + size_t(m.groups) * sizeof(Ranks);
}

} // namespace edgetune
