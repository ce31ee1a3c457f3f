// Activations, norms and rotary positions on vectors of 16 floats.
// Included by kernels_*.cpp behind a simd_*.h, inside that instruction set's namespace; see forward.h.

// Begin to read what is needed soon: memory answers while the processor multiplies. Any address will
// do; nothing is read behind what exists.
INLINE void ask_for(const void *from, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)from + i, 0, 3);
}

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
