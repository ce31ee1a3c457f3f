// Memory and mapped files.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "bundle.h"

namespace edgetune {

namespace {
constexpr size_t HUGE_PAGE = size_t(2) << 20;
}

Block::Block(size_t wanted, bool huge) {
    if (!wanted) return;
    huge = huge && wanted >= HUGE_PAGE;
    bytes = huge ? (wanted + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE : wanted;
    // A huge page begins at a multiple of its size: take one more, give back what is not needed.
    const size_t room = bytes + (huge ? HUGE_PAGE : 0);
    void *got = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (got == MAP_FAILED)
        throw std::runtime_error("the system gives no " + std::to_string(wanted / 1000000) +
                                 " MB of memory");
    start = static_cast<uint8_t *>(got);
    if (huge) {
        const size_t before = (HUGE_PAGE - reinterpret_cast<uintptr_t>(start) % HUGE_PAGE) % HUGE_PAGE;
        if (before) munmap(start, before);
        if (before < HUGE_PAGE) munmap(start + before + bytes, HUGE_PAGE - before);
        start += before;
#ifdef MADV_HUGEPAGE
        madvise(start, bytes, MADV_HUGEPAGE);
#endif
    }
}

Block::Block(Block &&other) noexcept : start(other.start), bytes(other.bytes) {
    other.start = nullptr;
    other.bytes = 0;
}

Block &Block::operator=(Block &&other) noexcept {
    std::swap(start, other.start);
    std::swap(bytes, other.bytes);
    return *this;
}

Block::~Block() {
    if (start) munmap(start, bytes);
}

Mapping::Mapping(const std::string &path) {
    file = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK); // a pipe: no wait
    struct stat about;
    if (file < 0 || fstat(file, &about) != 0) {
        const std::string why = std::strerror(errno);
        if (file >= 0) close(file);
        throw std::runtime_error("the weights cannot be read: " + why);
    }
    bytes = size_t(about.st_size);
    if (bytes && S_ISREG(about.st_mode)) {
        void *got = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, file, 0);
        if (got != MAP_FAILED) start = static_cast<const uint8_t *>(got);
    }
    if (!start) {
        close(file);
        throw std::runtime_error("the weights cannot be read: the file cannot be mapped");
    }
}

Mapping::~Mapping() {
    munmap(const_cast<uint8_t *>(start), bytes);
    close(file);
}

void Mapping::copy(const uint8_t *from, size_t length, uint8_t *to) const {
    if (from < start || from >= start + bytes) { // not of this file
        std::memcpy(to, from, length);
        return;
    }
    for (size_t done = 0; done < length;) {
        const ssize_t got = pread(file, to + done, length - done, off_t(from - start) + off_t(done));
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) throw std::runtime_error("the weights cannot be read any more");
        done += size_t(got);
    }
}

void Mapping::forget(const uint8_t *from, size_t length) const {
    if (from < start || from + length > start + bytes) return; // not of this file
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    const size_t first = size_t(from - start) / page * page;
    madvise(const_cast<uint8_t *>(start) + first, size_t(from - start) + length - first,
            MADV_DONTNEED);
}

} // namespace edgetune
