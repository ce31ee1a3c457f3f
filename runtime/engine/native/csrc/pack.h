// Weights out of the bundle's order into the order in which the products read them.
#pragma once
#include <stdint.h>

#include "model.h"

namespace edgetune {

// A matrix as the bundle has it.
struct Stored {
    const uint8_t *weight = nullptr, *zeros = nullptr;
    const float *scales = nullptr;
    bool means = false;
    int stored_blocks = 0; // of a row, those of the means included
};

// The power of two by which scales and offsets are divided, so that half precision holds them.
float scale_unit(const Matrix &matrix, const Stored &stored);

// Whether any block has an offset: a zero that is not in the middle, or a column of means.
bool has_offsets(const Matrix &matrix, const Stored &stored);

// Write the groups from `first` to `last` of a matrix.
void pack_groups(const Matrix &matrix, const Stored &stored, bool signed_bytes, int first, int last);

} // namespace edgetune
