// A decoder in plain double precision, and nothing of the engine in it but the two roundings that
// are part of what it promises: activations to 8 bits before a quantised product, keys and values to
// half precision.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace reference {

using Numbers = std::vector<double>;

inline double half_value(uint16_t h) {
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    const double sign = h & 0x8000 ? -1 : 1;
    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
}

// To the nearest half, ties to even.
inline double as_half(double x) {
    if (!std::isfinite(x) || x == 0) return x;
    int exponent;
    std::frexp(x, &exponent); // |x| is in [2^(exponent-1), 2^exponent): 11 bits of it, down to 2^-24
    const int unit = std::max(exponent - 11, -24);
    const double rounded = std::ldexp(std::nearbyint(std::ldexp(x, -unit)), unit);
    return std::fabs(rounded) > 65504 ? std::copysign(INFINITY, x) : rounded;
}

struct Lora {
    int rank = 0;
    std::vector<float> a, b; // (inputs, rank), (rank, outputs)
};

struct Dense {
    int outputs = 0, inputs = 0, bits = 0, block = 1;
    Numbers weight; // (outputs, inputs); of quantised ones about the middle of the grid
    Numbers offset; // (outputs, blocks): what a block's numbers are multiplied by beside it
    Numbers bias;

    int blocks() const { return (inputs + block - 1) / block; }

    Numbers times(const Numbers &x, const Lora *lora) const {
        Numbers rounded = x, sums(blocks(), 0.0), y(outputs, 0.0);
        if (bits)
            for (int b = 0; b < blocks(); b++) {
                const int end = std::min(inputs, (b + 1) * block);
                float top = 0;
                for (int i = b * block; i < end; i++) {
                    top = std::fmax(top, std::fabs(float(x[i])));
                    sums[b] += x[i];
                }
                const float inverse = top > 0 ? 127.0f / top : 0;
                for (int i = b * block; i < end; i++)
                    rounded[i] = std::nearbyint(float(x[i]) * inverse) * double(top / 127.0f);
            }
        for (int o = 0; o < outputs; o++) {
            double sum = bias.empty() ? 0 : bias[o];
            for (int i = 0; i < inputs; i++) sum += weight[size_t(o) * inputs + i] * rounded[i];
            if (bits)
                for (int b = 0; b < blocks(); b++) sum += offset[size_t(o) * blocks() + b] * sums[b];
            y[o] = sum;
        }
        if (lora && lora->rank)
            for (int j = 0; j < lora->rank; j++) {
                double low = 0;
                for (int i = 0; i < inputs; i++) low += x[i] * lora->a[size_t(i) * lora->rank + j];
                for (int o = 0; o < outputs; o++) y[o] += low * lora->b[size_t(j) * outputs + o];
            }
        return y;
    }
};

struct Normed {
    bool present = false, layer = false;
    double epsilon = 0;
    Numbers weight, bias;

    Numbers of(const Numbers &x) const {
        double mean = 0, square = 0;
        if (layer)
            for (double v : x) mean += v / x.size();
        for (double v : x) square += (v - mean) * (v - mean) / x.size();
        Numbers y(x.size());
        for (size_t i = 0; i < x.size(); i++)
            y[i] = (x[i] - mean) / std::sqrt(square + epsilon) * weight[i] + (bias.empty() ? 0 : bias[i]);
        return y;
    }
};

inline double activated(const std::string &kind, double x) {
    if (kind == "silu") return x / (1 + std::exp(-x));
    if (kind == "gelu") return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

inline double capped(double x, double cap) { return cap > 0 ? cap * std::tanh(x / cap) : x; }

struct Turn { // a rotary embedding
    int width = 0;
    std::vector<float> cos, sin; // (positions, width / 2)

    void turn(double *x, int position) const {
        const int half = width / 2;
        for (int i = 0; i < half; i++) {
            const double c = cos[size_t(position) * half + i], s = sin[size_t(position) * half + i];
            const double a = x[i], b = x[half + i];
            x[i] = a * c - b * s;
            x[half + i] = b * c + a * s;
        }
    }
};

struct DenseLayer {
    Normed attention_norm, q_norm, k_norm, after_attention, mlp_norm, after_mlp;
    Dense qkv, attention_out, gate_up, down;
    int rotary = -1, window = 0;
    double scale = 1, softcap = 0;
    std::string activation;
};

struct Loras { // of the sites in the order in which the model has them
    std::vector<Lora> sites;
};

struct DenseModel {
    int hidden, vocab, heads, kv_heads, head_dim;
    Numbers embedding; // (vocab, hidden), its multiplier in it
    std::vector<Turn> rotaries;
    std::vector<DenseLayer> layers;
    Normed norm;
    Dense head;
    double logits_softcap = 0;
    int cache_bits = 16;

    // States and logits of every token of one row.
    void run(const std::vector<int> &ids, const Loras *loras, std::vector<Numbers> &states,
             std::vector<Numbers> &logits) const {
        const size_t count = ids.size();
        std::vector<Numbers> x(count);
        for (size_t t = 0; t < count; t++)
            x[t].assign(embedding.begin() + int64_t(ids[t]) * hidden,
                        embedding.begin() + int64_t(ids[t] + 1) * hidden);
        for (size_t l = 0; l < layers.size(); l++) {
            auto site = [&](int i) { return loras ? &loras->sites[l * 4 + size_t(i)] : nullptr; };
            const std::vector<Numbers> attended = attention(layers[l], x, site(0));
            for (size_t t = 0; t < count; t++) {
                const DenseLayer &layer = layers[l];
                add(x[t], layer.attention_out.times(attended[t], site(1)), layer.after_attention);
                const Numbers both = layer.gate_up.times(layer.mlp_norm.of(x[t]), site(2));
                const size_t middle = both.size() / 2;
                Numbers gated(middle);
                for (size_t i = 0; i < middle; i++)
                    gated[i] = activated(layer.activation, both[i]) * both[middle + i];
                add(x[t], layer.down.times(gated, site(3)), layer.after_mlp);
            }
        }
        states.clear(), logits.clear();
        for (size_t t = 0; t < count; t++) {
            states.push_back(norm.of(x[t]));
            logits.push_back(head.times(states[t], loras ? &loras->sites.back() : nullptr));
            for (double &v : logits[t]) v = capped(v, logits_softcap);
        }
    }

  private:
    // A key or value as the cache holds it.
    void keep(double *at) const {
        double top = 0;
        for (int d = 0; d < head_dim; d++) top = std::max(top, std::fabs(at[d]));
        for (int d = 0; d < head_dim && top > 0; d++)
            at[d] = cache_bits == 8 ? std::nearbyint(at[d] * 127 / top) * top / 127 : as_half(at[d]);
    }

    static void add(Numbers &x, Numbers branch, const Normed &after) {
        if (after.present) branch = after.of(branch);
        for (size_t i = 0; i < x.size(); i++) x[i] += branch[i];
    }

    std::vector<Numbers> attention(const DenseLayer &layer, const std::vector<Numbers> &x,
                                   const Lora *lora) const {
        std::vector<Numbers> qkv, out;
        for (size_t t = 0; t < x.size(); t++) {
            qkv.push_back(layer.qkv.times(layer.attention_norm.of(x[t]), lora));
            for (int h = 0; h < heads + 2 * kv_heads; h++) {
                double *at = qkv[t].data() + size_t(h) * head_dim;
                const Normed &own = h < heads ? layer.q_norm : layer.k_norm;
                if (h < heads + kv_heads) {
                    if (own.present) {
                        const Numbers y = own.of(Numbers(at, at + head_dim));
                        std::copy(y.begin(), y.end(), at);
                    }
                    if (layer.rotary >= 0) rotaries[size_t(layer.rotary)].turn(at, int(t));
                }
                if (h >= heads)
                    keep(at);
            }
        }
        for (size_t t = 0; t < x.size(); t++) {
            Numbers row(size_t(heads) * head_dim);
            const int first = layer.window > 0 ? std::max(0, int(t) + 1 - layer.window) : 0;
            for (int h = 0; h < heads; h++) {
                const int kv = heads + h / (heads / kv_heads);
                Numbers scores;
                double high = -INFINITY, sum = 0;
                for (int k = first; k <= int(t); k++) {
                    double score = 0;
                    for (int d = 0; d < head_dim; d++)
                        score += layer.scale * qkv[t][size_t(h) * head_dim + d] *
                                 qkv[size_t(k)][size_t(kv) * head_dim + d];
                    scores.push_back(capped(score, layer.softcap));
                    high = std::max(high, scores.back());
                }
                for (double &s : scores) sum += s = std::exp(s - high);
                for (int k = first; k <= int(t); k++)
                    for (int d = 0; d < head_dim; d++)
                        row[size_t(h) * head_dim + d] +=
                            scores[size_t(k - first)] / sum *
                            qkv[size_t(k)][size_t(kv + kv_heads) * head_dim + d];
            }
            out.push_back(row);
        }
        return out;
    }
};

} // namespace reference
