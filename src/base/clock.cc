#include "base/clock.h"

#include <chrono>

namespace tokendepot {
namespace {

template <typename Source>
uint64_t now_ns() {
  using std::chrono::nanoseconds;
  return static_cast<uint64_t>(
      std::chrono::duration_cast<nanoseconds>(Source::now().time_since_epoch()).count());
}

class SystemClock final : public Clock {
 public:
  uint64_t steady_ns() const override { return now_ns<std::chrono::steady_clock>(); }
  uint64_t wall_ns() const override { return now_ns<std::chrono::system_clock>(); }
};

}  // namespace

const Clock& system_clock() {
  static const SystemClock clock;
  return clock;
}

}  // namespace tokendepot
