// What a run costs: time, CPU, and what the kernel says it read from storage.
#pragma once

#include <cstdint>

namespace tokendepot {

double steady_s();
/// User and system time of all threads of this process.
double process_cpu_s();
/// The same of the calling thread.
double thread_cpu_s();
/// Bytes that storage delivered to this process (read_bytes of /proc/self/io): not what came out of the page
/// cache. 0 where the kernel does not say.
uint64_t device_read_bytes();

}  // namespace tokendepot
