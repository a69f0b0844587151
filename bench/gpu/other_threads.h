// What other threads of an engine's process do while a depot stores: the parts of an eager step.
#pragma once

#include <functional>
#include <vector>

#include "gpu/matmul.h"

namespace tokendepot::bench {

struct OtherWork {
  const char* name;
  double parts;  // of one step, whose time is told by the part
  /// One step. It calls `queued` when all its work for the card is queued, and returns when that is done. Of
  /// work that queues nothing: at its end, as of a step whose launches take all of it.
  std::function<void(const std::function<void()>& queued)> step;
};

/// Small kernels by `matmul`, which the card ends sooner than they are launched, memory mapped and given
/// back, and arithmetic in the CPU's caches.
std::vector<OtherWork> other_work(Matmul& matmul);

}  // namespace tokendepot::bench
