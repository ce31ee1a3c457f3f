// Rounding what a product reads, adapters, and the products of packed weights.
// Included by kernels_*.cpp behind a simd_*.h, inside that instruction set's namespace; see forward.h.

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
        const int numbers = (ranks.last - ranks.first) * LANES;
        if (rows > 1) ask_for(b + 2 * numbers, numbers * sizeof(*b)); // of the group after the next
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

constexpr int AHEAD = 2048; // bytes: by measurement, 7 to 9 % of a step of 8 tokens

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
        if (T >= 4) // several tokens take longer than the processor's own prefetching looks ahead
            ask_for(p + AHEAD, (OFFSETS ? 64 : 32) + 64 * BITS);
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
