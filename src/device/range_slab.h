// A slab over memory of any kind: ranges are handed out first-fit, and the memory itself is never touched.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>

#include "device/device.h"

namespace tokendepot {

class RangeSlab : public Slab {
 public:
  /// [base, base + bytes) outlives the slab; `bytes` is rounded down to pages.
  RangeSlab(std::byte* base, uint64_t bytes);
  RangeSlab(const RangeSlab&) = delete;
  RangeSlab& operator=(const RangeSlab&) = delete;

  std::byte* allocate(uint64_t bytes) override;
  void release(std::byte* range) override;
  uint64_t size() const override { return size_; }
  std::byte* base() const override { return base_; }

 private:
  std::byte* const base_;
  const uint64_t size_;
  std::mutex mutex_;
  std::map<uint64_t, uint64_t> free_;  // offset -> bytes; neighbours are always merged
  std::map<uint64_t, uint64_t> used_;  // offset -> bytes
};

}  // namespace tokendepot
