// What every benchmark prints: one line a figure, with the limit that was measured in the same run.
#pragma once

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

namespace tokendepot::bench {

inline void print_result(const std::string& name, double value, const char* unit, double limit) {
  std::printf("RESULT %s %.4g %s limit %.4g ratio %.3f\n", name.c_str(), value, unit, limit,
              limit > 0 ? value / limit : 0.0);
  std::fflush(stdout);
}

inline double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// User and system time of all threads of the process.
inline double cpu_s() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
         static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1e-6;
}

inline double median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

}  // namespace tokendepot::bench
