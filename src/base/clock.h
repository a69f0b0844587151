// Time as a seam, so that tests own it.
#pragma once

#include <cstdint>

namespace tokendepot {

class Clock {
 public:
  virtual ~Clock() = default;
  virtual uint64_t steady_ns() const = 0;  // never goes back; deadlines and durations
  virtual uint64_t wall_ns() const = 0;  // since 1970; only written down and shown, never decides correctness
};

/// The machine's clocks.
const Clock& system_clock();

}  // namespace tokendepot
