// The native engine's kernels against plain double precision: each instruction set that this
// processor has. `kernel_test FOLDER` writes its models into FOLDER and ends with 0 if all hold.
#include <cstring>

#include "bundle.h"
#include "check.h"

int failures = 0, checks = 0;
double worst = 0;
std::string folder;

using namespace edgetune;

std::vector<const Unit *> units() {
    std::vector<const Unit *> found = {&UNIT_scalar};
    const std::string sets = std::string(" ") + edgetune_instruction_sets() + " ";
#if defined(__x86_64__)
    for (const Unit *unit : {&UNIT_avx2, &UNIT_avx512})
#else
    for (const Unit *unit : {&UNIT_neon})
#endif
        if (sets.find(std::string(" ") + unit->kernels->name + " ") != std::string::npos)
            found.push_back(unit);
    return found;
}

static void test_halves(const Unit &unit) {
    float floats[16];
    uint16_t halves[16];
    bool same = true;
    for (uint32_t first = 0; first < 65536; first += 16) {
        for (uint32_t i = 0; i < 16; i++) halves[i] = uint16_t(first + i);
        unit.from_halves(halves, floats);
        for (uint32_t i = 0; i < 16; i++) {
            const double want = reference::half_value(halves[i]);
            same &= std::isnan(want) ? std::isnan(floats[i])
                                     : want == floats[i] && std::signbit(want) == std::signbit(floats[i]);
        }
        uint16_t back[16];
        unit.to_halves(floats, back);
        for (int i = 0; i < 16; i++)
            if (!std::isnan(floats[i])) same &= back[i] == halves[i];
    }
    expect(std::string(unit.kernels->name) + ": every half is read and written back", same);
    std::mt19937 random(7);
    same = true;
    for (int round = 0; round < 20000; round++) {
        for (float &f : floats) {
            uint32_t bits = random();
            if (round % 2) bits = (bits & 0x80FFFFFF) | (100 + bits % 48) << 23; // near halves
            std::memcpy(&f, &bits, 4);
            if (std::isnan(f)) f = 65519.99f;
        }
        unit.to_halves(floats, halves);
        for (int i = 0; i < 16; i++)
            same &= reference::half_value(halves[i]) == reference::as_half(floats[i]);
    }
    expect(std::string(unit.kernels->name) + ": floats become the nearest halves, ties to even", same);
}

static void test_activations(const Unit &unit) {
    const char *names[] = {"silu", "gelu", "gelu_tanh"};
    std::mt19937 random(3);
    for (int kind = 0; kind < 3; kind++)
        for (int round = 0; round < 2000; round++) {
            float x[16], y[16];
            double want[16];
            const double reach = round % 4 == 0 ? 1000 : round % 4 == 1 ? 100 : round % 4 == 2 ? 6 : 0.01;
            for (float &v : x) v = float(std::uniform_real_distribution<double>(-reach, reach)(random));
            if (round == 0) x[0] = 0;
            unit.activate(Activation(kind), x, y);
            for (int i = 0; i < 16; i++) want[i] = reference::activated(names[kind], x[i]);
            expect(std::string(unit.kernels->name) + ": " + names[kind] + " up to " + std::to_string(reach),
                   y, want, 16, 3e-7 * (1 + reach));
        }
}

static void test_norms(const Unit &unit) {
    std::mt19937 random(5);
    std::normal_distribution<float> normal(0.3f, 2);
    for (int width = 1; width <= 130; width++)
        for (int kind = 0; kind < 4; kind++) {
            const size_t line = size_t(round_up(width, LANES));
            std::vector<float> x(line), weight(line), bias(line), y(line);
            reference::Normed plain;
            plain.layer = kind & 1;
            plain.epsilon = 1e-5;
            reference::Numbers numbers;
            for (size_t i = 0; i < size_t(width); i++) {
                x[i] = normal(random), weight[i] = normal(random), bias[i] = normal(random);
                numbers.push_back(x[i]), plain.weight.push_back(weight[i]);
                if (kind & 2) plain.bias.push_back(bias[i]);
            }
            Norm norm;
            norm.present = true, norm.layer = plain.layer, norm.epsilon = 1e-5f;
            norm.weight = weight.data(), norm.bias = kind & 2 ? bias.data() : nullptr;
            unit.normalise(norm, x.data(), width, y.data());
            const reference::Numbers want = plain.of(numbers);
            expect(std::string(unit.kernels->name) + ": norm " + std::to_string(kind) + " of width " +
                       std::to_string(width),
                   y.data(), want.data(), want.size(), 1e-5 * largest(want));
        }
}

static void test_rotary(const Unit &unit) {
    std::mt19937 random(9);
    std::normal_distribution<float> normal(0, 1);
    for (int half = 1; half <= 40; half++) {
        reference::Turn turn;
        turn.width = 2 * half;
        std::vector<float> x(96);
        for (int i = 0; i < 3 * half; i++) {
            turn.cos.push_back(normal(random));
            turn.sin.push_back(normal(random));
        }
        for (float &v : x) v = normal(random);
        Rotary rotary;
        rotary.width = turn.width, rotary.cos = turn.cos.data(), rotary.sin = turn.sin.data();
        for (int position = 0; position < 3; position++) {
            reference::Numbers want(x.begin(), x.end());
            turn.turn(want.data(), position);
            std::vector<float> y = x;
            unit.rotate(rotary, position, y.data());
            expect(std::string(unit.kernels->name) + ": rotary of width " + std::to_string(2 * half),
                   y.data(), want.data(), want.size(), 2e-6 * largest(want));
        }
    }
}

// Every matrix of a random model, for some counts of tokens, with and without an adapter.
static void test_products(const Unit &unit, const Options &options, const std::vector<int> &counts,
                          int threads, uint32_t seed) {
    RandomModel random(options, seed);
    const std::string path = written(random);
    std::unique_ptr<OpenModel> open =
        open_model(random.plan.data(), random.plan.size(), path, threads, unit.kernels);
    const reference::DenseLayer &layer = random.dense.layers[0];
    const std::vector<Matrix *> all = matrices(*open);
    const reference::Dense *plain[] = {&layer.qkv, &layer.attention_out, &layer.gate_up, &layer.down,
                                       &random.dense.head};
    const Matrix *packed[] = {all[0], all[1], all[2], all[3], all.back()};
    const std::string what = std::string(unit.kernels->name) + ": " + std::to_string(options.bits) +
                             " bits, blocks of " + std::to_string(options.block) +
                             (options.zeros ? ", zeros" : "") + (options.means ? ", means" : "");
    for (int which = 0; which < 5; which++) {
        const Matrix &m = *packed[which];
        const bool head = which == 4;
        for (int count : counts) {
            const int line = open->model.z_line, out_line = head ? m.outputs : m.width();
            std::vector<float> z(size_t(count) * line), out(size_t(count) * out_line + 1, -7);
            std::vector<reference::Numbers> x;
            for (int t = 0; t < count; t++) {
                x.emplace_back();
                for (int i = 0; i < m.inputs; i++) {
                    z[size_t(t) * line + i] = float(t == 1 ? 0 : 3 * random.uniform()); // one all zeros
                    x[size_t(t)].push_back(z[size_t(t) * line + i]);
                }
            }
            const std::vector<Token> tokens(size_t(count), Token{0, 0, 0, 0, nullptr});
            unit.multiply(open->model, m, z.data(), line, count, tokens.data(), SILU, out.data(),
                          out_line, head ? m.outputs : 0);
            for (int t = 0; t < count; t += count > 20 ? 37 : 1) {
                reference::Numbers want = plain[which]->times(x[size_t(t)], nullptr);
                std::vector<float> got;
                if (m.gated) {
                    const int middle = m.outputs / 2;
                    for (int i = 0; i < middle; i++)
                        want[size_t(i)] = reference::activated("silu", want[size_t(i)]) * want[size_t(middle + i)];
                    want.resize(size_t(middle));
                    got.assign(out.begin() + int64_t(t) * out_line, out.begin() + int64_t(t) * out_line + middle);
                } else if (head) {
                    got.assign(out.begin() + int64_t(t) * out_line, out.begin() + int64_t(t + 1) * out_line);
                } else {
                    got.assign(size_t(m.outputs), NAN);
                    for (int i = 0; i < m.width(); i++)
                        if (m.rows[i] >= 0) got[size_t(m.rows[i])] = out[size_t(t) * out_line + i];
                }
                const double bound = options.means ? 2e-3 : 2e-5; // a mean's column is rounded to a half
                expect(what + ", matrix " + std::to_string(which) + ", " + std::to_string(count) + " tokens",
                       got.data(), want.data(), want.size(), bound * (largest(want) + 1));
            }
            expect(what + ": nothing is written beyond the end", out.back() == -7);
        }
    }
}

void test_units(const Unit &unit) {
    test_halves(unit);
    test_activations(unit);
    test_norms(unit);
    test_rotary(unit);
    std::vector<int> counts;
#ifdef QUICK // one of each remainder of eight rows that the code tells apart, and both sides of 16
    counts = {1, 2, 3, 5, 8, 9, 16, 17};
#else
    for (int count = 1; count <= 17; count++) counts.push_back(count);
#endif
    uint32_t seed = 1;
    for (int bits : {0, 4, 8})
        for (int kind = 0; kind < (bits ? 3 : 1); kind++)
            for (int block : {32, 64, 128}) {
                if (!bits && block > 32) continue;
                Options o;
                o.bits = bits, o.block = block, o.zeros = kind == 1, o.means = kind == 2;
                o.layers = 1, o.bias = true, o.vocab = 77;
                o.hidden = kind == 2 ? 256 : 161, o.middle = kind == 2 ? 128 : 75; // means: whole blocks
                o.head_dim = 18, o.rotaries = {18};
                test_products(unit, o, counts, int(seed % 4) + 1, seed);
                o.hidden = kind == 2 ? 128 : 20, o.middle = kind == 2 ? 384 : 131, o.vocab = 16;
                o.bias = false, o.zeros |= o.means; // means beside zeros
                test_products(unit, o, {1, 2, 256}, int(seed % 3) + 1, seed + 1000);
                seed++;
            }
}

int main(int count, char **arguments) {
    folder = count > 1 ? arguments[1] : ".";
    for (const Unit *unit : units()) {
        const int before = checks;
        test_units(*unit);
        test_models(*unit);
        std::printf("%s: %d checks\n", unit->kernels->name, checks - before);
    }
    std::printf("%d checks, %d failures, at most %.2f of a bound\n", checks, failures, worst);
    return failures ? 1 : 0;
}
