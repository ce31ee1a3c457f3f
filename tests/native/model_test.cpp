// Whole models through the C interface: every kind of layer, prompts in pieces, several rows at once.
#include <algorithm>

#include "check.h"

namespace {

using Ids = std::vector<int>;

struct Span {
    Ids ids;
    int slot, length;
    const edgetune_adapter *adapter;
};

class Engine {
  public:
    Engine(const RandomModel &random, const std::string &path, int threads, const char *set) {
        char error[400] = "";
        model = edgetune_open(random.plan.data(), random.plan.size(), path.c_str(), threads,
                              random.dense.cache_bits, set, error, sizeof error);
        expect(std::string("a model opens: ") + error, model != nullptr);
        if (!model) std::exit(1);
        edgetune_model_sizes(model, &sizes);
        memory.resize(size_t(2) * sizes.layers * SLOTS * sizes.kv_heads * CAPACITY * sizes.cache_bytes);
    }
    ~Engine() {
        for (auto *adapter : adapters) edgetune_adapter_free(adapter);
        edgetune_close(model);
    }

    const edgetune_adapter *bind(const RandomModel &random, const reference::Loras &loras) {
        adapters.push_back(edgetune_adapter_new(model));
        for (size_t i = 0; i < random.sites.size(); i++) {
            const reference::Lora &lora = loras.sites[i];
            char error[400] = "";
            const int bad = edgetune_adapter_add(adapters.back(), random.sites[i].c_str(), lora.rank,
                                                 lora.a.data(), lora.b.data(), error, sizeof error);
            expect(std::string("an adapter is bound: ") + error, bad == 0);
        }
        return adapters.back();
    }

    // Logits and states of every token of a call.
    bool run(const std::vector<Span> &spans, std::vector<float> &logits, std::vector<float> &states) {
        std::vector<edgetune_span> all;
        std::vector<std::vector<int32_t>> ids;
        std::vector<int32_t> wanted;
        for (const Span &span : spans) ids.emplace_back(span.ids.begin(), span.ids.end());
        for (size_t i = 0; i < spans.size(); i++) {
            all.push_back({ids[i].data(), int(ids[i].size()), spans[i].slot, spans[i].length, spans[i].adapter});
            for (size_t t = 0; t < ids[i].size(); t++) wanted.push_back(int(wanted.size()));
        }
        logits.assign(wanted.size() * size_t(sizes.vocab), NAN);
        states.assign(wanted.size() * size_t(sizes.hidden), NAN);
        const edgetune_cache cache = {memory.data(), SLOTS, CAPACITY};
        char error[400] = "";
        const int bad = edgetune_run(model, &cache, all.data(), int(all.size()), wanted.data(),
                                     int(wanted.size()), logits.data(), states.data(), error, sizeof error);
        expect(std::string("tokens run: ") + error, bad == 0);
        return bad == 0;
    }

    static constexpr int SLOTS = 5, CAPACITY = 320;
    edgetune_sizes sizes;

  private:
    edgetune_model *model;
    std::vector<edgetune_adapter *> adapters;
    std::vector<uint8_t> memory;
};

Ids drawn(RandomModel &random, int vocab, int count) {
    Ids ids;
    for (int i = 0; i < count; i++) ids.push_back(random.below(vocab));
    return ids;
}

struct Row { // one that runs, and what it comes to
    Ids ids;
    const reference::Loras *loras;
    const edgetune_adapter *adapter;
    std::vector<reference::Numbers> states, logits;
    int done = 0;
};

// Rows side by side, each a piece of a size at a time, compared token by token.
void advance(const std::string &what, Engine &engine, std::vector<Row> &rows, const Ids &pieces, double bound) {
    size_t turn = 0;
    while (true) {
        std::vector<Span> spans;
        int total = 0;
        for (size_t r = 0; r < rows.size(); r++) {
            const int left = int(rows[r].ids.size()) - rows[r].done;
            const int piece = std::min({left, pieces[turn++ % pieces.size()], 256 - total});
            if (piece < 1) continue;
            const auto from = rows[r].ids.begin() + rows[r].done;
            spans.push_back({Ids(from, from + piece), int(r), rows[r].done, rows[r].adapter});
            total += piece;
        }
        if (spans.empty()) return;
        std::vector<float> logits, states;
        if (!engine.run(spans, logits, states)) return;
        size_t at = 0;
        for (const Span &span : spans)
            for (size_t t = 0; t < span.ids.size(); t++, at++) {
                Row &row = rows[size_t(span.slot)];
                const size_t place = size_t(row.done++);
                const std::string where = what + ", row " + std::to_string(span.slot) + ", token " + std::to_string(place);
                const size_t hidden = size_t(engine.sizes.hidden), vocab = size_t(engine.sizes.vocab);
                expect(where + ", states", &states[at * hidden], row.states[place].data(), hidden,
                       bound * largest(row.states[place]));
                expect(where + ", logits", &logits[at * vocab], row.logits[place].data(), vocab,
                       bound * (1 + largest(row.logits[place])));
            }
    }
}

void test_model(const edgetune::Unit &unit, const std::string &what, const Options &options, int threads,
                uint32_t seed, double bound) {
    RandomModel random(options, seed);
    Engine engine(random, written(random), threads, unit.kernels->name);
    const int ranks[] = {0, 1, 8, 17};
    std::vector<reference::Loras> loras;
    for (int rank : ranks) loras.push_back(random.loras(rank, rank == 17));
    std::vector<const edgetune_adapter *> bound_ones;
    for (auto &each : loras) bound_ones.push_back(engine.bind(random, each));
    const Ids shared = drawn(random, options.vocab, 40);
    const std::string name = std::string(unit.kernels->name) + ", " + std::to_string(threads) + " threads: " + what;
    std::vector<Row> rows;
    for (int r = 0; r < Engine::SLOTS; r++) { // the last one without an adapter
        Row row{Ids(shared.begin(), shared.begin() + 40 - 7 * r), nullptr, nullptr, {}, {}};
        if (r < 4) row.loras = &loras[size_t(r)], row.adapter = bound_ones[size_t(r)];
        random.dense.run(row.ids, row.loras, row.states, row.logits);
        rows.push_back(row);
    }
    for (const Ids &pieces : {Ids{100}, Ids{1}, Ids{2, 1, 3, 1, 1}, Ids{17, 5, 33}}) {
        for (Row &row : rows) row.done = 0;
        advance(name + ", mixed rows in pieces of " + std::to_string(pieces[0]), engine, rows, pieces, bound);
        std::vector<Row> one(1, rows[2]);
        one[0].done = 0;
        advance(name + ", alone in pieces of " + std::to_string(pieces[0]), engine, one, pieces, bound);
    }
}

// A context of 300 tokens: as a prompt, and grown token by token behind one.
void test_context(const edgetune::Unit &unit, Options options, int threads, uint32_t seed, double bound) {
    options.layers = 2, options.hidden = 16, options.middle = 16;
    RandomModel random(options, seed);
    Engine engine(random, written(random), threads, unit.kernels->name);
    std::vector<Row> rows(1, Row{drawn(random, options.vocab, 300), nullptr, nullptr, {}, {}});
    random.dense.run(rows[0].ids, nullptr, rows[0].states, rows[0].logits);
    for (const Ids &pieces : {Ids{256}, Ids{130, 16, 1, 2, 15}, Ids{1}}) {
        if (pieces[0] == 1 && threads > 2) break; // more threads than cores: each step waits long
        rows[0].done = 0;
        advance(std::string(unit.kernels->name) + ", " + std::to_string(threads) + " threads, context of 300, groups of " +
                    std::to_string(options.heads / options.kv_heads),
                engine, rows, pieces, bound);
    }
}

} // namespace

void test_models(const edgetune::Unit &unit) {
    uint32_t seed = 100;
    const double close = 1e-3; // keys and values differ by a rounding to half precision here and there
    auto variant = [&](const char *what, double bound, auto change) {
        Options o;
        change(o);
        test_model(unit, what, o, int(seed % 4) + 1, seed, bound);
        seed++;
    };
    variant("plain", close, [](Options &) {});
    variant("layer norms with biases", close, [](Options &o) { o.layer_norm = o.norm_bias = o.bias = true; });
    variant("query and key norms", close, [](Options &o) { o.head_norms = true; });
    variant("norms behind branches, soft caps", close, [](Options &o) {
        o.after_norms = true, o.softcap = 2, o.logits_softcap = 3, o.multiplier = 1.5, o.vocab = 53;
        o.activation = "gelu_tanh";
    });
    variant("several rotaries, windows", close, [](Options &o) { o.rotaries = {16, 8}, o.window = 9, o.layers = 4; });
    variant("odd halves, partly turned", close, [](Options &o) { o.head_dim = 22, o.rotaries = {22, 6, 10}, o.layers = 3; });
    variant("no rotary", close, [](Options &o) { o.rotaries.clear(), o.activation = "gelu"; });
    variant("inline", close, [](Options &o) { o.inlined = o.bias = true, o.layers = 1; });
    variant("odd widths", close, [](Options &o) { o.hidden = 37, o.middle = 45, o.head_dim = 10, o.rotaries = {10}, o.vocab = 31; });
    // A number near a tie may be rounded the other way than in double: a 127th of one number.
    for (int bits : {4, 8})
        for (int kind = 0; kind < 3; kind++)
            variant((std::to_string(bits) + " bits, kind " + std::to_string(kind)).c_str(), 0.03, [&](Options &o) {
                o.bits = o.embedding_bits = bits, o.zeros = kind == 1, o.means = kind == 2;
                o.hidden = o.middle = kind == 2 ? 64 : 72;
            });
    // A cache in 8 bits: a key or value near a tie may be rounded the other way.
    variant("cache in 8 bits", 0.03, [](Options &o) { o.cache_bits = 8; });
    variant("cache in 8 bits, soft caps, windows", 0.03, [](Options &o) {
        o.cache_bits = 8, o.softcap = 2, o.window = 9, o.layers = 3, o.head_norms = true;
    });
    variant("cache in 8 bits, odd widths", 0.03, [](Options &o) {
        o.cache_bits = 8, o.head_dim = 22, o.rotaries = {22}, o.heads = 3, o.kv_heads = 1;
    });
    const int groups[][2] = {{2, 2}, {3, 1}, {8, 2}, {7, 1}};
    for (int threads = 1; threads <= 4; threads++) {
        Options o;
        o.heads = groups[threads - 1][0], o.kv_heads = groups[threads - 1][1];
        if (threads > 2) o.window = 40 * threads, o.softcap = 4;
        test_context(unit, o, threads, seed++, 1e-3);
        o.cache_bits = 8;
        test_context(unit, o, threads, seed++, 0.03);
    }
}
