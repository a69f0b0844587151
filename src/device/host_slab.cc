#include "device/host_slab.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>

#include "base/log.h"

namespace tokendepot {

HostSlab::HostSlab(uint64_t bytes) : HostSlab(reserve(bytes)) {}

HostSlab::Memory HostSlab::reserve(uint64_t bytes) {
  const uint64_t rounded = align_up(bytes);
  if (rounded == 0) return {};
  void* memory =
      mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    log(LogLevel::error, "slab of {} bytes: {}; loads and stores that need staging memory will fail", rounded,
        std::strerror(errno));
    return {};
  }
  return {static_cast<std::byte*>(memory), rounded};
}

HostSlab::~HostSlab() {
  if (base() != nullptr) munmap(base(), size());
}

}  // namespace tokendepot
