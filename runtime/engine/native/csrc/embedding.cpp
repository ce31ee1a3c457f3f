// Rows of the embedding, read out of the bundle when they are wanted.
#include "bundle.h"

#include <cmath>
#include <cstring>
#include <stdexcept>

namespace edgetune {

namespace {

void all_finite(const float *x, int count) {
    for (int i = 0; i < count; i++)
        if (!std::isfinite(x[i])) throw std::runtime_error("an embedding has a number that is not finite");
}

} // namespace

void make_row(OpenModel &open) {
    const Table &t = open.embedding;
    open.row.resize(t.row_bytes() + (t.bits ? t.blocks() * 4 + t.zero_bytes() : 0));
}

void embed(OpenModel &open, int32_t id, float *x) {
    const Table &t = open.embedding;
    const size_t row = size_t(id), blocks = t.blocks();
    uint8_t *bytes = open.row.data() + blocks * 4, *zeros = bytes + t.row_bytes();
    open.file->copy(t.weight + row * t.row_bytes(), t.row_bytes(), bytes);
    if (!t.bits) {
        for (int i = 0; i < t.columns; i++) {
            float value;
            std::memcpy(&value, bytes + size_t(i) * 4, 4);
            x[i] = value * t.multiplier;
        }
        return all_finite(x, t.columns);
    }
    open.file->copy(reinterpret_cast<const uint8_t *>(t.scales + row * blocks), blocks * 4,
                    open.row.data());
    if (t.zeros) open.file->copy(t.zeros + row * t.zero_bytes(), t.zero_bytes(), zeros);
    for (int i = 0; i < t.columns; i++) {
        const int b = i / t.block;
        int zero = t.bits == 4 ? 8 : 128, value = bytes[i];
        if (t.bits == 4) {
            value = bytes[i / 2] >> 4 * (i % 2) & 15;
            if (t.zeros) zero = zeros[b / 2] >> 4 * (b % 2) & 15;
        } else if (t.zeros) {
            zero = zeros[b];
        }
        float scale;
        std::memcpy(&scale, open.row.data() + size_t(b) * 4, 4);
        x[i] = float(value - zero) * scale * t.multiplier;
    }
    all_finite(x, t.columns);
}

} // namespace edgetune
