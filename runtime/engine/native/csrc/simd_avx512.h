// 16 floats, and products of 16 rows by 32 columns: AVX-512 with VNNI.
#pragma once
#include <immintrin.h>
#include <stdint.h>

namespace edgetune {
namespace avx512 {

#define INLINE static inline __attribute__((always_inline))

constexpr bool SIGNED_BYTES = false;
constexpr int ZERO4 = 8, ZERO8 = 128; // what the products' values are too large by
constexpr int STEPS = 4; // vectors that attention works on at once, so that all registers are used

struct F { __m512 v; };
INLINE F load(const float *p) { return {_mm512_loadu_ps(p)}; }
INLINE void store(float *p, F a) { _mm512_storeu_ps(p, a.v); }
INLINE F all(float a) { return {_mm512_set1_ps(a)}; }
INLINE F add(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
INLINE F sub(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
INLINE F mul(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
INLINE F div(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
INLINE F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
INLINE F least(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
INLINE F most(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
INLINE F magnitude(F a) { return {_mm512_abs_ps(a.v)}; }
INLINE F nearest(F a) { return {_mm512_roundscale_ps(a.v, 8)}; }
INLINE float total(F a) { return _mm512_reduce_add_ps(a.v); }
INLINE float largest(F a) { return _mm512_reduce_max_ps(a.v); }
INLINE F load_half(const uint16_t *p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p))};
}
INLINE void store_half(uint16_t *p, F a) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a.v, 0));
}
INLINE F load_bytes(const int8_t *p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)))};
}
INLINE F power_of_two(F n) { return {_mm512_scalef_ps(_mm512_set1_ps(1.0f), n.v)}; }

// Write 16 numbers rounded to 8 bits, even ones of 8 first where `paired`; their sum.
INLINE int32_t store_bytes(int8_t *p, F a, bool paired) {
    __m512i whole = _mm512_cvtps_epi32(a.v);
    __m128i bytes = _mm512_cvtepi32_epi8(whole);
    if (paired)
        bytes = _mm_shuffle_epi8(
            bytes, _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    _mm_storeu_si128((__m128i *)p, bytes);
    return _mm512_reduce_add_epi32(whole);
}

struct Sums { __m512i v; };
INLINE Sums sums(int32_t start) { return {_mm512_set1_epi32(start)}; }
INLINE F as_floats(Sums a) { return {_mm512_cvtepi32_ps(a.v)}; }

template <int BITS> struct Values { __m512i v[8]; };
INLINE void unpack(const uint8_t *p, Values<4> &values) {
    const __m512i low = _mm512_set1_epi8(15);
    for (int j = 0; j < 4; j++) {
        __m512i x = _mm512_loadu_si512(p + 64 * j);
        values.v[2 * j] = _mm512_and_si512(x, low);
        values.v[2 * j + 1] = _mm512_and_si512(_mm512_srli_epi16(x, 4), low);
    }
}
INLINE void unpack(const uint8_t *p, Values<8> &values) {
    for (int j = 0; j < 8; j++) values.v[j] = _mm512_loadu_si512(p + 64 * j);
}
// start + values (16 rows, 32 columns) times 32 rounded numbers.
template <int BITS> INLINE Sums dot(const Values<BITS> &values, const int8_t *x, Sums start) {
    const int32_t *fours = (const int32_t *)x;
    __m512i a = start.v, b = _mm512_setzero_si512();
    for (int j = 0; j < 8; j += 2) {
        a = _mm512_dpbusd_epi32(a, values.v[j], _mm512_set1_epi32(fours[j]));
        b = _mm512_dpbusd_epi32(b, values.v[j + 1], _mm512_set1_epi32(fours[j + 1]));
    }
    return {_mm512_add_epi32(a, b)};
}

} // namespace avx512
} // namespace edgetune
