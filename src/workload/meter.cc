#include "workload/meter.h"

#include <sys/resource.h>

#include <chrono>
#include <fstream>
#include <string>

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
  std::ifstream file("/proc/self/io");
  std::string name;
  uint64_t value = 0;
  while (file >> name >> value) {
    if (name == "read_bytes:") return value;
  }
  return 0;
}

}  // namespace tokendepot
