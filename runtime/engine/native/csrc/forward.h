// One pass of all layers over some tokens, written on the vectors of one instruction set: this file
// is included by kernels_*.cpp behind a simd_*.h, inside that set's namespace. It uses nothing of
// the standard library that could be compiled for one processor and called on another.
//
// Every thread runs `forward`. Products are divided by their output rows; between two of them stands
// a barrier. What lies between is done by every thread for itself while there are one or two tokens
// (a norm takes less time than another barrier), else divided by tokens.

#include "functions.h"
#include "products.h"
#include "attention.h"

static void forward(const Work *work, int thread) {
    const Work &w = *work;
    Model &m = *w.model;
    const int count = w.count;
    const bool alone = count <= ALONE_TOKENS, few = count <= FEW_TOKENS;
    int together = count == 1 ? 1 : TOGETHER;
    Lane &lane = m.lanes[alone ? thread : 0];
    const int from = alone ? 0 : count * thread / m.threads;
    const int to = alone ? count : count * (thread + 1) / m.threads;
    float *scratch = m.lanes[thread].heads;
    Reading r = {&m, nullptr, &lane, lane.z, m.z_line, count, w.tokens, nullptr, nullptr, 0, SILU, 0};
    auto multiply = [&](const Matrix &matrix, const float *z, float *out, int out_line) {
        r.matrix = &matrix;
        r.z = z;
        r.out = out;
        r.out_line = out_line;
        product(r, thread);
    };
    auto x = [&](int t) { return lane.x + size_t(t) * m.x_line; };
    auto z = [&](int t) { return lane.z + size_t(t) * m.z_line; };
    for (int t = from; t < to; t++)
        for (int i = 0; i < m.x_line; i += LANES)
            store(x(t) + i, load(m.embedded + size_t(t) * m.x_line + i));
    for (int index = 0; index < m.layer_count; index++) {
        const Layer &layer = m.layers[index];
        for (int t = from; t < to; t++) {
            if (index)
                add_branch(m.layers[index - 1].after_mlp, m.branch + size_t(t) * m.x_line, m.hidden,
                           x(t), z(t));
            normalise(layer.attention_norm, x(t), m.hidden, z(t));
            prepare(m, layer.qkv, lane, z(t), t, together, w.tokens[t].adapter);
        }
        if (!alone) barrier(m.pool);
        multiply(layer.qkv, lane.z, m.y, m.y_line);
        barrier(m.pool);
        if (few) {
            attend_part(w, layer, index, thread, scratch);
            barrier(m.pool);
            for (int t = from; t < to; t++) join_parts(w, layer, t, scratch, z(t));
        } else {
            for (int t = from; t < to; t++)
                for (int head = 0; head < m.kv_heads; head++)
                    append(w, layer, index, t, head, scratch);
            barrier(m.pool);
            attend_many(w, layer, index, thread, scratch, lane.z, m.z_line);
            barrier(m.pool);
        }
        for (int t = from; t < to; t++)
            prepare(m, layer.attention_out, lane, z(t), t, together, w.tokens[t].adapter);
        if (!alone) barrier(m.pool);
        multiply(layer.attention_out, lane.z, m.branch, m.x_line);
        barrier(m.pool);
        for (int t = from; t < to; t++) {
            add_branch(layer.after_attention, m.branch + size_t(t) * m.x_line, m.hidden, x(t), z(t));
            normalise(layer.mlp_norm, x(t), m.hidden, z(t));
            prepare(m, layer.gate_up, lane, z(t), t, together, w.tokens[t].adapter);
        }
        if (!alone) barrier(m.pool);
        r.activation = layer.activation;
        multiply(layer.gate_up, lane.z, m.gated, m.z_line);
        barrier(m.pool);
        for (int t = from; t < to; t++) {
            // Alone, every thread prepares for itself what all have written: only the tail of it,
            // which nothing reads, is written here, with the zeros that it has.
            prepare(m, layer.down, lane, m.gated + size_t(t) * m.z_line, t, together, w.tokens[t].adapter);
        }
        if (!alone) barrier(m.pool);
        multiply(layer.down, m.gated, m.branch, m.x_line);
        barrier(m.pool);
    }
    together = w.wanted_count == 1 ? 1 : TOGETHER;
    const int wanted_from = alone ? 0 : w.wanted_count * thread / m.threads;
    const int wanted_to = alone ? w.wanted_count : w.wanted_count * (thread + 1) / m.threads;
    for (int i = wanted_from; i < wanted_to; i++) {
        const int t = w.wanted[i];
        add_branch(m.layers[m.layer_count - 1].after_mlp, m.branch + size_t(t) * m.x_line, m.hidden,
                   x(t), z(i));
        normalise(m.norm, x(t), m.hidden, z(i));
        if (w.states && (!alone || thread == 0))
            for (int d = 0; d < m.hidden; d++) w.states[size_t(i) * m.hidden + d] = z(i)[d];
        if (w.logits) prepare(m, m.head, lane, z(i), i, together, w.tokens[t].adapter);
    }
    if (!w.logits || !w.wanted_count) return;
    if (!alone) barrier(m.pool);
    r.count = w.wanted_count;
    r.chosen = w.wanted;
    r.outputs = m.vocab;
    multiply(m.head, lane.z, w.logits, m.vocab);
    if (m.logits_softcap > 0) {
        barrier(m.pool);
        const int64_t all_numbers = int64_t(w.wanted_count) * m.vocab;
        const int64_t end = all_numbers * (thread + 1) / m.threads;
        int64_t at = all_numbers * thread / m.threads;
        for (; at + LANES <= end; at += LANES)
            store(w.logits + at, capped(load(w.logits + at), m.logits_softcap));
        for (; at < end; at++) {
            float one[LANES];
            store(one, capped(all(w.logits[at]), m.logits_softcap));
            w.logits[at] = one[0];
        }
    }
}
