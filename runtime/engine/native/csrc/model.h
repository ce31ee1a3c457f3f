// What a model is in memory: matrices in the order in which they are read, layers, adapters.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace edgetune {

constexpr int LANES = 16;       // output rows of a group, keys of a cache step, floats of a vector
constexpr int KEYS = 64;        // keys that are attended to at once, from a multiple of it on
constexpr int COLUMNS = 32;     // input columns of a sub-block: 64 bytes of 4 bits for 4 rows each
constexpr int MOST_TOKENS = 256;
constexpr int FEW_TOKENS = 16;  // of a decode step: attention then divides a row's context
constexpr int MOST_RANKS = 1024; // of one site
constexpr int TOGETHER = 8;      // tokens for which a group of rows is unpacked once
constexpr int ALONE_TOKENS = 2; // up to here every thread computes norms for itself, without waiting

inline int round_up(int value, int step) { return (value + step - 1) / step * step; }

// A linear layer y = W x. 16 rows are a group, and the groups follow each other in the order in which
// they are read: for every block of columns 16 scales, 16 offsets if there are any (both in half
// precision), then the values, 4 columns of 16 rows in 64 bytes (two such fours in 64 bytes where
// values have 4 bits: the lower halves are the even columns of 8).
// A row's weight is multiplier * (scale * (value - middle) + offset).
struct Matrix {
    int outputs = 0, inputs = 0;        // as in the bundle
    int bits = 0, block = 0, blocks = 0; // bits 0: float32, groups of (inputs, 16) numbers
    bool offsets = false;
    bool gated = false;                 // groups alternate: 16 rows of the gate, 16 of what it gates
    int groups = 0;
    float multiplier = 1;
    uint8_t *groups_at = nullptr;
    const int32_t *rows = nullptr;      // (groups * 16): the bundle's row, or -1 for none
    const float *bias = nullptr;        // (groups * 16)
    int site = -1;

    size_t block_bytes() const {
        return size_t(LANES) * 2 * (offsets ? 2 : 1) + size_t(block / COLUMNS) * 64 * bits;
    }
    size_t group_bytes() const {
        return bits ? block_bytes() * size_t(blocks) : size_t(inputs) * LANES * 4;
    }
    size_t bytes() const { return group_bytes() * size_t(groups); }
    int width() const { return groups * LANES; }
};

struct Norm {
    bool present = false, layer = false; // layer: mean and bias too
    float epsilon = 0;
    const float *weight = nullptr, *bias = nullptr;
};

struct Rotary {
    const float *cos = nullptr, *sin = nullptr; // (positions, width / 2)
    int width = 0;
};

enum Activation { SILU, GELU, GELU_TANH };

struct Layer {
    Norm attention_norm, q_norm, k_norm, after_attention, mlp_norm, after_mlp;
    Matrix qkv, attention_out, gate_up, down;
    int rotary = -1, window = 0;
    float scale = 1, softcap = 0;
    Activation activation = SILU;
};

// A x and B of one site, in half precision: of A eight ranks, then
// four, then single ones: (inputs / 16, ranks, 16); of B for each group of 16 rows,
// at `at`, the ranks from first to last (ranks, 16): the others are zeros there.
struct Ranks {
    int32_t at;
    int16_t first, last;
};

struct SiteAdapter {
    int rank = 0;
    float multiplier = 1;
    const uint16_t *a = nullptr, *b = nullptr;
    const Ranks *ranks = nullptr;
};

struct Adapter {
    const SiteAdapter *sites = nullptr; // one a site of the model
};

// Numbers rounded to 8 bits for a product: values, and for each block a scale, the sum of the numbers,
// and where the sum of products begins so that the middle of the weights' values counts as zero.
struct Rounded {
    int8_t *values;
    float *scales, *sums;
    int32_t *starts;
};

// Where a thread (or all of them) keeps the tokens it is at.
struct Lane {
    float *x;      // (tokens, hidden): the residual stream
    float *z;      // (tokens, widest): what a product reads
    float *low;    // (tokens, ranks): A x
    float *heads;  // attention's scratch
    Rounded rounded;
};

struct Token {
    int32_t id, position;
    int32_t slot, start;             // start: tokens of the slot before this call
    const Adapter *adapter;
};

// Of every head's keys, then its values: steps of LANES tokens, each a value a column or a token (keys
// are transposed among themselves) in half precision, or in 8 bits and behind them LANES scales.
struct Cache {
    uint8_t *memory;
    int64_t slots, capacity;
};

struct Pool;

struct Model {
    int hidden = 0, vocab = 0, heads = 0, kv_heads = 0, head_dim = 0, layer_count = 0, positions = 0;
    int head_width = 0; // head_dim in whole vectors
    int cache_bits = 16; // of a number in the cache: 16 or 8

    // what one head's key or value of a token takes in the cache
    int cache_bytes() const { return cache_bits == 8 ? head_width + 4 : 2 * head_width; }
    Layer *layers = nullptr;
    Norm norm;
    Matrix head;
    float logits_softcap = 0;
    Rotary *rotaries = nullptr;
    int rotary_count = 0, site_count = 0;

    int threads = 1;
    Pool *pool = nullptr;
    // buffers
    int x_line = 0, z_line = 0, y_line = 0, low_line = 0;
    float *embedded = nullptr; // (tokens, hidden): what the layers begin with
    float *y = nullptr, *branch = nullptr, *gated = nullptr;
    float *parts = nullptr; // of attention: (FEW_TOKENS, part_blocks, heads, head_width and more)
    int part_blocks = 0;
    Lane *lanes = nullptr;  // one a thread; the first is everyone's where the work is divided
};

// One call: tokens of all rows, what is wanted of them, and where it goes.
struct Work {
    Model *model;
    const Token *tokens;
    int count;
    Cache cache;
    const int32_t *wanted;
    int wanted_count;
    float *logits, *states;
};

struct Kernels {
    const char *name;
    bool signed_bytes;                     // 8-bit values are stored around 0, else around 128
    void (*forward)(const Work *work, int thread);
};

void barrier(Pool *pool);

extern const Kernels SCALAR, AVX2, AVX512, NEON;

} // namespace edgetune
