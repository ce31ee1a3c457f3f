// 16 floats, and products of 16 rows by 32 columns: NEON with the dot product instructions.
#pragma once
#include <arm_neon.h>
#include <stdint.h>

namespace edgetune {
namespace neon {

#define INLINE static inline __attribute__((always_inline))

constexpr bool SIGNED_BYTES = true;
constexpr int ZERO4 = 0, ZERO8 = 0;
constexpr int STEPS = 1; // vectors that attention works on at once, so that all registers are used

struct F { float32x4_t v[4]; };
#define EACH for (int i = 0; i < 4; i++)
INLINE F load(const float *p) { F a; EACH a.v[i] = vld1q_f32(p + 4 * i); return a; }
INLINE void store(float *p, F a) { EACH vst1q_f32(p + 4 * i, a.v[i]); }
INLINE F all(float x) { F a; EACH a.v[i] = vdupq_n_f32(x); return a; }
INLINE F add(F a, F b) { EACH a.v[i] = vaddq_f32(a.v[i], b.v[i]); return a; }
INLINE F sub(F a, F b) { EACH a.v[i] = vsubq_f32(a.v[i], b.v[i]); return a; }
INLINE F mul(F a, F b) { EACH a.v[i] = vmulq_f32(a.v[i], b.v[i]); return a; }
INLINE F div(F a, F b) { EACH a.v[i] = vdivq_f32(a.v[i], b.v[i]); return a; }
INLINE F fma(F a, F b, F c) { EACH a.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]); return a; }
INLINE F least(F a, F b) { EACH a.v[i] = vminq_f32(a.v[i], b.v[i]); return a; }
INLINE F most(F a, F b) { EACH a.v[i] = vmaxq_f32(a.v[i], b.v[i]); return a; }
INLINE F magnitude(F a) { EACH a.v[i] = vabsq_f32(a.v[i]); return a; }
INLINE F nearest(F a) { EACH a.v[i] = vrndnq_f32(a.v[i]); return a; }
INLINE float total(F a) {
    return vaddvq_f32(vaddq_f32(vaddq_f32(a.v[0], a.v[1]), vaddq_f32(a.v[2], a.v[3])));
}
INLINE float largest(F a) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3])));
}
INLINE F load_half(const uint16_t *p) {
    F a;
    EACH a.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)));
    return a;
}
INLINE void store_half(uint16_t *p, F a) {
    EACH vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
}
INLINE F load_bytes(const int8_t *p) {
    const int8x16_t x = vld1q_s8(p);
    const int16x8_t low = vmovl_s8(vget_low_s8(x)), high = vmovl_s8(vget_high_s8(x));
    F a;
    a.v[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(low)));
    a.v[1] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(low)));
    a.v[2] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(high)));
    a.v[3] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)));
    return a;
}
INLINE F power_of_two(F n) {
    EACH n.v[i] = vreinterpretq_f32_s32(
        vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.v[i]), vdupq_n_s32(127)), 23));
    return n;
}

INLINE int32_t store_bytes(int8_t *p, F a, bool paired) {
    int32x4_t w[4];
    EACH w[i] = vcvtnq_s32_f32(a.v[i]);
    int16x8_t low = vcombine_s16(vqmovn_s32(w[0]), vqmovn_s32(w[1]));
    int16x8_t high = vcombine_s16(vqmovn_s32(w[2]), vqmovn_s32(w[3]));
    int8x16_t bytes = vcombine_s8(vqmovn_s16(low), vqmovn_s16(high));
    if (paired) {
        static const uint8_t order[16] = {0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15};
        bytes = vqtbl1q_s8(bytes, vld1q_u8(order));
    }
    vst1q_s8(p, bytes);
    return vaddvq_s32(vaddq_s32(vaddq_s32(w[0], w[1]), vaddq_s32(w[2], w[3])));
}

struct Sums { int32x4_t v[4]; };
INLINE Sums sums(int32_t start) { Sums s; EACH s.v[i] = vdupq_n_s32(start); return s; }
INLINE F as_floats(Sums s) { F a; EACH a.v[i] = vcvtq_f32_s32(s.v[i]); return a; }

template <int BITS> struct Values { int8x16_t v[32]; }; // of j: four times 4 rows
INLINE void unpack(const uint8_t *p, Values<4> &values) {
    const uint8x16_t low = vdupq_n_u8(15);
    const int8x16_t eight = vdupq_n_s8(8);
    for (int j = 0; j < 4; j++)
        EACH {
            uint8x16_t x = vld1q_u8(p + 64 * j + 16 * i);
            values.v[8 * j + i] = vsubq_s8(vreinterpretq_s8_u8(vandq_u8(x, low)), eight);
            values.v[8 * j + 4 + i] = vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(x, 4)), eight);
        }
}
INLINE void unpack(const uint8_t *p, Values<8> &values) {
    for (int j = 0; j < 32; j++) values.v[j] = vld1q_s8((const int8_t *)p + 16 * j);
}
template <int BITS> INLINE Sums dot(const Values<BITS> &values, const int8_t *x, Sums s) {
    int8x16_t low = vld1q_s8(x), high = vld1q_s8(x + 16);
    EACH {
        s.v[i] = vdotq_laneq_s32(s.v[i], values.v[i], low, 0);
        s.v[i] = vdotq_laneq_s32(s.v[i], values.v[4 + i], low, 1);
        s.v[i] = vdotq_laneq_s32(s.v[i], values.v[8 + i], low, 2);
        s.v[i] = vdotq_laneq_s32(s.v[i], values.v[12 + i], low, 3);
        s.v[i] = vdotq_laneq_s32(s.v[i], values.v[16 + i], high, 0);
        s.v[i] = vdotq_laneq_s32(s.v[i], values.v[20 + i], high, 1);
        s.v[i] = vdotq_laneq_s32(s.v[i], values.v[24 + i], high, 2);
        s.v[i] = vdotq_laneq_s32(s.v[i], values.v[28 + i], high, 3);
    }
    return s;
}
#undef EACH

} // namespace neon
} // namespace edgetune
