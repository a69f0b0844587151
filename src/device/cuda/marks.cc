#include "device/cuda/marks.h"

#include "base/errors.h"
#include "device/cuda/on_device.h"
#include "device/cuda/status.h"

namespace tokendepot::cuda {

Marks::~Marks() {
  for (cudaEvent_t event : reached_) {
    if (event != nullptr) cudaEventDestroy(event);
  }
  if (arrived_ != nullptr) cudaEventDestroy(arrived_);
  if (order_ != nullptr) cudaStreamDestroy(order_);
}

Status Marks::start() {
  if (auto s = check(cudaStreamCreateWithFlags(&order_, cudaStreamNonBlocking), "a stream"); !s) return s;
  if (auto s = check(cudaEventCreateWithFlags(&arrived_, cudaEventDisableTiming), "an event"); !s) return s;
  for (cudaEvent_t& event : reached_) {
    if (auto s = check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "an event"); !s) return s;
  }
  return {};
}

// The default stream is that of the device which is current on the calling thread, a thread of the engine's.
Result<uint64_t> Marks::mark(cudaStream_t stream) {
  if (stream == cudaStreamPerThread && !is_current(ordinal_)) {
    return fail(
        ErrorKind::invalid_argument,
        "the calling thread's own default stream is not one of cuda:{}, which is not its current device",
        ordinal_);
  }
  return on_device(ordinal_, [this, stream] { return mark_here(stream); });
}

Result<uint64_t> Marks::mark_here(cudaStream_t stream) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  const cudaError_t asked = cudaStreamIsCapturing(stream, &capture);
  if (asked == cudaErrorStreamCaptureImplicit ||
      (asked == cudaSuccess && capture != cudaStreamCaptureStatusNone)) {
    return fail(ErrorKind::busy, "the stream is being captured into a CUDA graph and cannot be marked");
  }
  if (auto s = check(asked, "the stream to mark"); !s) return std::unexpected(s.error());
  std::lock_guard lock(mutex_);
  if (auto s = check(cudaEventRecord(arrived_, stream), "marking the stream"); !s)
    return std::unexpected(s.error());
  if (auto s = check(cudaStreamWaitEvent(order_, arrived_), "marking the stream"); !s)
    return std::unexpected(s.error());
  if (auto s = check(cudaEventRecord(reached_[(last_ + 1) % reached_.size()], order_), "marking the stream");
      !s)
    return std::unexpected(s.error());
  return ++last_;
}

cudaError_t Marks::wait(cudaStream_t stream, uint64_t mark) {
  if (mark == 0) return cudaSuccess;
  std::lock_guard lock(mutex_);
  return cudaStreamWaitEvent(stream, reached_[mark % reached_.size()]);
}

}  // namespace tokendepot::cuda
