// The host device's staging memory: one anonymous mapping, handed out first-fit.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>

#include "device/device.h"

namespace tokendepot {

class HostSlab final : public Slab {
 public:
  /// Reserves address space only; a page costs memory once it is touched. Where even that is refused, the
  /// slab is empty and every allocate() answers nullptr.
  explicit HostSlab(uint64_t bytes);
  ~HostSlab() override;
  HostSlab(const HostSlab&) = delete;
  HostSlab& operator=(const HostSlab&) = delete;

  std::byte* allocate(uint64_t bytes) override;
  void release(std::byte* range) override;
  uint64_t size() const override { return size_; }
  std::byte* base() const { return base_; }

 private:
  std::byte* base_ = nullptr;
  uint64_t size_ = 0;
  std::mutex mutex_;
  std::map<uint64_t, uint64_t> free_;  // offset -> bytes; neighbours are always merged
  std::map<uint64_t, uint64_t> used_;  // offset -> bytes
};

}  // namespace tokendepot
