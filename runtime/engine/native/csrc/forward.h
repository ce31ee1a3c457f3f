// One pass of all layers over some tokens, written on the vectors of one instruction set: this file
// is included by kernels_*.cpp behind a simd_*.h, inside that set's namespace. It uses nothing of
// the standard library that could be compiled for one processor and called on another.
//
// Every thread runs `forward`. Products are divided by their output rows; between two of them stands
// a barrier. What lies between is done by every thread for itself while there are one or two tokens
// (a norm takes less time than another barrier), else divided by tokens.

constexpr float NOTHING = -1e30f; // a score that nobody gave
constexpr int QUERIES = 4;        // rows of queries that read a key together

INLINE F exponential(F x) {
    x = most(least(x, all(88.0f)), all(-87.0f));
    F n = nearest(mul(x, all(1.44269504f)));
    F f = fma(n, all(-0.693359375f), x);
    f = fma(n, all(2.12194440e-4f), f);
    F p = all(1.9875691500e-4f);
    p = fma(p, f, all(1.3981999507e-3f));
    p = fma(p, f, all(8.3334519073e-3f));
    p = fma(p, f, all(4.1665795894e-2f));
    p = fma(p, f, all(1.6666665459e-1f));
    p = fma(p, f, all(5.0000001201e-1f));
    p = fma(p, mul(f, f), add(f, all(1.0f)));
    return mul(p, power_of_two(n));
}

INLINE F hyperbolic_tangent(F x) { // 1 - 2 / (exp(2x) + 1)
    F e = exponential(add(x, x));
    return sub(all(1.0f), div(all(2.0f), add(e, all(1.0f))));
}

INLINE F silu(F x) { return div(x, add(all(1.0f), exponential(sub(all(0.0f), x)))); }

INLINE F gelu_tanh(F x) {
    F inner = mul(all(0.7978845608f), fma(mul(mul(x, x), x), all(0.044715f), x));
    return mul(mul(all(0.5f), x), add(all(1.0f), hyperbolic_tangent(inner)));
}

// x * the normal distribution up to x; erf by Abramowitz and Stegun 7.1.26, within 1.5e-7.
INLINE F gelu(F x) {
    F z = mul(magnitude(x), all(0.7071067812f));
    F t = div(all(1.0f), fma(all(0.3275911f), z, all(1.0f)));
    F p = fma(all(1.061405429f), t, all(-1.453152027f));
    p = fma(p, t, all(1.421413741f));
    p = fma(p, t, all(-0.284496736f));
    p = mul(fma(p, t, all(0.254829592f)), t);
    F tail = mul(p, exponential(sub(all(0.0f), mul(z, z)))); // 1 - erf(z)
    return sub(most(x, all(0.0f)), mul(mul(all(0.5f), magnitude(x)), tail));
}

INLINE F activated(F x, Activation kind) {
    return kind == SILU ? silu(x) : kind == GELU ? gelu(x) : gelu_tanh(x);
}

INLINE F capped(F x, float cap) { return mul(all(cap), hyperbolic_tangent(div(x, all(cap)))); }

// Zeros behind a token's numbers. They mostly lie there, and threads that read the same numbers do
// not write them then.
INLINE void clear(float *z, int from, int to) {
    for (int i = from; i < to; i++)
        if (z[i] != 0) z[i] = 0;
}

// What a product reads of one token: numbers rounded to 8 bits, a scale a block. `together` tokens lie
// side by side, 32 numbers of each and so on: a product of several reads one stream.
static void round_numbers(float *z, const Matrix &m, const Rounded &to, int at, int together) {
    const int width = m.blocks * m.block, subs = m.block / COLUMNS, zero = m.bits == 4 ? ZERO4 : ZERO8;
    clear(z, m.inputs, width);
    const int chunk = at / together, within = at % together;
    int8_t *values =
        to.values + (size_t(chunk) * m.blocks * subs * together + within) * COLUMNS;
    const size_t place = size_t(chunk) * m.blocks * together + within;
    for (int b = 0; b < m.blocks; b++) {
        const float *x = z + b * m.block;
        F high = magnitude(load(x)), sum = load(x);
        for (int i = LANES; i < m.block; i += LANES) {
            F v = load(x + i);
            high = most(high, magnitude(v));
            sum = add(sum, v);
        }
        float top = largest(high);
        F inverse = all(top > 0 ? 127.0f / top : 0.0f);
        int32_t whole = 0;
        for (int i = 0; i < m.block; i += LANES) {
            int8_t *put = values + size_t(b * subs + i / COLUMNS) * together * COLUMNS + i % COLUMNS;
            whole += store_bytes(put, mul(load(x + i), inverse), m.bits == 4);
        }
        to.scales[place + b * together] = top / 127.0f;
        to.starts[place + b * together] = -zero * whole;
        to.sums[place + b * together] = total(sum);
    }
}

// N of the numbers of A x; 16 columns of N ranks lie side by side.
template <int N>
INLINE void lower_ranks(const float *z, int line, const uint16_t *a, float factor, float *low) {
    F s[N];
    for (int j = 0; j < N; j++) s[j] = all(0.0f);
    for (int i = 0; i < line; i += LANES, a += N * LANES) {
        F x = load(z + i);
        for (int j = 0; j < N; j++) s[j] = fma(load_half(a + j * LANES), x, s[j]);
    }
    for (int j = 0; j < N; j++) low[j] = total(s[j]) * factor;
}

// A x of one token's adapter at a site: eight ranks at once, then four, then one by one.
static void lower(const float *z, int inputs, const SiteAdapter &site, float *low) {
    const int line = round_up(inputs, LANES);
    int j = 0;
    for (; j + 8 <= site.rank; j += 8)
        lower_ranks<8>(z, line, site.a + size_t(j) * line, site.multiplier, low + j);
    for (; j + 4 <= site.rank; j += 4)
        lower_ranks<4>(z, line, site.a + size_t(j) * line, site.multiplier, low + j);
    for (; j < site.rank; j++)
        lower_ranks<1>(z, line, site.a + size_t(j) * line, site.multiplier, low + j);
}

static void prepare(const Model &model, const Matrix &m, Lane &lane, float *z, int at, int together,
                    const Adapter *adapter) {
    int line = (m.inputs + LANES - 1) / LANES * LANES;
    clear(z, m.inputs, line);
    if (m.bits) round_numbers(z, m, lane.rounded, at, together);
    if (adapter && m.site >= 0)
        lower(z, m.inputs, adapter->sites[m.site], lane.low + size_t(at) * model.low_line);
}

// --- products -----------------------------------------------------------------------------------

struct Reading { // what one product reads, and where its results go
    const Model *model;
    const Matrix *matrix;
    const Lane *lane;
    const float *z;
    int z_line, count;
    const Token *tokens;
    const int32_t *chosen; // places of its rows among the tokens, or null: the first ones
    float *out;
    int out_line;
    Activation activation;
    int outputs; // numbers a row takes in `out`, where its last group may not be whole; 0: whole

    const Adapter *adapter_of(int row) const { return tokens[chosen ? chosen[row] : row].adapter; }
};

// N columns of B, each times its number of A x, for the tokens from `from` to `to`.
template <int N>
INLINE void add_columns(const uint16_t *b, const float *low, int line, int from, int to, F *f) {
    F column[N];
    for (int j = 0; j < N; j++) column[j] = load_half(b + j * LANES);
    for (int t = from; t < to; t++) {
        const float *own = low + size_t(t) * line;
        F sum = f[t], other = mul(column[N - 1], all(own[N - 1])); // two chains of sums
        for (int j = 0; j + 1 < N; j += 2) sum = fma(column[j], all(own[j]), sum);
        for (int j = 1; j + 1 < N; j += 2) other = fma(column[j], all(own[j]), other);
        f[t] = N == 1 ? add(f[t], other) : add(sum, other);
    }
}

// Make results of sums: the unit of the weights, the bias, and what each token's adapter adds. Tokens
// of one adapter that follow each other read it once.
INLINE void finish(const Reading &r, int group, int row, int rows, F *f) {
    const Matrix &m = *r.matrix;
    for (int t = 0; t < rows; t++) {
        f[t] = mul(f[t], all(m.multiplier));
        if (m.bias) f[t] = add(f[t], load(m.bias + group * LANES));
    }
    if (m.site < 0) return;
    for (int t = 0, end; t < rows; t = end) {
        const Adapter *adapter = r.adapter_of(row + t);
        for (end = t + 1; end < rows && r.adapter_of(row + end) == adapter; end++) {}
        if (!adapter || !adapter->sites[m.site].rank) continue;
        const Ranks ranks = adapter->sites[m.site].ranks[group];
        const uint16_t *b = adapter->sites[m.site].b + ranks.at;
        const float *low = r.lane->low + size_t(row) * r.model->low_line;
        int j = ranks.first;
        for (; j + 8 <= ranks.last; j += 8, b += 8 * LANES)
            add_columns<8>(b, low + j, r.model->low_line, t, end, f);
        for (; j + 4 <= ranks.last; j += 4, b += 4 * LANES)
            add_columns<4>(b, low + j, r.model->low_line, t, end, f);
        for (; j < ranks.last; j++, b += LANES)
            add_columns<1>(b, low + j, r.model->low_line, t, end, f);
    }
}

// A group of 16 rows by T of the `SIDE` tokens that lie side by side.
template <int BITS, bool OFFSETS, int SIDE, int T>
INLINE void group_times(const Matrix &m, const uint8_t *p, const int8_t *x, const float *scales,
                        const float *sums_of, const int32_t *starts, F *out) {
    const int subs = m.block / COLUMNS;
    F f[T]; // of its own: the compiler keeps these in registers
    for (int t = 0; t < T; t++) f[t] = all(0.0f);
    for (int b = 0; b < m.blocks; b++) {
        const uint16_t *factors = (const uint16_t *)p;
        p += OFFSETS ? 64 : 32;
        Sums s[T];
        for (int t = 0; t < T; t++) s[t] = sums(starts[t]);
        for (int sub = 0; sub < subs; sub++, p += 64 * BITS, x += SIDE * COLUMNS) {
            Values<BITS> w;
            unpack(p, w);
            for (int t = 0; t < T; t++) s[t] = dot(w, x + t * COLUMNS, s[t]);
        }
        F scale = load_half(factors);
        F offset = OFFSETS ? load_half(factors + LANES) : scale;
        for (int t = 0; t < T; t++) {
            f[t] = fma(mul(scale, as_floats(s[t])), all(scales[t]), f[t]);
            if (OFFSETS) f[t] = fma(offset, all(sums_of[t]), f[t]);
        }
        scales += SIDE;
        sums_of += SIDE;
        starts += SIDE;
    }
    for (int t = 0; t < T; t++) out[t] = f[t];
}

static void float_group_times(const Reading &r, int group, int row, int rows, F *f) {
    const Matrix &m = *r.matrix;
    const float *p = (const float *)(m.groups_at + m.group_bytes() * group);
    const float *z = r.z + size_t(row) * r.z_line;
    for (int t = 0; t < rows; t++) f[t] = all(0.0f);
    for (int k = 0; k < m.inputs; k++) {
        F w = load(p + size_t(k) * LANES);
        for (int t = 0; t < rows; t++) f[t] = fma(w, all(z[size_t(t) * r.z_line + k]), f[t]);
    }
}

// A group by `rows` tokens from `row` on, which begins a group of tokens that lie side by side.
template <int BITS, bool OFFSETS>
static void group_of_rows(const Reading &r, int group, int row, int rows, F *f) {
    const Matrix &m = *r.matrix;
    const Rounded &from = r.lane->rounded;
    const uint8_t *p = m.groups_at + m.group_bytes() * group;
    const size_t blocks = size_t(row) * m.blocks;
    const int8_t *x = from.values + blocks * m.block;
    const float *scales = from.scales + blocks, *sums_of = from.sums + blocks;
    const int32_t *starts = from.starts + blocks;
    if (r.count == 1) return group_times<BITS, OFFSETS, 1, 1>(m, p, x, scales, sums_of, starts, f);
    constexpr int N = TOGETHER;
    switch (rows) {
    case 1: return group_times<BITS, OFFSETS, N, 1>(m, p, x, scales, sums_of, starts, f);
    case 2: return group_times<BITS, OFFSETS, N, 2>(m, p, x, scales, sums_of, starts, f);
    case 3: return group_times<BITS, OFFSETS, N, 3>(m, p, x, scales, sums_of, starts, f);
    case 4: return group_times<BITS, OFFSETS, N, 4>(m, p, x, scales, sums_of, starts, f);
    case 5: return group_times<BITS, OFFSETS, N, 5>(m, p, x, scales, sums_of, starts, f);
    case 6: return group_times<BITS, OFFSETS, N, 6>(m, p, x, scales, sums_of, starts, f);
    case 7: return group_times<BITS, OFFSETS, N, 7>(m, p, x, scales, sums_of, starts, f);
    default: return group_times<BITS, OFFSETS, N, 8>(m, p, x, scales, sums_of, starts, f);
    }
}

// Write one token's results of a group, or of a gate's group and of what it gates.
INLINE void put(const Reading &r, int group, int row, F gate, F up) {
    float *out = r.out + size_t(row) * r.out_line;
    if (r.matrix->gated) {
        store(out + group / 2 * LANES, mul(activated(gate, r.activation), up));
        return;
    }
    const int rest = r.outputs - group * LANES;
    if (!r.outputs || rest >= LANES) {
        store(out + group * LANES, gate);
        return;
    }
    float whole[LANES];
    store(whole, gate);
    for (int i = 0; i < rest; i++) out[group * LANES + i] = whole[i];
}

template <int BITS, bool OFFSETS>
static void groups_times(const Reading &r, int first, int last) {
    const int pair = r.matrix->gated ? 2 : 1;
    for (int group = first; group < last; group += pair)
        for (int row = 0; row < r.count; row += TOGETHER) {
            const int rows = r.count - row < TOGETHER ? r.count - row : TOGETHER;
            F f[2][TOGETHER];
            for (int half = 0; half < pair; half++) {
                if constexpr (BITS == 0)
                    float_group_times(r, group + half, row, rows, f[half]);
                else
                    group_of_rows<BITS, OFFSETS>(r, group + half, row, rows, f[half]);
                finish(r, group + half, row, rows, f[half]);
            }
            for (int t = 0; t < rows; t++) put(r, group, row + t, f[0][t], f[pair - 1][t]);
        }
}

static void product(const Reading &r, int thread) {
    const Matrix &m = *r.matrix;
    const int pair = m.gated ? 2 : 1, threads = r.model->threads;
    const int64_t pairs = m.groups / pair;
    const int first = int(pairs * thread / threads) * pair;
    const int last = int(pairs * (thread + 1) / threads) * pair;
    if (m.bits == 4)
        m.offsets ? groups_times<4, true>(r, first, last) : groups_times<4, false>(r, first, last);
    else if (m.bits == 8)
        m.offsets ? groups_times<8, true>(r, first, last) : groups_times<8, false>(r, first, last);
    else
        groups_times<0, false>(r, first, last);
}

// --- norms and positions ------------------------------------------------------------------------

static void normalise(const Norm &norm, const float *x, int width, float *out) {
    float shift = 0;
    if (norm.layer) {
        F s = all(0.0f);
        for (int i = 0; i < width; i += LANES) s = add(s, load(x + i));
        shift = total(s) / width;
    }
    F squares = all(0.0f);
    for (int i = 0; i < width; i += LANES) {
        F v = sub(load(x + i), all(shift));
        squares = fma(v, v, squares);
    }
    float sum = total(squares);
    if (int filled = (LANES - width % LANES) % LANES) sum -= filled * shift * shift;
    F factor = all(1.0f / __builtin_sqrtf(sum / width + norm.epsilon));
    for (int i = 0; i < width; i += LANES) {
        F v = mul(mul(sub(load(x + i), all(shift)), factor), load(norm.weight + i));
        store(out + i, norm.bias ? add(v, load(norm.bias + i)) : v);
    }
}

// x += the branch, through its own norm where it has one.
static void add_branch(const Norm &after, const float *branch, int width, float *x, float *scratch) {
    if (after.present) {
        normalise(after, branch, width, scratch);
        branch = scratch;
    }
    for (int i = 0; i < width; i += LANES) store(x + i, add(load(x + i), load(branch + i)));
}

static void rotate(const Rotary &rotary, int position, float *x) {
    const int half = rotary.width / 2;
    const float *c = rotary.cos + size_t(position) * half, *s = rotary.sin + size_t(position) * half;
    int i = 0;
    for (; i + LANES <= half; i += LANES) {
        F a = load(x + i), b = load(x + half + i), co = load(c + i), si = load(s + i);
        store(x + i, sub(mul(a, co), mul(b, si)));
        store(x + half + i, fma(b, co, mul(a, si)));
    }
    for (; i < half; i++) {
        float a = x[i], b = x[half + i];
        x[i] = a * c[i] - b * s[i];
        x[half + i] = b * c[i] + a * s[i];
    }
}

// --- attention ----------------------------------------------------------------------------------

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

// --- all layers ---------------------------------------------------------------------------------

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
