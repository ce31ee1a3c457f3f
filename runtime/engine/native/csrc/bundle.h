// A model out of a plan and a data file: checked, packed in the order in which it is read.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "model.h"
#include "pool.h"

namespace edgetune {

// Memory that is given back when it goes: in huge pages where the system has them.
class Block {
  public:
    Block() = default;
    explicit Block(size_t bytes);
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

  private:
    const uint8_t *start = nullptr;
    size_t bytes = 0;
};

struct Site {
    std::string name;
    const Matrix *matrix;
};

// Everything that a model's pointers point into.
struct OpenModel {
    Model model;
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

} // namespace edgetune
