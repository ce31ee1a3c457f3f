#include "model.h"
#include "simd_avx512.h"

namespace edgetune {
namespace avx512 {
#include "forward.h"
} // namespace avx512
const Kernels AVX512 = {"avx512", avx512::SIGNED_BYTES, avx512::forward};
} // namespace edgetune
