// Queries and a cache of keys and values in half precision or 8 bits.
// Included by kernels_*.cpp behind a simd_*.h, inside that instruction set's namespace; see forward.h.

constexpr float NOTHING = -1e30f; // a score that nobody gave
constexpr int QUERIES = 4;        // rows of queries that read a key together

struct Span { // what one row of queries sees of the keys, and what came of some of them
    const float *q;
    int from, to;
    float high, sum; // largest score, sum of exp(score - high); sum 0: it saw none
    float *acc;      // (head_width): sum of exp(score - high) * value
};

// Numbers of a cache: half precision, or 8 bits of which each token has a scale.
struct Halves {
    typedef uint16_t Number;
    static constexpr bool SCALED = false;
    INLINE F load16(const Number *p) { return load_half(p); }
};
struct Bytes {
    typedef int8_t Number;
    static constexpr bool SCALED = true;
    INLINE F load16(const Number *p) { return load_bytes(p); }
};

INLINE uint8_t *side_of(const Work &w, int side, int slot, int head) {
    const Model &m = *w.model;
    return w.cache.memory +
           (((size_t(side) * w.cache.slots + slot) * m.kv_heads + head) * w.cache.capacity) *
               m.cache_bytes();
}

// The step of LANES tokens from the token `at`, a multiple of LANES.
template <class C> INLINE typename C::Number *step_at(uint8_t *side, int at, int width) {
    return (typename C::Number *)(side + size_t(at) * (C::SCALED ? width + 4 : 2 * width));
}
template <class C> INLINE float *scales_of(typename C::Number *step, int width) {
    return (float *)(step + LANES * width);
}

// Scores of R queries with W steps of 16 keys from the key `at`, written to `scores`. Their values,
// which are read next, are asked for meanwhile.
template <class C, int R, int W>
INLINE void score_keys(const Span *rows, uint8_t *keys, uint8_t *values, int at, int dim, int width,
                       float softcap, float *scores) {
    constexpr int numbers = W * LANES;
    const typename C::Number *next = step_at<C>(values, at, width);
    const typename C::Number *key[W];
    F s[R][W];
    for (int w = 0; w < W; w++) key[w] = step_at<C>(keys, at + w * LANES, width);
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++) s[r][w] = all(0.0f);
    for (int d = 0; d < dim; d++) {
        F k[W];
        ask_for(next + d * numbers, numbers * sizeof(*next));
        for (int w = 0; w < W; w++) k[w] = C::load16(key[w] + d * LANES);
        for (int r = 0; r < R; r++) {
            F q = all(rows[r].q[d]);
            for (int w = 0; w < W; w++) s[r][w] = fma(q, k[w], s[r][w]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++) {
            if (C::SCALED)
                s[r][w] = mul(s[r][w], load(scales_of<C>(step_at<C>(keys, at + w * LANES, width), width)));
            store(scores + r * KEYS + w * LANES, softcap > 0 ? capped(s[r][w], softcap) : s[r][w]);
        }
}

// The values from `first` to `end`, each times its weight, as W vectors of R results. `next`: what is
// read after them, of the same form.
template <class C, int R, int W>
INLINE void add_values(const Span *rows, uint8_t *values, uint8_t *next, int first, int end, int width,
                       int d, const float *weights) {
    F a[R][W];
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++) a[r][w] = all(0.0f);
    for (int k = first; k < end;) {
        const int step = k / LANES * LANES, stop = step + LANES < end ? step + LANES : end;
        const typename C::Number *value = step_at<C>(values, step, width) + (k - step) * width + d;
        for (; k < stop; k++, value += width) {
            F v[W];
            ask_for(next + ((uint8_t *)value - values), W * LANES * sizeof(*value));
            for (int w = 0; w < W; w++) v[w] = C::load16(value + w * LANES);
            for (int r = 0; r < R; r++) {
                F p = all(weights[r * KEYS + (k - first)]);
                for (int w = 0; w < W; w++) a[r][w] = fma(p, v[w], a[r][w]);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++) store(rows[r].acc + d + w * LANES, a[r][w]);
}

// Turn a row's scores of the keys from `start` to `end` into weights, 0 for those it does not see.
INLINE void weigh(Span &row, int start, int end, float *scores) {
    const int steps = round_up(end - start, LANES);
    for (int k = start; k < row.from && k < end; k++) scores[k - start] = NOTHING;
    for (int k = row.to > start ? row.to : start; k < start + steps; k++) scores[k - start] = NOTHING;
    F top = all(NOTHING);
    for (int k = 0; k < steps; k += LANES) top = most(top, load(scores + k));
    row.high = largest(top);
    F sum = all(0.0f);
    const bool none = row.high <= NOTHING;
    for (int k = 0; k < steps; k += LANES) {
        F e = none ? all(0.0f) : exponential(sub(load(scores + k), all(row.high)));
        store(scores + k, e);
        sum = add(sum, e);
    }
    for (int k = start; k < row.from && k < end; k++) scores[k - start] = 0; // exp ends at -87
    for (int k = row.to > start ? row.to : start; k < end; k++) scores[k - start] = 0;
    row.sum = total(sum);
}

// R queries and the keys from `start`, a multiple of KEYS, to `end`.
template <class C, int R>
static void attend_keys(const Model &model, uint8_t *keys, uint8_t *values, float softcap, int start,
                        int end, Span *rows, float *scores) {
    const int width = model.head_width, dim = model.head_dim;
    int first = rows[0].from;
    for (int r = 1; r < R; r++)
        if (rows[r].from < first) first = rows[r].from;
    if (first < start) first = start;
    int k = start;
    for (; k + STEPS * LANES <= round_up(end, LANES); k += STEPS * LANES)
        score_keys<C, R, STEPS>(rows, keys, values, k, dim, width, softcap, scores + (k - start));
    for (; k < end; k += LANES)
        score_keys<C, R, 1>(rows, keys, values, k, dim, width, softcap, scores + (k - start));
    for (int r = 0; r < R; r++) {
        float *own = scores + r * KEYS;
        weigh(rows[r], start, end, own);
        for (int step = start; C::SCALED && step < end; step += LANES, own += LANES)
            store(own, mul(load(own), load(scales_of<C>(step_at<C>(values, step, width), width))));
    }
    const float *weights = scores + (first - start);
    uint8_t *next = (uint8_t *)step_at<C>(keys, KEYS, width); // the next block of keys
    int d = 0;
    for (; d + STEPS * LANES <= width; d += STEPS * LANES)
        add_values<C, R, STEPS>(rows, values, next, first, end, width, d, weights);
    for (; d < width; d += LANES)
        add_values<C, R, 1>(rows, values, next, first, end, width, d, weights);
}

template <class C>
INLINE void attend_rows(const Model &m, uint8_t *keys, uint8_t *values, float softcap, int start,
                        int end, Span *rows, int count, float *scores) {
    switch (count) {
    case 1: return attend_keys<C, 1>(m, keys, values, softcap, start, end, rows, scores);
    case 2: return attend_keys<C, 2>(m, keys, values, softcap, start, end, rows, scores);
    case 3: return attend_keys<C, 3>(m, keys, values, softcap, start, end, rows, scores);
    default: return attend_keys<C, 4>(m, keys, values, softcap, start, end, rows, scores);
    }
}

static void attend(const Work &w, const Layer &layer, int index, int slot, int head, int start,
                   Span *rows, int count, float *scores) {
    uint8_t *keys = side_of(w, 2 * index, slot, head);
    uint8_t *values = side_of(w, 2 * index + 1, slot, head);
    int end = 0;
    for (int r = 0; r < count; r++)
        if (rows[r].to > end) end = rows[r].to;
    if (end > start + KEYS) end = start + KEYS;
    const Model &m = *w.model;
    if (m.cache_bits == 8)
        attend_rows<Bytes>(m, keys, values, layer.softcap, start, end, rows, count, scores);
    else
        attend_rows<Halves>(m, keys, values, layer.softcap, start, end, rows, count, scores);
}

// What came of some keys, joined by what came of later ones. A row's keys are always joined in this
// way and order, so that its result does not depend on who computed which of them.
struct Joined {
    float high, sum;
    float *acc;
};

INLINE void join(Joined &to, float high, float sum, const float *acc, int width) {
    if (!(sum > 0)) return;
    float old = 0, own = 1;
    if (to.sum > 0) {
        const float top = to.high > high ? to.high : high;
        float each[LANES];
        store(each, exponential(all(to.high - top)));
        old = each[0];
        store(each, exponential(all(high - top)));
        own = each[0];
        high = top;
    }
    to.sum = to.sum * old + sum * own;
    to.high = high;
    for (int d = 0; d < width; d += LANES) {
        F a = mul(load(acc + d), all(own));
        store(to.acc + d, old > 0 ? fma(load(to.acc + d), all(old), a) : a);
    }
}

static void query(const Model &m, const Layer &layer, const float *y, int position, float *q) {
    for (int i = 0; i < m.head_width; i += LANES) store(q + i, load(y + i));
    if (layer.q_norm.present) normalise(layer.q_norm, q, m.head_dim, q);
    if (layer.rotary >= 0) rotate(m.rotaries[layer.rotary], position, q);
    for (int i = 0; i < m.head_width; i += LANES) store(q + i, mul(load(q + i), all(layer.scale)));
}

// 8 bits of a token's numbers, written to `codes`; their scale.
INLINE float to_bytes(const float *x, int width, int8_t *codes) {
    F most_of = all(0.0f);
    for (int i = 0; i < width; i += LANES) most_of = most(most_of, magnitude(load(x + i)));
    const float top = largest(most_of);
    const F inverse = all(top > 0 ? 127.0f / top : 0.0f);
    for (int i = 0; i < width; i += LANES) store_bytes(codes + i, mul(load(x + i), inverse), false);
    return top / 127.0f;
}

// Write one token's key and value of a head into the cache.
static void append(const Work &w, const Layer &layer, int index, int token, int head,
                   float *scratch) {
    const Model &m = *w.model;
    const Token &t = w.tokens[token];
    const int width = m.head_width, step = t.position / LANES * LANES, lane = t.position - step;
    const float *k = m.y + size_t(token) * m.y_line + size_t(m.heads + head) * width;
    const float *v = k + size_t(m.kv_heads) * width;
    for (int i = 0; i < width; i += LANES) store(scratch + i, load(k + i));
    if (layer.k_norm.present) normalise(layer.k_norm, scratch, m.head_dim, scratch);
    if (layer.rotary >= 0) rotate(m.rotaries[layer.rotary], t.position, scratch);
    uint8_t *keys = side_of(w, 2 * index, t.slot, head);
    uint8_t *values = side_of(w, 2 * index + 1, t.slot, head);
    if (m.cache_bits == 8) {
        int8_t *key = step_at<Bytes>(keys, step, width), *value = step_at<Bytes>(values, step, width);
        int8_t *codes = (int8_t *)(scratch + width);
        scales_of<Bytes>(key, width)[lane] = to_bytes(scratch, width, codes);
        for (int i = 0; i < width; i++) key[size_t(i) * LANES + lane] = codes[i];
        scales_of<Bytes>(value, width)[lane] = to_bytes(v, width, value + size_t(lane) * width);
        return;
    }
    uint16_t *key = step_at<Halves>(keys, step, width), *value = step_at<Halves>(values, step, width);
    uint16_t *half = (uint16_t *)(scratch + width);
    for (int i = 0; i < width; i += LANES) store_half(half + i, load(scratch + i));
    for (int i = 0; i < width; i++) key[size_t(i) * LANES + lane] = half[i];
    for (int i = 0; i < width; i += LANES) store_half(value + size_t(lane) * width + i, load(v + i));
}

INLINE int seen_from(const Layer &layer, int position) {
    return layer.window > 0 && position + 1 > layer.window ? position + 1 - layer.window : 0;
}

INLINE float *part_of(const Model &m, int token, int block, int head) {
    return m.parts + ((size_t(token) * m.part_blocks + block) * m.heads + head) * (m.head_width + LANES);
}

// Of every token a part of its context: keys by heads are shared out in blocks. Blocks in which new
// tokens lie are all of one thread, which writes their keys and values first.
static void attend_part(const Work &w, const Layer &layer, int index, int thread, float *scratch) {
    const Model &m = *w.model;
    const int width = m.head_width, group = m.heads / m.kv_heads;
    for (int i = 0; i < w.count; i++)
        for (int head = thread; head < m.kv_heads; head += m.threads)
            append(w, layer, index, i, head, scratch);
    float *q = scratch, *scores = scratch + size_t(m.heads) * width;
    for (int i = 0; i < w.count; i++) {
        const Token &t = w.tokens[i];
        for (int head = 0; head < m.heads; head++)
            query(m, layer, m.y + size_t(i) * m.y_line + head * width, t.position, q + head * width);
        const int from = seen_from(layer, t.position), to = t.position + 1, last = t.position / KEYS;
        int turn = m.kv_heads % m.threads; // whose the next block without new tokens is
        for (int block = from / KEYS; block <= last; block++)
            for (int kv = 0; kv < m.kv_heads; kv++) {
                const bool has_new = block >= t.start / KEYS;
                const int whose = has_new ? kv % m.threads : turn;
                if (!has_new) turn = turn + 1 == m.threads ? 0 : turn + 1;
                if (whose != thread) continue;
                for (int done = 0; done < group; done += QUERIES) {
                    Span rows[QUERIES];
                    const int count = group - done < QUERIES ? group - done : QUERIES;
                    for (int r = 0; r < count; r++) {
                        const int head = kv * group + done + r;
                        rows[r] = {q + head * width, from, to, 0, 0, part_of(m, i, block, head)};
                    }
                    attend(w, layer, index, t.slot, kv, block * KEYS, rows, count, scores);
                    for (int r = 0; r < count; r++) {
                        rows[r].acc[width] = rows[r].high;
                        rows[r].acc[width + 1] = rows[r].sum;
                    }
                }
            }
    }
}

static void join_parts(const Work &w, const Layer &layer, int token, float *scratch, float *out) {
    const Model &m = *w.model;
    const int width = m.head_width, position = w.tokens[token].position;
    for (int head = 0; head < m.heads; head++, out += m.head_dim) {
        Joined joined = {NOTHING, 0, scratch};
        for (int block = seen_from(layer, position) / KEYS; block <= position / KEYS; block++) {
            const float *part = part_of(m, token, block, head);
            join(joined, part[width], part[width + 1], part, width);
        }
        for (int d = 0; d < m.head_dim; d++) out[d] = scratch[d] / joined.sum;
    }
}

// A prompt: the keys are all in the cache; blocks of tokens by heads are shared out.
static void attend_many(const Work &w, const Layer &layer, int index, int thread, float *scratch,
                        float *out, int out_line) {
    const Model &m = *w.model;
    const int width = m.head_width, group = m.heads / m.kv_heads;
    float *q = scratch, *acc = q + QUERIES * width, *sums_of = acc + QUERIES * width;
    float *scores = sums_of + QUERIES * width;
    const int64_t all_rows = int64_t(w.count) * group, blocks = (all_rows + QUERIES - 1) / QUERIES;
    for (int64_t item = thread; item < blocks * m.kv_heads; item += m.threads) {
        const int kv = int(item % m.kv_heads);
        int64_t row = item / m.kv_heads * QUERIES;
        const int64_t end = row + QUERIES < all_rows ? row + QUERIES : all_rows;
        while (row < end) { // rows of one slot go together
            Span rows[QUERIES];
            Joined joined[QUERIES];
            const int slot = w.tokens[row / group].slot;
            int count = 0, from = 1 << 30, to = 0;
            for (; row + count < end && w.tokens[(row + count) / group].slot == slot; count++) {
                const int token = int((row + count) / group), head = int((row + count) % group);
                const Token &t = w.tokens[token];
                query(m, layer, m.y + size_t(token) * m.y_line + (kv * group + head) * width,
                      t.position, q + count * width);
                rows[count] = {q + count * width, seen_from(layer, t.position), t.position + 1, 0, 0,
                               acc + count * width};
                joined[count] = {NOTHING, 0, sums_of + count * width};
                if (rows[count].from < from) from = rows[count].from;
                if (rows[count].to > to) to = rows[count].to;
            }
            for (int start = from / KEYS * KEYS; start < to; start += KEYS) {
                attend(w, layer, index, slot, kv, start, rows, count, scores);
                for (int r = 0; r < count; r++)
                    join(joined[r], rows[r].high, rows[r].sum, rows[r].acc, width);
            }
            for (int r = 0; r < count; r++) {
                const int token = int((row + r) / group), head = kv * group + int((row + r) % group);
                float *to_token = out + size_t(token) * out_line + head * m.head_dim;
                for (int d = 0; d < m.head_dim; d++) to_token[d] = joined[r].acc[d] / joined[r].sum;
            }
            row += count;
        }
    }
}
