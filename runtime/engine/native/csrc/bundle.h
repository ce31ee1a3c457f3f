// A model out of a plan and a data file: checked, packed in the order in which it is read.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "model.h"
#include "pool.h"

namespace edgetune {

// Memory of zeros that is given back when it goes.
class Block {
  public:
    Block() = default;
    // In huge pages where the system has them, or page by page as they are first written.
    explicit Block(size_t bytes, bool huge);
    Block(Block &&other) noexcept;
    Block &operator=(Block &&other) noexcept;
    ~Block();
    uint8_t *data() const { return start; }
    size_t size() const { return bytes; }

  private:
    uint8_t *start = nullptr;
    size_t bytes = 0;
};

// A file that is read where it lies.
class Mapping {
  public:
    explicit Mapping(const std::string &path);
    ~Mapping();
    const uint8_t *data() const { return start; }
    size_t size() const { return bytes; }
    // Its pages from here on so far are not needed for now.
    void forget(const uint8_t *from, size_t length) const;
    // Copy bytes of the mapping without keeping pages of it; throws when the file has shrunk.
    void copy(const uint8_t *from, size_t length, uint8_t *to) const;

  private:
    int file = -1;
    const uint8_t *start = nullptr;
    size_t bytes = 0;
};

// An embedding's rows as the bundle has them; read where they lie, a row when it is wanted.
struct Table {
    int rows = 0, columns = 0, bits = 0, block = 0;
    float multiplier = 1;
    const uint8_t *weight = nullptr, *zeros = nullptr;
    const float *scales = nullptr;

    size_t blocks() const { return bits ? size_t((columns + block - 1) / block) : 0; }
    size_t row_bytes() const { return bits ? blocks() * size_t(block * bits / 8) : size_t(columns) * 4; }
    size_t zero_bytes() const { return bits == 8 ? blocks() : (blocks() + 1) / 2; }
};

struct Site {
    std::string name;
    const Matrix *matrix;
};

// Everything that a model's pointers point into.
struct OpenModel {
    Model model;
    Table embedding;
    std::vector<uint8_t> row; // of the embedding: bytes, zeros, scales
    const Kernels *kernels = nullptr;
    std::unique_ptr<Mapping> file;
    std::unique_ptr<Pool> pool;
    std::vector<Layer> layers;
    std::vector<Rotary> rotaries;
    std::vector<Site> sites;
    std::vector<Lane> lanes;
    Block weights, buffers;
    std::vector<std::unique_ptr<float[]>> floats;
    std::vector<std::unique_ptr<int32_t[]>> rows;
    std::vector<std::vector<uint8_t>> inlined;
    std::vector<Token> tokens; // of the call under way
    std::mutex one_call;
};

// Throws std::runtime_error with one line.
std::unique_ptr<OpenModel> open_model(const char *plan, size_t plan_bytes, const std::string &path,
                                      int threads, const Kernels *kernels);

std::vector<Matrix *> matrices(OpenModel &open);

// Room for one row of the embedding as it is stored.
void make_row(OpenModel &open);

// One row of the embedding in float32, as the layers begin with it.
void embed(OpenModel &open, int32_t id, float *x);

} // namespace edgetune
