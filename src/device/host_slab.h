// The host device's staging memory: one anonymous mapping.
#pragma once

#include "device/range_slab.h"

namespace tokendepot {

class HostSlab final : public RangeSlab {
 public:
  /// Reserves address space only; a page (of 2 MiB where the system has them) costs memory once it is
  /// touched. Where even that is refused, the slab is empty and every allocate() answers nullptr.
  explicit HostSlab(uint64_t bytes);
  ~HostSlab() override;

 private:
  struct Memory {
    std::byte* base = nullptr;
    uint64_t bytes = 0;
  };
  static Memory reserve(uint64_t bytes);
  explicit HostSlab(Memory memory) : RangeSlab(memory.base, memory.bytes) {}
};

}  // namespace tokendepot
