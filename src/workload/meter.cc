#include "workload/meter.h"

#include <sys/resource.h>

#include <chrono>
#include <ranges>
#include <string>

#include "io/kernel_file.h"

namespace tokendepot {
namespace {

double cpu_of(int who) {
  rusage usage{};
  getrusage(who, &usage);
  return static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
         static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1e-6;
}

}  // namespace

double steady_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double process_cpu_s() {
  return cpu_of(RUSAGE_SELF);
}

double thread_cpu_s() {
  return cpu_of(RUSAGE_THREAD);
}

uint64_t device_read_bytes() {
  const std::string text = kernel_text("/proc/self/io");
  for (const auto line : text | std::views::split('\n')) {
    const auto [name, value] = cut_at(std::string_view(line), ' ');
    if (name == "read_bytes:") return static_cast<uint64_t>(number_in(value).value_or(0));
  }
  return 0;
}

}  // namespace tokendepot
