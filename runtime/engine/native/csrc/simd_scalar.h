// 16 floats, and products of 16 rows by 32 columns, in plain C++: what the other kinds are held
// against.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "half.h"

namespace edgetune {
namespace scalar {

#define INLINE static inline

constexpr bool SIGNED_BYTES = true;
constexpr int ZERO4 = 0, ZERO8 = 0;
constexpr int STEPS = 1; // vectors that attention works on at once, so that all registers are used

struct F { float v[16]; };
#define EACH for (int i = 0; i < 16; i++)
INLINE F load(const float *p) { F a; memcpy(a.v, p, 64); return a; }
INLINE void store(float *p, F a) { memcpy(p, a.v, 64); }
INLINE F all(float x) { F a; EACH a.v[i] = x; return a; }
INLINE F add(F a, F b) { EACH a.v[i] += b.v[i]; return a; }
INLINE F sub(F a, F b) { EACH a.v[i] -= b.v[i]; return a; }
INLINE F mul(F a, F b) { EACH a.v[i] *= b.v[i]; return a; }
INLINE F div(F a, F b) { EACH a.v[i] /= b.v[i]; return a; }
INLINE F fma(F a, F b, F c) { EACH a.v[i] = a.v[i] * b.v[i] + c.v[i]; return a; }
INLINE F least(F a, F b) { EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
INLINE F most(F a, F b) { EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
INLINE F magnitude(F a) { EACH a.v[i] = fabsf(a.v[i]); return a; }
INLINE F nearest(F a) { EACH a.v[i] = nearbyintf(a.v[i]); return a; }
INLINE float total(F a) { float s = 0; EACH s += a.v[i]; return s; }
INLINE float largest(F a) { float s = a.v[0]; EACH s = a.v[i] > s ? a.v[i] : s; return s; }
INLINE F load_half(const uint16_t *p) { F a; EACH a.v[i] = half_to_float(p[i]); return a; }
INLINE void store_half(uint16_t *p, F a) { EACH p[i] = float_to_half(a.v[i]); }
INLINE F load_bytes(const int8_t *p) { F a; EACH a.v[i] = p[i]; return a; }
INLINE F power_of_two(F n) { EACH n.v[i] = ldexpf(1.0f, (int)n.v[i]); return n; }

INLINE int32_t store_bytes(int8_t *p, F a, bool paired) {
    int32_t sum = 0;
    EACH {
        int32_t whole = (int32_t)nearbyintf(a.v[i]);
        int place = paired ? (i & 8) + (i & 1) * 4 + (i & 7) / 2 : i;
        p[place] = (int8_t)whole;
        sum += whole;
    }
    return sum;
}

struct Sums { int32_t v[16]; };
INLINE Sums sums(int32_t start) { Sums s; EACH s.v[i] = start; return s; }
INLINE F as_floats(Sums s) { F a; EACH a.v[i] = (float)s.v[i]; return a; }

template <int BITS> struct Values { int8_t v[8][64]; };
INLINE void unpack(const uint8_t *p, Values<4> &values) {
    for (int j = 0; j < 4; j++)
        for (int i = 0; i < 64; i++) {
            values.v[2 * j][i] = (int8_t)((p[64 * j + i] & 15) - 8);
            values.v[2 * j + 1][i] = (int8_t)((p[64 * j + i] >> 4) - 8);
        }
}
INLINE void unpack(const uint8_t *p, Values<8> &values) { memcpy(values.v, p, 512); }
template <int BITS> INLINE Sums dot(const Values<BITS> &values, const int8_t *x, Sums start) {
    for (int j = 0; j < 8; j++)
        for (int i = 0; i < 64; i++) start.v[i / 4] += values.v[j][i] * x[4 * j + i % 4];
    return start;
}
#undef EACH

} // namespace scalar
} // namespace edgetune
