// A random tiny decoder: its plan and data file for the engine, and the same in plain numbers.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <random>

#include "reference.h"

struct Options {
    int hidden = 32, middle = 64, vocab = 50, heads = 4, kv_heads = 2, head_dim = 16, layers = 2;
    int bits = 0, block = 32, embedding_bits = 0, positions = 400;
    bool zeros = false, means = false, bias = false, inlined = false;
    bool layer_norm = false, norm_bias = false, head_norms = false, after_norms = false;
    std::vector<int> rotaries = {16}; // widths; layers take them in turn
    int cache_bits = 16;
    int window = 0;                   // of every second layer
    double softcap = 0, logits_softcap = 0, multiplier = 1;
    std::string activation = "silu";
};

class RandomModel {
  public:
    std::string plan;
    std::vector<uint8_t> data;
    reference::DenseModel dense;
    std::vector<std::string> sites;

    RandomModel(const Options &options, uint32_t seed) : o(options), random(seed) {
        dense.hidden = o.hidden, dense.vocab = o.vocab, dense.heads = o.heads;
        dense.kv_heads = o.kv_heads, dense.head_dim = o.head_dim;
        dense.logits_softcap = o.logits_softcap, dense.cache_bits = o.cache_bits;
        plan = "{\"version\":1" + whole("hidden", o.hidden) + whole("vocab", o.vocab) +
               whole("heads", o.heads) + whole("kv_heads", o.kv_heads) +
               whole("head_dim", o.head_dim) + real("logits_softcap", o.logits_softcap) +
               ",\"rotaries\":[";
        for (size_t i = 0; i < o.rotaries.size(); i++) plan += (i ? "," : "") + rotary(o.rotaries[i]);
        plan += "]" + named("embedding", embedding()) + ",\"layers\":[";
        for (int l = 0; l < o.layers; l++) plan += (l ? "," : "") + layer(l);
        plan += "]" + named("norm", norm(dense.norm, o.hidden)) +
                named("head", matrix(dense.head, "head", o.hidden, o.vocab)) + "}";
    }

    double uniform() { return std::uniform_real_distribution<double>(-1, 1)(random); }
    int below(int end) { return int(random() % uint32_t(end)); }

    // Numbers that half precision holds; of B only the ranks of the output's own third, if asked.
    reference::Loras loras(int rank, bool diagonal) {
        reference::Loras found;
        std::vector<const reference::Dense *> all;
        for (auto &layer : dense.layers)
            for (auto *m : {&layer.qkv, &layer.attention_out, &layer.gate_up, &layer.down})
                all.push_back(m);
        all.push_back(&dense.head);
        for (const reference::Dense *m : all) {
            reference::Lora lora;
            lora.rank = rank;
            for (int i = 0; i < m->inputs * rank; i++) lora.a.push_back(float(below(129) - 64) / 256);
            for (int j = 0; j < rank; j++)
                for (int out = 0; out < m->outputs; out++) {
                    const bool own = !diagonal || out * 3 / m->outputs == j * 3 / rank;
                    lora.b.push_back(own ? float(below(129) - 64) / 512 : 0);
                }
            found.sites.push_back(lora);
        }
        return found;
    }

  private:
    Options o;
    std::mt19937 random;

    static std::string whole(const char *name, int64_t value) {
        return ",\"" + std::string(name) + "\":" + std::to_string(value);
    }
    static std::string real(const char *name, double value) {
        char text[64];
        std::snprintf(text, sizeof text, ",\"%s\":%.9g", name, value);
        return text;
    }
    static std::string named(const std::string &name, const std::string &json) {
        return ",\"" + name + "\":" + json;
    }

    std::string place(const void *bytes, size_t count) {
        const uint8_t *from = static_cast<const uint8_t *>(bytes);
        std::string json = "{\"offset\":" + std::to_string(o.inlined ? 0 : data.size()) +
                           whole("bytes", int64_t(count));
        if (o.inlined) {
            static const char digits[] =
                "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
            std::string text;
            for (size_t i = 0; i < count; i += 3) {
                uint32_t word = 0;
                for (size_t b = 0; b < 3; b++) word = word << 8 | (i + b < count ? from[i + b] : 0);
                for (size_t b = 0; b < 4; b++)
                    text += i + b > count ? '=' : digits[word >> (18 - 6 * b) & 63];
            }
            if (data.empty()) data.resize(4); // a file that is mapped has bytes
            return json + ",\"inline\":\"" + text + "\"}";
        }
        data.insert(data.end(), from, from + count);
        data.resize((data.size() + 3) / 4 * 4);
        return json + "}";
    }
    std::string floats(const std::vector<float> &numbers) {
        return place(numbers.data(), numbers.size() * 4);
    }
    std::string random_floats(reference::Numbers &to, int count, double middle, double spread) {
        std::vector<float> numbers;
        for (int i = 0; i < count; i++) numbers.push_back(float(middle + spread * uniform()));
        to.assign(numbers.begin(), numbers.end());
        return floats(numbers);
    }

    std::string norm(reference::Normed &n, int width) {
        n.present = true, n.layer = o.layer_norm, n.epsilon = 0.0009765625;
        std::string json = "{\"kind\":" + std::string(n.layer ? "\"layer\"" : "\"rms\"") +
                           real("epsilon", n.epsilon) +
                           named("weight", random_floats(n.weight, width, 1, 0.5));
        if (o.norm_bias) json += named("bias", random_floats(n.bias, width, 0, 0.3));
        return json + "}";
    }

    std::string rotary(int width) {
        reference::Turn turn;
        turn.width = width;
        for (int p = 0; p < o.positions; p++)
            for (int i = 0; i < width / 2; i++) {
                const double angle = p * std::pow(100.0, -2.0 * i / width);
                turn.cos.push_back(float(std::cos(angle)));
                turn.sin.push_back(float(std::sin(angle)));
            }
        dense.rotaries.push_back(turn);
        return "{\"width\":" + std::to_string(width) + whole("positions", o.positions) +
               named("cos", floats(turn.cos)) + named("sin", floats(turn.sin)) + "}";
    }

    // Values of a grid with scales of few bits, so that half precision holds them and the offsets.
    struct Grid {
        std::vector<uint8_t> weight, zeros;
        std::vector<float> scales;
        std::vector<double> values, middles; // of every stored number: about the middle, its offset
    };
    Grid grid(int bits, int rows, int blocks, int block, bool zeros) {
        Grid g;
        const int middle = bits == 4 ? 8 : 128, line = bits == 8 ? blocks : (blocks + 1) / 2;
        g.weight.resize(size_t(rows) * blocks * block * bits / 8);
        if (zeros) g.zeros.resize(size_t(rows) * line);
        for (int r = 0; r < rows; r++)
            for (int b = 0; b < blocks; b++) {
                const float scale = float(8 + below(8)) / (bits == 4 ? 512 : 8192);
                const int zero = zeros ? below(2 * middle) : middle;
                g.scales.push_back(scale);
                if (zeros && bits == 8) g.zeros[size_t(r) * line + b] = uint8_t(zero);
                if (zeros && bits == 4) g.zeros[size_t(r) * line + b / 2] |= uint8_t(zero << 4 * (b % 2));
                g.middles.push_back(double(middle - zero) * scale);
                for (int i = 0; i < block; i++) {
                    const int value = below(2 * middle);
                    const size_t at = (size_t(r) * blocks + b) * block + i;
                    if (bits == 8) g.weight[at] = uint8_t(value);
                    else g.weight[at / 2] |= uint8_t(value << 4 * (at % 2));
                    g.values.push_back(double(value - middle) * scale);
                }
            }
        return g;
    }

    std::string matrix(reference::Dense &m, const std::string &site, int inputs, int outputs) {
        m.inputs = inputs, m.outputs = outputs, m.bits = o.bits;
        const bool means = o.means && o.bits && inputs % o.block == 0;
        std::string json = "{\"inputs\":" + std::to_string(inputs) + whole("outputs", outputs) +
                           whole("bits", o.bits) + ",\"means\":" + (means ? "true" : "false") +
                           ",\"site\":\"" + site + "\"";
        sites.push_back(site);
        if (!o.bits) {
            reference::Numbers columns;
            json += named("weight", random_floats(columns, inputs * outputs, 0, 1.5 / std::sqrt(inputs)));
            for (int out = 0; out < outputs; out++)
                for (int i = 0; i < inputs; i++)
                    m.weight.push_back(columns[size_t(i) * outputs + out]);
        } else {
            m.block = o.block;
            const int blocks = m.blocks(), stored = blocks + (means ? (blocks + o.block - 1) / o.block : 0);
            const Grid g = grid(o.bits, outputs, stored, o.block, o.zeros);
            json += whole("block_size", o.block) + named("weight", place(g.weight.data(), g.weight.size())) +
                    named("scales", floats(g.scales));
            if (o.zeros) json += named("zeros", place(g.zeros.data(), g.zeros.size()));
            for (int out = 0; out < outputs; out++)
                for (int b = 0; b < blocks; b++) {
                    const size_t row = size_t(out) * stored;
                    double offset = g.middles[row + b];
                    if (means) { // the column for this block's mean
                        const int at = blocks + b / o.block;
                        offset += (g.values[(row + at) * o.block + b % o.block] + g.middles[row + at]) / o.block;
                    }
                    m.offset.push_back(offset);
                    for (int i = 0; i < o.block && b * o.block + i < inputs; i++)
                        m.weight.push_back(g.values[(row + b) * o.block + i]);
                }
        }
        if (o.bias) json += named("bias", random_floats(m.bias, outputs, 0, 0.5));
        return json + "}";
    }

    std::string embedding() {
        std::string json = "{\"rows\":" + std::to_string(o.vocab) + whole("columns", o.hidden) +
                           whole("bits", o.embedding_bits) + real("multiplier", o.multiplier);
        if (!o.embedding_bits) {
            json += named("weight", random_floats(dense.embedding, o.vocab * o.hidden, 0, 1));
        } else {
            const int blocks = (o.hidden + o.block - 1) / o.block;
            const Grid g = grid(o.embedding_bits, o.vocab, blocks, o.block, o.zeros);
            json += whole("block_size", o.block) + named("weight", place(g.weight.data(), g.weight.size())) +
                    named("scales", floats(g.scales));
            if (o.zeros) json += named("zeros", place(g.zeros.data(), g.zeros.size()));
            for (int r = 0; r < o.vocab; r++)
                for (int i = 0; i < o.hidden; i++)
                    dense.embedding.push_back(g.values[size_t(r) * blocks * o.block + i] +
                                              g.middles[size_t(r) * blocks + i / o.block]);
        }
        for (double &v : dense.embedding) v *= o.multiplier;
        return json + "}";
    }

    std::string layer(int index) {
        dense.layers.emplace_back();
        reference::DenseLayer &l = dense.layers.back();
        const std::string name = "layer" + std::to_string(index) + ".";
        l.scale = 1 / std::sqrt(double(o.head_dim)), l.softcap = o.softcap, l.activation = o.activation;
        l.window = index % 2 ? 0 : o.window;
        std::string json = "{\"attention_norm\":" + norm(l.attention_norm, o.hidden) +
                           named("mlp_norm", norm(l.mlp_norm, o.hidden)) + real("scale", l.scale) +
                           real("softcap", l.softcap) + whole("window", l.window) +
                           ",\"activation\":\"" + l.activation + "\"";
        if (!o.rotaries.empty()) {
            l.rotary = index % int(o.rotaries.size());
            json += whole("rotary", l.rotary);
        }
        if (o.head_norms)
            json += named("q_norm", norm(l.q_norm, o.head_dim)) + named("k_norm", norm(l.k_norm, o.head_dim));
        if (o.after_norms)
            json += named("after_attention", norm(l.after_attention, o.hidden)) +
                    named("after_mlp", norm(l.after_mlp, o.hidden));
        const int qkv = (o.heads + 2 * o.kv_heads) * o.head_dim, all = o.heads * o.head_dim;
        json += named("qkv", matrix(l.qkv, name + "qkv", o.hidden, qkv));
        json += named("attention_out", matrix(l.attention_out, name + "attention_out", all, o.hidden));
        json += named("gate_up", matrix(l.gate_up, name + "gate_up", o.hidden, 2 * o.middle));
        json += named("down", matrix(l.down, name + "down", o.middle, o.hidden));
        return json + "}";
    }
};
