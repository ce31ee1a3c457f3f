#include "model.h"
#include "simd_scalar.h"

namespace edgetune {
namespace scalar {
#include "forward.h"
} // namespace scalar
const Kernels SCALAR = {"scalar", scalar::SIGNED_BYTES, scalar::forward};
} // namespace edgetune
