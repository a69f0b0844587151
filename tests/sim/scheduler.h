// Runs every thread of every simulated process as a fiber, one at a time, in an order that the seed decides,
// on a clock that moves only when nobody can run.
//
// The engine is linked as it is: the linker sends its calls of threads, locks, conditions, clocks and sleep
// (the --wrap list in CMakeLists.txt) to scheduler.cc. A fiber may be left for another one at every lock,
// wait and system call. What runs between two of those is atomic here; that races between plain loads and
// stores are not seen this way is what the ThreadSanitizer build is for.
#pragma once

#include <cstdint>
#include <functional>

#include "random.h"

namespace tokendepot::sim {

using ProcessId = int;
inline constexpr ProcessId kWorld = 0;

/// Before this, and in processes that never call it, all wrapped calls go to the system.
/// Runs `world` as the first fiber and returns when it has ended.
void run_simulation(uint64_t seed, std::function<void()> world);
bool simulating();

Random& chance();
uint64_t now_ns();
/// Wall clock of the calling process: skewed, and not bound to go forward.
uint64_t wall_ns();
void set_skew(ProcessId process, int64_t ns);
ProcessId current_process();

void start_fiber(ProcessId process, std::function<void()> body);
void sleep_ns(uint64_t ns);
/// Sometimes lets another fiber run.
void maybe_switch();
/// kill -9: none of its fibers runs again, nothing of its memory is tidied up. Does not return when the
/// caller belongs to it.
void kill_process(ProcessId process);
bool has_fibers(ProcessId process);

}  // namespace tokendepot::sim
