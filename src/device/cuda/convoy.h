// Loads whose payloads are neighbours share one copy, and so do stores: each copy that a kernel waits for, or
// that waits for a kernel, leaves the link idle for 15 us, and a prompt's extents lie one behind the other,
// with a header page between them. A load brings the bytes between along. A store must not write there: its
// copy has rows.
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

/// The same for stores: payloads of one size, all as far from the next as the first is from the second.
inline size_t convoy_length(const std::deque<GatherWork*>& queue, size_t most, uint64_t most_bytes) {
  const GatherWork& first = *queue.front();
  most = std::min({most, queue.size(), kMostConvoy});
  if (first.on_device || most < 2) return 1;
  const uint64_t bytes = first.cache->shape.payload_bytes();
  const std::byte* const begin = first.payload.data();
  const std::byte* const second = queue[1]->payload.data();
  if (second < begin + bytes || static_cast<uint64_t>(second - begin) > bytes + kMostGap) return 1;
  const auto pitch = static_cast<uint64_t>(second - begin);
  size_t length = 1;
  for (; length < most && length * pitch + bytes <= most_bytes; ++length) {
    const GatherWork& next = *queue[length];
    if (next.on_device || next.cache->shape.payload_bytes() != bytes ||
        next.payload.data() != begin + length * pitch)
      break;
  }
  return length;
}

}  // namespace tokendepot::cuda
