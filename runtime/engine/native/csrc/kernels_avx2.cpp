#include "model.h"
#include "simd_avx2.h"

namespace edgetune {
namespace avx2 {
#include "forward.h"
} // namespace avx2
const Kernels AVX2 = {"avx2", avx2::SIGNED_BYTES, avx2::forward};
} // namespace edgetune
