// 16 floats, and products of 16 rows by 32 columns: AVX2 with FMA and F16C.
#pragma once
#include <immintrin.h>
#include <stdint.h>

namespace edgetune {
namespace avx2 {

#define INLINE static inline __attribute__((always_inline))

constexpr bool SIGNED_BYTES = true;
constexpr int ZERO4 = 8, ZERO8 = 0;
constexpr int STEPS = 2; // vectors that attention works on at once, so that all registers are used

struct F { __m256 a, b; };
INLINE F load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float *p, F a) {
    _mm256_storeu_ps(p, a.a);
    _mm256_storeu_ps(p + 8, a.b);
}
INLINE F all(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
INLINE F add(F a, F b) { return {_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
INLINE F sub(F a, F b) { return {_mm256_sub_ps(a.a, b.a), _mm256_sub_ps(a.b, b.b)}; }
INLINE F mul(F a, F b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
INLINE F div(F a, F b) { return {_mm256_div_ps(a.a, b.a), _mm256_div_ps(a.b, b.b)}; }
INLINE F fma(F a, F b, F c) {
    return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)};
}
INLINE F least(F a, F b) { return {_mm256_min_ps(a.a, b.a), _mm256_min_ps(a.b, b.b)}; }
INLINE F most(F a, F b) { return {_mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b)}; }
INLINE F magnitude(F a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.a), _mm256_andnot_ps(sign, a.b)};
}
INLINE F nearest(F a) { return {_mm256_round_ps(a.a, 8), _mm256_round_ps(a.b, 8)}; }
INLINE float total8(__m256 a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
INLINE float total(F a) { return total8(_mm256_add_ps(a.a, a.b)); }
INLINE float largest(F a) {
    __m256 m = _mm256_max_ps(a.a, a.b);
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
INLINE F load_half(const uint16_t *p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
}
INLINE void store_half(uint16_t *p, F a) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(a.a, 0));
    _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(a.b, 0));
}
INLINE F load_bytes(const int8_t *p) {
    const __m128i x = _mm_loadu_si128((const __m128i *)p);
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(x, x)))};
}
INLINE __m256 power_of_two8(__m256 n) {
    __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
}
INLINE F power_of_two(F n) { return {power_of_two8(n.a), power_of_two8(n.b)}; }

INLINE int32_t store_bytes(int8_t *p, F a, bool paired) {
    __m256i x = _mm256_cvtps_epi32(a.a), y = _mm256_cvtps_epi32(a.b);
    __m256i sums = _mm256_add_epi32(x, y);
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x, y), 0xD8);
    __m128i bytes =
        _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    if (paired)
        bytes = _mm_shuffle_epi8(
            bytes, _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    _mm_storeu_si128((__m128i *)p, bytes);
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}

struct Sums { __m256i a, b; };
INLINE Sums sums(int32_t start) { return {_mm256_set1_epi32(start), _mm256_set1_epi32(start)}; }
INLINE F as_floats(Sums s) { return {_mm256_cvtepi32_ps(s.a), _mm256_cvtepi32_ps(s.b)}; }

template <int BITS> struct Values { __m256i v[16]; }; // of j: rows 0 to 7, rows 8 to 15
INLINE void unpack(const uint8_t *p, Values<4> &values) {
    const __m256i low = _mm256_set1_epi8(15);
    for (int j = 0; j < 4; j++)
        for (int h = 0; h < 2; h++) {
            __m256i x = _mm256_loadu_si256((const __m256i *)(p + 64 * j + 32 * h));
            values.v[4 * j + h] = _mm256_and_si256(x, low);
            values.v[4 * j + 2 + h] = _mm256_and_si256(_mm256_srli_epi16(x, 4), low);
        }
}
INLINE void unpack(const uint8_t *p, Values<8> &values) {
    for (int j = 0; j < 16; j++)
        values.v[j] = _mm256_loadu_si256((const __m256i *)(p + 32 * j));
}
// 4 bits: 8 sums of two products of at most 15 * 127 stay below 2^15
INLINE Sums dot(const Values<4> &values, const int8_t *x, Sums start) {
    const int32_t *fours = (const int32_t *)x;
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i a = _mm256_setzero_si256(), b = a;
    for (int j = 0; j < 8; j++) {
        __m256i y = _mm256_set1_epi32(fours[j]);
        a = _mm256_add_epi16(a, _mm256_maddubs_epi16(values.v[2 * j], y));
        b = _mm256_add_epi16(b, _mm256_maddubs_epi16(values.v[2 * j + 1], y));
    }
    return {_mm256_add_epi32(start.a, _mm256_madd_epi16(a, ones)),
            _mm256_add_epi32(start.b, _mm256_madd_epi16(b, ones))};
}
// 8 bits: |value| times the number with the value's sign; two products are at most 2 * 128 * 127
INLINE Sums dot(const Values<8> &values, const int8_t *x, Sums start) {
    const int32_t *fours = (const int32_t *)x;
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i a = start.a, b = start.b;
    for (int j = 0; j < 8; j++) {
        __m256i y = _mm256_set1_epi32(fours[j]), v = values.v[2 * j], w = values.v[2 * j + 1];
        __m256i p = _mm256_maddubs_epi16(_mm256_abs_epi8(v), _mm256_sign_epi8(y, v));
        __m256i q = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(y, w));
        a = _mm256_add_epi32(a, _mm256_madd_epi16(p, ones));
        b = _mm256_add_epi32(b, _mm256_madd_epi16(q, ones));
    }
    return {a, b};
}

} // namespace avx2
} // namespace edgetune
