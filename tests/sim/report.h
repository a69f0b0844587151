// What one run tells its parent: counters, and the first thing that was wrong. Lives in shared memory.
#pragma once

#include <fmt/format.h>

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

namespace tokendepot::sim {

enum class Injected : uint8_t {
  read_error,
  short_read,
  rot_in_transit,
  write_error,
  short_write,
  torn_write,
  lost_write,
  misdirected_write,
  no_space,
  other_error,
  interrupted,
  slow,
  rot,
  kill,
  power_cut,
  clock_skew,
};
inline constexpr std::array kInjectedNames = {
    "read_error",  "short_read",  "rot_in_transit", "write_error",
    "short_write", "torn_write",  "lost_write",     "misdirected_write",
    "no_space",    "other_error", "interrupted",    "slow",
    "rot",         "kill",        "power_cut",      "clock_skew",
};

enum class Verdict : uint8_t { fine, wrong, lost, hang, capacity, broken };
inline constexpr std::array kVerdictNames = {"fine", "wrong bytes", "acknowledged lost",
                                             "hang", "capacity",    "broken"};

struct Report {
  bool finished = false;
  Verdict verdict = Verdict::fine;
  uint64_t operations = 0;  // loads and stores that ended
  uint64_t hits = 0;        // extents whose bytes were compared
  uint64_t crashes = 0;
  uint64_t writes = 0;  // changes of the simulated disk by the process under a crash sweep
  uint64_t trace = 0;   // digest of everything that happened: equal for equal seeds
  std::array<uint64_t, kInjectedNames.size()> injected{};
  char text[1024] = {};
};

/// The report of this run.
Report& report();
void count(Injected kind);
/// Adds to the trace.
void note(std::string_view what, uint64_t value);
/// A line for who replays a seed; shown with --verbose only, and no step of the schedule.
void tell_line(const std::string& line);
template <typename... Args>
void tell(fmt::format_string<Args...> text, Args&&... args) {
  tell_line(fmt::format(text, std::forward<Args>(args)...));
}
/// Ends the run: something that must hold did not.
[[noreturn]] void violated(Verdict verdict, std::string_view text);

}  // namespace tokendepot::sim
