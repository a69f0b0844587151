// The limit of everything that goes over the card's link: plain copies between pinned and device memory.
#pragma once

#include <array>
#include <cstdint>

#include "gpu/cuda.h"

namespace tokendepot::bench {

class Link {
 public:
  /// Pins `bytes` of host memory and takes as much of the device.
  explicit Link(uint64_t bytes);
  ~Link();
  Link(const Link&) = delete;
  Link& operator=(const Link&) = delete;

  enum class Way : uint8_t { to_device, to_host };
  struct Rate {
    double gb_per_s = 0;
    double cpu_s_per_gb = 0;
  };
  /// Copies of `piece` bytes, dealt to four streams, for at least `seconds`.
  Rate copy(Way way, uint64_t piece, double seconds);
  /// The same with pieces so large that their number does not matter.
  Rate copy_large(Way way, double seconds) { return copy(way, bytes_ / 4, seconds); }

 private:
  static constexpr size_t kStreams = 4;
  uint64_t bytes_;
  void* host_ = nullptr;
  void* device_ = nullptr;
  std::array<Stream, kStreams> streams_;
  std::array<std::array<Event, kStreams>, 2> ends_;
};

}  // namespace tokendepot::bench
