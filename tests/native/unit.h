// The inner functions of one instruction set's kernels, as the test calls them.
#pragma once
#include "model.h"

namespace edgetune {

struct Unit {
    const Kernels *kernels;
    void (*from_halves)(const uint16_t *halves, float *floats); // 16 of them
    void (*to_halves)(const float *floats, uint16_t *halves);
    void (*activate)(Activation kind, const float *x, float *out);
    void (*normalise)(const Norm &norm, const float *x, int width, float *out);
    void (*rotate)(const Rotary &rotary, int position, float *x);
    // Tokens through a matrix as the engine does it: prepared, then multiplied by every thread.
    void (*multiply)(const Model &model, const Matrix &matrix, float *z, int z_line, int count,
                     const Token *tokens, Activation activation, float *out, int out_line,
                     int outputs);
};

extern const Unit UNIT_scalar, UNIT_avx2, UNIT_avx512, UNIT_neon;

} // namespace edgetune
