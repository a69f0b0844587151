// The limit of everything that goes over a GPU's link: plain copies between pinned and device memory.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "tokendepot/error.h"

namespace tokendepot {

class Link {
 public:
  /// Pins `bytes` of host memory and takes as much of the device. `unsupported` in a build without CUDA.
  static Result<std::unique_ptr<Link>> make(uint32_t ordinal, uint64_t bytes);
  virtual ~Link() = default;

  enum class Way : uint8_t { to_device, to_host, both };
  struct Rate {
    double gb_per_s = 0;
    double cpu_s_per_gb = 0;
  };
  /// Copies of `piece` bytes, dealt to four streams (`both`: every other stream the other way), for at least
  /// `seconds`. `piece` is at most `bytes`.
  virtual Result<Rate> copy(Way way, uint64_t piece, double seconds) = 0;
  /// The same with pieces so large that their number does not matter.
  virtual Result<Rate> copy_large(Way way, double seconds) = 0;
};

}  // namespace tokendepot
