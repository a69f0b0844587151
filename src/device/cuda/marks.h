// Marks of the engine's streams: what our own streams wait for before they touch the cache.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <mutex>

#include "tokendepot/error.h"

namespace tokendepot::cuda {

/// Marks form one order, whatever streams they are of: reaching one means that all before it are reached. So
/// the ring may use an event again for a later mark while somebody still waits for the earlier one: that
/// waits a little longer, never too short. Thread-safe.
class Marks {
 public:
  explicit Marks(int ordinal) : ordinal_(ordinal) {}
  ~Marks();
  Marks(const Marks&) = delete;
  Marks& operator=(const Marks&) = delete;
  Status start();

  /// Of a stream of this device, its default stream too, whatever device is current on the calling thread.
  /// `busy` while the stream is being captured: the event would become part of the graph. `invalid_argument`
  /// for the thread's own default stream where that is another device's.
  Result<uint64_t> mark(cudaStream_t stream);
  /// What is queued on `stream` from now on runs when the mark is reached. 0: nothing to wait for.
  cudaError_t wait(cudaStream_t stream, uint64_t mark);

 private:
  Result<uint64_t> mark_here(cudaStream_t stream);

  const int ordinal_;
  std::mutex mutex_;
  cudaStream_t order_ = nullptr;
  cudaEvent_t arrived_ = nullptr;
  std::array<cudaEvent_t, 256> reached_{};  // as many steps of an engine as a load may wait in queues
  uint64_t last_ = 0;
};

}  // namespace tokendepot::cuda
