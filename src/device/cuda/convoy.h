// Loads whose payloads are neighbours share one copy: each copy that a kernel waits for leaves the link idle
// for 15 us, and a prompt's extents lie one behind the other, with a header page between them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>

#include "device/device.h"

namespace tokendepot::cuda {

constexpr size_t kMostConvoy = 16;
constexpr uint64_t kMostConvoyBytes = 32 << 20;
constexpr uint64_t kMostGap = 64 << 10;

/// How many works at the head of `queue`, which is not empty, share a copy of at most `most_bytes` with what
/// lies between them: at least one, at most `most`. Payloads on the device are not copied and go alone.
inline size_t convoy_length(const std::deque<ScatterWork*>& queue, size_t most, uint64_t most_bytes) {
  const ScatterWork& first = *queue.front();
  if (first.on_device) return 1;
  most = std::min({most, queue.size(), kMostConvoy});
  const std::byte* const begin = first.payload.data();
  const std::byte* end = begin + first.payload.size();
  size_t length = 1;
  for (; length < most; ++length) {
    const ScatterWork& next = *queue[length];
    const std::byte* const at = next.payload.data();
    if (next.on_device || at < end || static_cast<uint64_t>(at - end) > kMostGap) break;
    end = at + next.payload.size();
    if (static_cast<uint64_t>(end - begin) > most_bytes) break;
  }
  return length;
}

}  // namespace tokendepot::cuda
