// The GPU's part of a load and of a store on its own: how fast, on how many multiprocessors.
#pragma once

#include <cstdint>

namespace tokendepot::bench {

struct KernelRate {
  double gb_per_s = 0;  // of payload
  uint32_t blocks = 0;  // of threads in each launch; at most one is on a multiprocessor while it has others
};

/// Extents of `mib` that go between a paged cache and device memory: gather and digest (`store`), or verify
/// and scatter, queued one behind the other for about `seconds`. Stops the program where the driver fails.
KernelRate measure_kernels(double mib, bool store, double seconds);

}  // namespace tokendepot::bench
