// The C interface: checks, locks, and no exception beyond it.
#include <chrono>
#include <cstdio>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "adapter.h"
#include "bundle.h"
#include "edgetune_native.h"

using namespace edgetune;

struct edgetune_model {
    std::unique_ptr<OpenModel> open;
};

struct edgetune_adapter {
    explicit edgetune_adapter(const OpenModel &open) : adapter(open) {}
    OpenAdapter adapter;
};

namespace {

constexpr int MOST_THREADS = 64;

std::vector<const Kernels *> available() {
    std::vector<const Kernels *> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vnni"))
        found.push_back(&AVX512);
    if (avx2) found.push_back(&AVX2);
#elif defined(__aarch64__)
#if defined(__linux__)
    if (getauxval(AT_HWCAP) & (1 << 20)) found.push_back(&NEON); // HWCAP_ASIMDDP
#else
    found.push_back(&NEON);
#endif
#endif
    return found;
}

const Kernels *chosen(const char *name) {
    const auto found = available();
    if (!name || !*name) {
        if (found.empty())
            throw std::runtime_error("this processor has none of the instruction sets that the "
                                     "native engine is built for");
        return found[0];
    }
    if (!std::strcmp(name, SCALAR.name)) return &SCALAR;
    for (const Kernels *kernels : found)
        if (!std::strcmp(name, kernels->name)) return kernels;
    throw std::runtime_error(std::string("the instruction set ") + name + " is not available here");
}

template <class Result, class Work>
Result guarded(Result failed, char *error, size_t error_bytes, const Work &work) {
    try {
        return work();
    } catch (const std::exception &problem) {
        if (error && error_bytes) std::snprintf(error, error_bytes, "%s", problem.what());
    } catch (...) {
        if (error && error_bytes) std::snprintf(error, error_bytes, "an unknown error");
    }
    return failed;
}

struct Running {
    const Work *work;
    const Kernels *kernels;
};

void run_share(void *context, int thread) {
    const Running &running = *static_cast<Running *>(context);
    running.kernels->forward(running.work, thread);
}

// Spans as tokens; throws what is wrong with them.
int lay_out(OpenModel &open, const edgetune_cache &cache, const edgetune_span *spans, int count) {
    const Model &m = open.model;
    int total = 0;
    for (int s = 0; s < count; s++) {
        const edgetune_span &span = spans[s];
        if (span.count < 1 || span.count > MOST_TOKENS - total)
            throw std::runtime_error("1 to " + std::to_string(MOST_TOKENS) + " tokens a call");
        if (span.slot < 0 || span.slot >= cache.slots || span.length < 0 ||
            span.length + int64_t(span.count) > cache.capacity)
            throw std::runtime_error("the cache is full: a row comes to " +
                                     std::to_string(span.length + int64_t(span.count)) + " of " +
                                     std::to_string(cache.capacity) + " tokens");
        const int64_t most = m.positions ? m.positions : int64_t(m.part_blocks) * KEYS;
        if (span.length + int64_t(span.count) > most)
            throw std::runtime_error("the model has " + std::to_string(most) + " positions");
        for (int i = 0; i < span.count; i++) {
            if (span.ids[i] < 0 || span.ids[i] >= m.vocab)
                throw std::runtime_error("a token id outside the vocabulary: " +
                                         std::to_string(span.ids[i]));
            const edgetune_adapter *adapter = span.adapter;
            if (adapter && &adapter->adapter.open != &open)
                throw std::runtime_error("this adapter was bound for another model");
            embed(open, span.ids[i], m.embedded + int64_t(total) * m.x_line);
            open.tokens[size_t(total++)] = {span.ids[i], span.length + i, span.slot, span.length,
                                            adapter ? &adapter->adapter.adapter : nullptr};
        }
    }
    return total;
}

struct Reading {
    OpenModel *open;
    std::vector<uint64_t> sums;
};

void read_share(void *context, int thread) {
    Reading &reading = *static_cast<Reading *>(context);
    const size_t words = reading.open->weights.size() / 64, threads = size_t(reading.open->model.threads);
    const uint64_t *p =
        reinterpret_cast<const uint64_t *>(reading.open->weights.data()) + words * size_t(thread) / threads * 8;
    const uint64_t *end =
        reinterpret_cast<const uint64_t *>(reading.open->weights.data()) + words * (size_t(thread) + 1) / threads * 8;
    uint64_t sums[8] = {};
    for (; p < end; p += 8)
        for (int i = 0; i < 8; i++) sums[i] += p[i];
    for (uint64_t s : sums) reading.sums[size_t(thread)] += s;
}

} // namespace

extern "C" {

int edgetune_abi(void) { return EDGETUNE_ABI; }

const char *edgetune_instruction_sets(void) {
    static const std::string names = [] {
        std::string all;
        for (const Kernels *kernels : available()) all += (all.empty() ? "" : " ") + std::string(kernels->name);
        return all;
    }();
    return names.c_str();
}

edgetune_model *edgetune_open(const char *plan, size_t plan_bytes, const char *data_path, int threads,
                              int cache_bits, const char *instruction_set, char *error, size_t error_bytes) {
    return guarded<edgetune_model *>(nullptr, error, error_bytes, [&] {
        if (threads < 1 || threads > MOST_THREADS)
            throw std::runtime_error("1 to " + std::to_string(MOST_THREADS) + " threads");
        if (cache_bits != 16 && cache_bits != 8) throw std::runtime_error("a cache of 16 or 8 bits");
        std::unique_ptr<edgetune_model> model(new edgetune_model);
        model->open = open_model(plan, plan_bytes, data_path, threads, chosen(instruction_set));
        model->open->model.cache_bits = cache_bits;
        return model.release();
    });
}

void edgetune_close(edgetune_model *model) { delete model; }

void edgetune_model_sizes(const edgetune_model *model, edgetune_sizes *sizes) {
    OpenModel &open = *model->open;
    const Model &m = open.model;
    uint64_t weights = 0;
    for (const Matrix *matrix : matrices(open)) weights += matrix->bytes();
    *sizes = {m.hidden, m.vocab, m.layer_count, m.heads, m.kv_heads, m.head_dim, m.positions,
              m.cache_bytes(), LANES, MOST_TOKENS, m.threads, weights};
}

const char *edgetune_model_instruction_set(const edgetune_model *model) {
    return model->open->kernels->name;
}

edgetune_adapter *edgetune_adapter_new(edgetune_model *model) {
    return guarded<edgetune_adapter *>(nullptr, nullptr, 0,
                                       [&] { return new edgetune_adapter(*model->open); });
}

int edgetune_adapter_add(edgetune_adapter *adapter, const char *site, int rank, const float *a,
                         const float *b, char *error, size_t error_bytes) {
    return guarded(-1, error, error_bytes, [&] {
        adapter->adapter.add(site, rank, a, b);
        return 0;
    });
}

uint64_t edgetune_adapter_bytes(const edgetune_adapter *adapter) { return adapter->adapter.bytes; }

void edgetune_adapter_free(edgetune_adapter *adapter) { delete adapter; }

int edgetune_run(edgetune_model *model, const edgetune_cache *cache, const edgetune_span *spans,
                 int span_count, const int32_t *wanted, int wanted_count, float *logits, float *states,
                 char *error, size_t error_bytes) {
    return guarded(-1, error, error_bytes, [&] {
        OpenModel &open = *model->open;
        std::lock_guard<std::mutex> lock(open.one_call);
        if (cache->capacity % LANES)
            throw std::runtime_error("a cache holds whole steps of tokens");
        const int count = lay_out(open, *cache, spans, span_count);
        if (!count) return 0;
        int before = -1;
        for (int i = 0; i < wanted_count; i++) {
            if (wanted[i] <= before || wanted[i] >= count)
                throw std::runtime_error("wanted tokens are ascending and among those that run");
            before = wanted[i];
        }
        const Work work = {&open.model, open.tokens.data(), count,
                           {static_cast<uint8_t *>(cache->memory), cache->slots, cache->capacity},
                           wanted, wanted_count, logits, states};
        Running running = {&work, open.kernels};
        open.pool->run(run_share, &running);
        return 0;
    });
}

double edgetune_read_weights(edgetune_model *model) {
    OpenModel &open = *model->open;
    std::lock_guard<std::mutex> lock(open.one_call);
    Reading reading{&open, std::vector<uint64_t>(size_t(open.model.threads))};
    const auto start = std::chrono::steady_clock::now();
    open.pool->run(read_share, &reading);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    static volatile uint64_t kept;
    kept = reading.sums[0];
    (void)kept;
    return took.count();
}

} // extern "C"
