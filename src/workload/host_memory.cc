#include <sys/mman.h>

#include <cerrno>
#include <cstring>

#include "base/errors.h"
#include "io/huge_memory.h"
#include "workload/cache_memory.h"

namespace tokendepot {
namespace {

class HostMemory final : public CacheMemory {
 public:
  HostMemory(std::byte* data, uint64_t bytes) : data_(data), bytes_(bytes) {}
  ~HostMemory() override { ::munmap(data_, bytes_); }
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;

  std::byte* data() override { return data_; }
  Status write(uint64_t at, std::span<const std::byte> bytes) override {
    std::memcpy(data_ + at, bytes.data(), bytes.size());
    return {};
  }
  Status read(uint64_t at, std::span<std::byte> out) override {
    std::memcpy(out.data(), data_ + at, out.size());
    return {};
  }
  Status stamp(uint64_t at, uint64_t bytes, const PayloadId& id) override {
    stamp_payload({data_ + at, bytes}, id);
    return {};
  }
  void* stream() override { return nullptr; }

 private:
  std::byte* data_;
  uint64_t bytes_;
};

}  // namespace

Result<std::unique_ptr<CacheMemory>> make_host_memory(uint64_t bytes) {
  std::byte* const data = map_huge_memory(bytes);
  if (data == nullptr) return fail_errno(errno, "no {} bytes of memory for the paged cache", bytes);
  std::memset(data, 0, bytes);
  return std::make_unique<HostMemory>(data, bytes);
}

}  // namespace tokendepot
