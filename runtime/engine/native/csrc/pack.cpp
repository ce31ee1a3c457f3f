#include "pack.h"

#include <cfloat>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "half.h"

namespace edgetune {

namespace {

int zero_of(const Matrix &m, const Stored &s, int64_t row, int block) {
    if (!s.zeros) return m.bits == 4 ? 8 : 128;
    if (m.bits == 8) return s.zeros[row * s.stored_blocks + block];
    const int64_t line = (s.stored_blocks + 1) / 2;
    return s.zeros[row * line + block / 2] >> 4 * (block % 2) & 15;
}

// The weight of the column that reads the mean of a block, for one of the block's numbers.
float mean_column(const Matrix &m, const Stored &s, int64_t row, int block) {
    const int at = m.blocks + block / m.block, column = block % m.block;
    const uint8_t *bytes =
        s.weight + (row * s.stored_blocks + at) * m.block * m.bits / 8 + column * m.bits / 8;
    const int value = m.bits == 4 ? *bytes >> 4 * (column % 2) & 15 : *bytes;
    const float scale = s.scales[row * s.stored_blocks + at];
    return scale * float(value - zero_of(m, s, row, at)) / float(m.block);
}

float offset_of(const Matrix &m, const Stored &s, int64_t row, int block) {
    const int middle = m.bits == 4 ? 8 : 128;
    float offset = float(middle - zero_of(m, s, row, block)) * s.scales[row * s.stored_blocks + block];
    return s.means ? offset + mean_column(m, s, row, block) : offset;
}

} // namespace

bool has_offsets(const Matrix &, const Stored &s) { return s.means || s.zeros; }

float scale_unit(const Matrix &m, const Stored &s) {
    const int64_t count = int64_t(m.outputs) * s.stored_blocks;
    float high = 0;
    int wrong = 0;
    for (int64_t i = 0; i < count; i++) {
        const float scale = s.scales[i] < 0 ? -s.scales[i] : s.scales[i];
        high = scale > high ? scale : high;
        wrong |= !(scale <= FLT_MAX);
    }
    if (m.offsets) high *= m.bits == 4 ? 16 : 256; // no offset is larger
    if (wrong || !std::isfinite(high))
        throw std::runtime_error("the weights have a scale that is not finite, or too large");
    int exponent = 0;
    if (!(high > 0)) return 1;
    std::frexp(high, &exponent);
    return std::ldexp(1.0f, exponent - 14); // the largest becomes 8,192 to 16,384
}

static void pack_float(const Matrix &m, const Stored &s, int group) {
    float *to = reinterpret_cast<float *>(m.groups_at) + size_t(group) * m.inputs * LANES;
    const float *weight = reinterpret_cast<const float *>(s.weight);
    for (int64_t k = 0; k < m.inputs; k++)
        for (int i = 0; i < LANES; i++) {
            const int32_t row = m.rows[group * LANES + i];
            to[k * LANES + i] = row < 0 ? 0.0f : weight[k * m.outputs + row];
        }
}

void pack_groups(const Matrix &m, const Stored &s, bool signed_bytes, int first, int last) {
    const size_t block_bytes = m.block_bytes(), source_block = size_t(m.block) * m.bits / 8;
    const int words = int(source_block / 4);
    const uint32_t flip = m.bits == 8 && signed_bytes ? 0x80808080u : 0;
    const uint32_t none = m.bits == 4 ? 0x88888888u : 0x80808080u;
    const float inverse = 1.0f / m.multiplier;
    for (int group = first; group < last; group++) {
        if (!m.bits) {
            pack_float(m, s, group);
            continue;
        }
        uint8_t *at = m.groups_at + m.group_bytes() * size_t(group);
        for (int b = 0; b < m.blocks; b++, at += block_bytes) {
            uint16_t *scales = reinterpret_cast<uint16_t *>(at), *offsets = scales + LANES;
            uint32_t *values = reinterpret_cast<uint32_t *>(at + (m.offsets ? 64 : 32));
            for (int i = 0; i < LANES; i++) {
                const int64_t row = m.rows[group * LANES + i];
                if (row < 0) {
                    scales[i] = 0;
                    if (m.offsets) offsets[i] = 0;
                    for (int w = 0; w < words; w++) values[w * LANES + i] = none ^ flip;
                    continue;
                }
                const int64_t place = row * s.stored_blocks + b;
                scales[i] = float_to_half(s.scales[place] * inverse);
                if (m.offsets) offsets[i] = float_to_half(offset_of(m, s, row, b) * inverse);
                const uint8_t *source = s.weight + place * source_block;
                for (int w = 0; w < words; w++) {
                    uint32_t word;
                    std::memcpy(&word, source + 4 * w, 4);
                    values[w * LANES + i] = word ^ flip;
                }
            }
        }
    }
}

} // namespace edgetune
