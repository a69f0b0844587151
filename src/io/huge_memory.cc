#include "io/huge_memory.h"

#include <sys/mman.h>

#include <cerrno>

namespace tokendepot {
namespace {

constexpr uint64_t kHugePageBytes = 2ull << 20;

}  // namespace

std::byte* map_huge_memory(uint64_t bytes) {
  const uint64_t reserved = bytes + kHugePageBytes;
  if (reserved < bytes) {
    errno = ENOMEM;
    return nullptr;
  }
  void* const mapped =
      ::mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  std::byte* const begin = static_cast<std::byte*>(mapped);
  const uint64_t before = -reinterpret_cast<uintptr_t>(begin) % kHugePageBytes;
  if (before > 0) ::munmap(begin, before);
  ::munmap(begin + before + bytes, kHugePageBytes - before);
  // Advice: a system without huge pages serves the same bytes from small ones.
  ::madvise(begin + before, bytes, MADV_HUGEPAGE);
  return begin + before;
}

}  // namespace tokendepot
