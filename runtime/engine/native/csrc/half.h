// Half precision without instructions for it.
#pragma once
#include <stdint.h>
#include <string.h>

namespace edgetune {

static inline float half_to_float(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023, bits;
    if (exponent == 31) {
        bits = sign | 0x7F800000u | mantissa << 13;
    } else if (exponent) {
        bits = sign | (exponent + 112) << 23 | mantissa << 13;
    } else {
        float value = float(mantissa) * (1.0f / 16777216.0f);
        memcpy(&bits, &value, 4);
        bits |= sign;
    }
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

// To the nearest, ties to even; beyond the largest: infinite.
static inline uint16_t float_to_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t sign = (bits >> 16) & 0x8000, rest = bits & 0x7FFFFFFF;
    if (rest >= 0x47800000) return uint16_t(sign | (rest > 0x7F800000 ? 0x7E00 : 0x7C00));
    if (rest < 0x38800000) { // below the smallest normal one: count units of 2^-24
        float magnitude;
        memcpy(&magnitude, &rest, 4);
        float shifted = magnitude + 0.5f; // the unit of floats from 0.5 on is 2^-24
        memcpy(&rest, &shifted, 4);
        return uint16_t(sign | (rest - 0x3F000000));
    }
    rest += 0xC8000FFF + ((rest >> 13) & 1);
    return uint16_t(sign | rest >> 13);
}

} // namespace edgetune
