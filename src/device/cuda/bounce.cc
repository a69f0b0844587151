#include "device/cuda/bounce.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "device/cuda/status.h"
#include "io/mapping.h"

namespace tokendepot::cuda {
namespace {

/// False: the mapping failed.
bool copy(std::byte* to, const std::byte* from, uint64_t bytes, std::span<const std::byte> guarded) {
  auto body = [=] { std::memcpy(to, from, bytes); };
  if (!guarded.empty()) return guard_mapping(guarded, body);
  body();
  return true;
}

}  // namespace

Bounce::~Bounce() {
  for (cudaEvent_t event : moved_) {
    if (event != nullptr) cudaEventDestroy(event);
  }
  if (memory_ != nullptr) cudaFreeHost(memory_);
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

Status Bounce::start() {
  if (auto s = check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream"); !s) return s;
  for (cudaEvent_t& event : moved_) {
    if (auto s = check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync),
                       "an event");
        !s)
      return s;
  }
  void* memory = nullptr;
  auto pinned = check(cudaHostAlloc(&memory, kPinnedBytes, cudaHostAllocDefault), "pinned memory for copies");
  memory_ = static_cast<std::byte*>(memory);
  return pinned;
}

// Nothing may be on its way when the caller gives the memory of the copy to somebody else.
Bounce::Copied Bounce::stop(Copied why) {
  cudaStreamSynchronize(stream_);
  return why;
}

Bounce::Copied Bounce::to_device(std::byte* device, std::span<const std::byte> from, bool guarded,
                                 cudaStream_t then) {
  TD_CHECK(from.size() <= kPieceBytes);
  std::byte* const piece = memory_ + piece_ * kPieceBytes;
  cudaEvent_t moved = moved_[piece_];
  piece_ = 1 - piece_;
  if (cudaEventSynchronize(moved) != cudaSuccess) return stop(Copied::failed);
  if (!copy(piece, from.data(), from.size(), guarded ? from : std::span<const std::byte>()))
    return stop(Copied::gone);
  if (cudaMemcpyAsync(device, piece, from.size(), cudaMemcpyHostToDevice, stream_) != cudaSuccess ||
      cudaEventRecord(moved, stream_) != cudaSuccess)
    return stop(Copied::failed);
  return cudaStreamWaitEvent(then, moved) == cudaSuccess ? Copied::ok : stop(Copied::failed);
}

Bounce::Copied Bounce::to_host(std::span<std::byte> to, const std::byte* device, bool guarded) {
  const uint64_t pieces = (to.size() + kPieceBytes - 1) / kPieceBytes;
  const auto bytes_of = [&](uint64_t i) { return std::min(kPieceBytes, to.size() - i * kPieceBytes); };
  const auto fetch = [&](uint64_t i) {
    return cudaMemcpyAsync(memory_ + i % 2 * kPieceBytes, device + i * kPieceBytes, bytes_of(i),
                           cudaMemcpyDeviceToHost, stream_) == cudaSuccess &&
           cudaEventRecord(moved_[i % 2], stream_) == cudaSuccess;
  };
  if (!fetch(0)) return stop(Copied::failed);
  for (uint64_t i = 0; i < pieces; ++i) {
    if (i + 1 < pieces && !fetch(i + 1)) return stop(Copied::failed);
    if (cudaEventSynchronize(moved_[i % 2]) != cudaSuccess) return stop(Copied::failed);
    if (!copy(to.data() + i * kPieceBytes, memory_ + i % 2 * kPieceBytes, bytes_of(i),
              guarded ? to : std::span<const std::byte>()))
      return stop(Copied::gone);
  }
  return Copied::ok;
}

}  // namespace tokendepot::cuda
