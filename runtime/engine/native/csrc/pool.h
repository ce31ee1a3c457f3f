// Threads that work on one step together: they spin for microseconds, then sleep.
#pragma once
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace edgetune {

using Job = void (*)(void *context, int thread);

struct Pool {
    explicit Pool(int threads);
    ~Pool();
    // Run a job on all threads, the caller's among them; returns when all are done.
    void run(Job job, void *context);
    void barrier();

    const int threads;

  private:
    void work(int thread);
    void stop();
    template <class Ready> void wait(const Ready &ready);
    void wake();

    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<uint32_t> phase{0};
    alignas(64) std::atomic<uint32_t> started{0};
    alignas(64) std::atomic<int> sleeping{0};
    std::atomic<bool> stopping{false};
    Job job = nullptr;
    void *context = nullptr;
    std::mutex mutex;
    std::condition_variable changed;
    std::vector<std::thread> workers;
};

} // namespace edgetune
