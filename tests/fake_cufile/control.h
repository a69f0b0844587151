// What a test tells the fake cuFile to do, and what it saw. Shared by the library and the tests.
#pragma once

#include <atomic>
#include <cstdint>

namespace tokendepot::testing {

struct FakeCuFileControl {
  // What it is like.
  std::atomic<bool> point_to_point = true;  // false: only compatibility mode can be had
  std::atomic<bool> keeps_compat = false;   // its settings allow compatibility mode, whatever is asked for
  std::atomic<bool> forces_compat = false;  // its settings make it the only one, and the driver does not tell
  std::atomic<int> refuse_driver = 0;       // code of cuFileDriverOpen
  std::atomic<int> refuse_files = 0;        // code of cuFileHandleRegister
  std::atomic<int> refuse_buffers = 0;      // code of cuFileBufRegister
  std::atomic<uint64_t> most_bytes = 0;     // of one transfer; 0 = all
  std::atomic<int> fail_reads = 0;          // so many of the next reads fail, -1 = all
  std::atomic<int> fail_writes = 0;
  std::atomic<int> fail_with = 5;          // an errno, or a code of cuFile above 5000
  std::atomic<bool> damage_reads = false;  // flips a bit in what is read
  std::atomic<int> read_delay_us = 0;      // of each read
  // What it saw.
  std::atomic<int> open_files = 0;
  std::atomic<int> reads_begun = 0;
  std::atomic<int> registered_buffers = 0;
  std::atomic<uint64_t> read_bytes = 0;
  std::atomic<uint64_t> written_bytes = 0;
  std::atomic<int> wrong_calls =
      0;  // stale handles, buffers that are not base + offset of the registered one
};

/// The library's own; exported as "fake_cufile_control", "fake_cufile_reset" makes everything new.
using FakeCuFileControlCall = FakeCuFileControl* (*)();
using FakeCuFileResetCall = void (*)();

}  // namespace tokendepot::testing
