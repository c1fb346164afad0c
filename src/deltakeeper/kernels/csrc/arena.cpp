#include "arena.hpp"

#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace deltakeeper {
namespace {

constexpr std::size_t PAGE = 2u << 20;
constexpr std::size_t CHUNK = 8 * PAGE;  // what is not written yet costs nothing

class Chunk {
 public:
  explicit Chunk(std::size_t bytes) : bytes_((bytes + PAGE - 1) / PAGE * PAGE) {
#if defined(__linux__)
    void* found = mmap(nullptr, bytes_ + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) throw std::bad_alloc();
    char* start = static_cast<char*>(found);
    begin_ = start + (PAGE - reinterpret_cast<uintptr_t>(start) % PAGE) % PAGE;
    if (begin_ > start) munmap(start, static_cast<std::size_t>(begin_ - start));
    char* end = begin_ + bytes_;
    if (start + bytes_ + PAGE > end) munmap(end, static_cast<std::size_t>(start + bytes_ + PAGE - end));
    madvise(begin_, bytes_, MADV_HUGEPAGE);  // advice: small pages do as well, slower
#else
    begin_ = static_cast<char*>(std::calloc(1, bytes_ + 64));
    if (!begin_) throw std::bad_alloc();
#endif
  }
  ~Chunk() {
#if defined(__linux__)
    munmap(begin_, bytes_);
#else
    std::free(begin_);
#endif
  }
  Chunk(const Chunk&) = delete;
  Chunk& operator=(const Chunk&) = delete;

  // The next bytes at a multiple of 64, or null where they do not fit.
  char* take(std::size_t bytes) {
    const std::size_t at = (64 - reinterpret_cast<uintptr_t>(begin_ + used_) % 64) % 64 + used_;
    if (at + bytes > bytes_) return nullptr;
    used_ = at + bytes;
    return begin_ + at;
  }

 private:
  char* begin_ = nullptr;
  std::size_t bytes_, used_ = 0;
};

}  // namespace

std::shared_ptr<uint32_t> allocate_words(std::size_t count) {
  thread_local std::weak_ptr<Chunk> open;  // kept by what lies in it
  const std::size_t bytes = count * sizeof(uint32_t);
  std::shared_ptr<Chunk> chunk = open.lock();
  char* found = chunk ? chunk->take(bytes) : nullptr;
  if (!found) {
    chunk = std::make_shared<Chunk>(bytes > CHUNK ? bytes : CHUNK);
    found = chunk->take(bytes);
    open = chunk;
  }
  return {chunk, reinterpret_cast<uint32_t*>(found)};
}

}  // namespace deltakeeper
