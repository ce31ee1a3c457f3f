// Damaged plans and data files through edgetune_open: `fuzz FOLDER FIRST COUNT` for COUNT seeds from
// FIRST on. What opens all the same runs some tokens, too. Ends with 0 where nothing crashes.
#include <algorithm>
#include <cstring>
#include <limits>

#include "check.h"

int failures = 0, checks = 0;
double worst = 0;
std::string folder;

namespace {

// Another number, text or kind of value somewhere in a plan, or other bytes.
void damage(std::string &plan, std::mt19937 &random) {
    static const char *values[] = {"0", "-1", "1", "15", "16", "17", "33", "255", "65536", "16777216",
                                   "2147483648", "1e18", "1e308", "-1e308", "0.5", "1e999", "null", "true",
                                   "\"\"", "\"silu\"", "[]", "{}", "[[[[[[[[[[[[[[[[[[[[]", "\"\\u0000\""};
    const size_t ways = random() % 8;
    if (ways == 0) {
        plan.resize(random() % plan.size());
    } else if (ways == 1) {
        plan[random() % plan.size()] = char(random());
    } else if (ways == 2) { // a piece of it twice, or out
        const size_t from = random() % plan.size(), count = std::min(plan.size() - from, size_t(random() % 200));
        if (random() % 2) plan.insert(random() % plan.size(), plan.substr(from, count));
        else plan.erase(from, count);
    } else {
        std::vector<size_t> places; // of values
        for (size_t i = 0; i + 1 < plan.size(); i++)
            if (plan[i] == ':') places.push_back(i + 1);
        const size_t at = places[random() % places.size()];
        const size_t end = plan.find_first_of(plan[at] == '{' ? "}" : plan[at] == '[' ? "]" : ",}]", at);
        const bool nested = plan[at] == '{' || plan[at] == '[';
        plan.replace(at, end - at + (nested ? 1 : 0), values[random() % (sizeof values / sizeof *values)]);
    }
}

void damage(std::vector<uint8_t> &data, std::mt19937 &random) {
    if (random() % 2) data.resize(random() % data.size());
    for (int i = 0; i < 20 && !data.empty(); i++) data[random() % data.size()] = uint8_t(random());
}

// Whether it opened.
bool open_and_run(const std::string &plan, const std::string &path, int threads) {
    char error[300] = "";
    edgetune_model *model =
        edgetune_open(plan.data(), plan.size(), path.c_str(), threads, threads % 2 ? 16 : 8, nullptr, error, sizeof error);
    expect("an error is one line", model || (*error && !std::strchr(error, '\n')));
    if (!model) return false;
    edgetune_sizes sizes;
    edgetune_model_sizes(model, &sizes);
    const int64_t capacity = 32;
    const int64_t bytes = int64_t(2) * sizes.layers * sizes.kv_heads * capacity * sizes.cache_bytes;
    std::vector<uint8_t> memory(static_cast<size_t>(bytes));
    const edgetune_cache cache = {memory.data(), 1, capacity};
    const int32_t ids[] = {0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2, 1, 0, 1}, wanted[] = {0};
    std::vector<float> logits(static_cast<size_t>(sizes.vocab)), states(static_cast<size_t>(sizes.hidden));
    for (int count : {1, 2, 18}) {
        const edgetune_span span = {ids, count, 0, 0, nullptr};
        edgetune_run(model, &cache, &span, 1, wanted, 1, logits.data(), states.data(), error, sizeof error);
    }
    edgetune_close(model);
    return true;
}

} // namespace

int main(int, char **arguments) {
    folder = arguments[1];
    const uint32_t first = uint32_t(std::atol(arguments[2])), count = uint32_t(std::atol(arguments[3]));
    int opened = 0;
    for (uint32_t seed = first; seed < first + count; seed++) {
        std::mt19937 random(seed);
        Options o;
        o.hidden = o.middle = 32, o.vocab = 20, o.positions = 32, o.layers = 1 + int(random() % 2);
        o.heads = 2, o.kv_heads = 1;
        o.bits = o.embedding_bits = seed % 3 == 0 ? 0 : seed % 3 == 1 ? 4 : 8;
        o.zeros = random() % 2, o.bias = random() % 2, o.means = random() % 2;
        o.head_norms = random() % 2, o.inlined = random() % 4 == 0;
        RandomModel model(o, seed);
        if (random() % 4) damage(model.plan, random);
        else damage(model.data, random);
        opened += open_and_run(model.plan, written(model), 1 + int(seed % 2));
    }
    std::printf("plans %u from seed %u: %d opened, the others were refused\n", count, first, opened);
    return failures ? 1 : 0;
}
