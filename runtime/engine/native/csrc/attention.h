// Queries and a cache of keys and values in half precision.
// Included by kernels_*.cpp behind a simd_*.h, inside that instruction set's namespace; see forward.h.

constexpr float NOTHING = -1e30f; // a score that nobody gave
constexpr int QUERIES = 4;        // rows of queries that read a key together

struct Span { // what one row of queries sees of the keys, and what came of some of them
    const float *q;
    int from, to;
    float high, sum; // largest score, sum of exp(score - high); sum 0: it saw none
    float *acc;      // (head_width): sum of exp(score - high) * value
};

INLINE uint16_t *side_of(const Work &w, int side, int slot, int head) {
    const Model &m = *w.model;
    return w.cache.memory +
           (((size_t(side) * w.cache.slots + slot) * m.kv_heads + head) * w.cache.capacity) *
               m.head_width;
}

// Scores of R queries with W steps of 16 keys, written to `scores`.
template <int R, int W>
INLINE void score_keys(const Span *rows, const uint16_t *key, int dim, int width, float softcap,
                       float *scores) {
    F s[R][W];
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++) s[r][w] = all(0.0f);
    for (int d = 0; d < dim; d++) {
        F k[W];
        for (int w = 0; w < W; w++) k[w] = load_half(key + (w * width + d) * LANES);
        for (int r = 0; r < R; r++) {
            F q = all(rows[r].q[d]);
            for (int w = 0; w < W; w++) s[r][w] = fma(q, k[w], s[r][w]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++)
            store(scores + r * KEYS + w * LANES, softcap > 0 ? capped(s[r][w], softcap) : s[r][w]);
}

// The values of keys, each times its weight, as W vectors of R results.
template <int R, int W>
INLINE void add_values(const Span *rows, const uint16_t *value, int count, int width, int d,
                       const float *weights) {
    F a[R][W];
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++) a[r][w] = all(0.0f);
    for (int k = 0; k < count; k++, value += width) {
        F v[W];
        for (int w = 0; w < W; w++) v[w] = load_half(value + d + w * LANES);
        for (int r = 0; r < R; r++) {
            F p = all(weights[r * KEYS + k]);
            for (int w = 0; w < W; w++) a[r][w] = fma(p, v[w], a[r][w]);
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
template <int R>
static void attend_keys(const Model &model, const uint16_t *keys, const uint16_t *values,
                        float softcap, int start, int end, Span *rows, float *scores) {
    const int width = model.head_width, dim = model.head_dim;
    int first = rows[0].from;
    for (int r = 1; r < R; r++)
        if (rows[r].from < first) first = rows[r].from;
    if (first < start) first = start;
    int k = start;
    for (; k + STEPS * LANES <= round_up(end, LANES); k += STEPS * LANES)
        score_keys<R, STEPS>(rows, keys + size_t(k) * width, dim, width, softcap, scores + (k - start));
    for (; k < end; k += LANES)
        score_keys<R, 1>(rows, keys + size_t(k) * width, dim, width, softcap, scores + (k - start));
    for (int r = 0; r < R; r++) weigh(rows[r], start, end, scores + r * KEYS);
    const uint16_t *value = values + size_t(first) * width;
    const float *weights = scores + (first - start);
    int d = 0;
    for (; d + STEPS * LANES <= width; d += STEPS * LANES)
        add_values<R, STEPS>(rows, value, end - first, width, d, weights);
    for (; d < width; d += LANES) add_values<R, 1>(rows, value, end - first, width, d, weights);
}

static void attend(const Work &w, const Layer &layer, int index, int slot, int head, int start,
                   Span *rows, int count, float *scores) {
    const uint16_t *keys = side_of(w, 2 * index, slot, head);
    const uint16_t *values = side_of(w, 2 * index + 1, slot, head);
    int end = 0;
    for (int r = 0; r < count; r++)
        if (rows[r].to > end) end = rows[r].to;
    if (end > start + KEYS) end = start + KEYS;
    const Model &m = *w.model;
    switch (count) {
    case 1: return attend_keys<1>(m, keys, values, layer.softcap, start, end, rows, scores);
    case 2: return attend_keys<2>(m, keys, values, layer.softcap, start, end, rows, scores);
    case 3: return attend_keys<3>(m, keys, values, layer.softcap, start, end, rows, scores);
    default: return attend_keys<4>(m, keys, values, layer.softcap, start, end, rows, scores);
    }
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

// Write one token's key and value of a head into the cache.
static void append(const Work &w, const Layer &layer, int index, int token, int head,
                   float *scratch) {
    const Model &m = *w.model;
    const Token &t = w.tokens[token];
    const int width = m.head_width;
    const float *k = m.y + size_t(token) * m.y_line + size_t(m.heads + head) * width;
    const float *v = k + size_t(m.kv_heads) * width;
    uint16_t *half = (uint16_t *)(scratch + width);
    for (int i = 0; i < width; i += LANES) store(scratch + i, load(k + i));
    if (layer.k_norm.present) normalise(layer.k_norm, scratch, m.head_dim, scratch);
    if (layer.rotary >= 0) rotate(m.rotaries[layer.rotary], t.position, scratch);
    for (int i = 0; i < width; i += LANES) store_half(half + i, load(scratch + i));
    uint16_t *key = side_of(w, 2 * index, t.slot, head) +
                    size_t(t.position / LANES) * LANES * width + t.position % LANES;
    for (int i = 0; i < width; i++) key[size_t(i) * LANES] = half[i];
    uint16_t *value = side_of(w, 2 * index + 1, t.slot, head) + size_t(t.position) * width;
    for (int i = 0; i < width; i += LANES) store_half(value + i, load(v + i));
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
