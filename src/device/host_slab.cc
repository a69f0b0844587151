#include "device/host_slab.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>

#include "base/log.h"
#include "io/huge_memory.h"

namespace tokendepot {

HostSlab::HostSlab(uint64_t bytes) : HostSlab(reserve(bytes)) {}

HostSlab::Memory HostSlab::reserve(uint64_t bytes) {
  const uint64_t rounded = align_up(bytes);
  if (rounded == 0) return {};
  std::byte* const memory = map_huge_memory(rounded);
  if (memory == nullptr) {
    log(LogLevel::error, "slab of {} bytes: {}; loads and stores that need staging memory will fail", rounded,
        std::strerror(errno));
    return {};
  }
  return {memory, rounded};
}

HostSlab::~HostSlab() {
  if (base() != nullptr) munmap(base(), size());
}

}  // namespace tokendepot
