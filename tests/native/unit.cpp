// One instruction set's kernels with their inner functions laid open: compiled instead of
// kernels_<SIMD>.cpp, with SIMD defined as scalar, avx2, avx512 or neon,
// and TABLE as the name of its table.
#define TEXT_OF(x) #x
#define FILE_OF(x) TEXT_OF(kernels_##x.cpp)
#define FILE_FOR(x) FILE_OF(x)
#include FILE_FOR(SIMD)

#include "unit.h"

namespace edgetune {
namespace SIMD {

static void from_halves(const uint16_t *halves, float *floats) { store(floats, load_half(halves)); }
static void to_halves(const float *floats, uint16_t *halves) { store_half(halves, load(floats)); }
static void activate(Activation kind, const float *x, float *out) {
    store(out, activated(load(x), kind));
}

static void multiply(const Model &model, const Matrix &matrix, float *z, int z_line, int count,
                     const Token *tokens, Activation activation, float *out, int out_line,
                     int outputs) {
    Lane &lane = model.lanes[0];
    for (int t = 0; t < count; t++)
        prepare(model, matrix, lane, z + size_t(t) * z_line, t, count == 1 ? 1 : TOGETHER,
                tokens[t].adapter);
    Reading r = {&model, &matrix, &lane,    z,          z_line, count, tokens,
                 nullptr, out,    out_line, activation, outputs};
    for (int thread = 0; thread < model.threads; thread++) product(r, thread);
}

} // namespace SIMD

#define UNIT_OF(x) UNIT_##x
#define UNIT_FOR(x) UNIT_OF(x)
const Unit UNIT_FOR(SIMD) = {&TABLE,          SIMD::from_halves, SIMD::to_halves, SIMD::activate,
                             SIMD::normalise, SIMD::rotate,      SIMD::multiply};

} // namespace edgetune
