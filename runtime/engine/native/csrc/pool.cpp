#include "pool.h"

#include <chrono>
#include <stdexcept>
#include <string>
#include <system_error>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace edgetune {

void barrier(Pool *pool);

namespace {

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

constexpr int SPINS = 2000;                             // pauses: some tens of microseconds
constexpr auto YIELDS = std::chrono::microseconds(200); // giving the core away in between

} // namespace

Pool::Pool(int count) : threads(count) {
    try {
        for (int t = 1; t < threads; t++) workers.emplace_back([this, t] { work(t); });
    } catch (const std::system_error &) {
        stop();
        throw std::runtime_error("the system gives no " + std::to_string(threads) + " threads");
    }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
    stopping = true;
    started.fetch_add(1);
    wake();
    for (auto &worker : workers) worker.join();
}

// Spin, then give the core away, then sleep until somebody says that something has changed.
template <class Ready> void Pool::wait(const Ready &ready) {
    for (int i = 0; i < SPINS; i++) {
        if (ready()) return;
        pause();
    }
    const auto until = std::chrono::steady_clock::now() + YIELDS;
    while (std::chrono::steady_clock::now() < until) {
        if (ready()) return;
        std::this_thread::yield();
    }
    std::unique_lock<std::mutex> lock(mutex);
    sleeping.fetch_add(1);
    changed.wait(lock, ready);
    sleeping.fetch_sub(1);
}

void Pool::wake() {
    if (sleeping.load() > 0) {
        { std::lock_guard<std::mutex> lock(mutex); }
        changed.notify_all();
    }
}

void Pool::barrier() {
    if (threads == 1) return;
    const uint32_t mine = phase.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
        arrived.store(0, std::memory_order_relaxed);
        phase.store(mine + 1); // sequentially consistent: against `sleeping`
        wake();
    } else {
        wait([&] { return phase.load() != mine; });
    }
}

void Pool::run(Job next, void *with) {
    job = next;
    context = with;
    started.fetch_add(1);
    wake();
    job(context, 0);
    barrier();
}

void Pool::work(int thread) {
    uint32_t done = 0;
    while (true) {
        wait([&] { return started.load() != done; });
        done++;
        if (stopping) return;
        job(context, thread);
        barrier();
    }
}


void barrier(Pool *pool) { pool->barrier(); }

} // namespace edgetune
