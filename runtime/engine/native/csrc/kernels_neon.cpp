#include "model.h"
#include "simd_neon.h"

namespace edgetune {
namespace neon {
#include "forward.h"
} // namespace neon
const Kernels NEON = {"neon", neon::SIGNED_BYTES, neon::forward};
} // namespace edgetune
