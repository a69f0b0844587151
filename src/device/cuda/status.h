// The driver's errors as ours, and what a thread does before it calls the driver.
#pragma once

#include <cuda_runtime_api.h>

#include "base/errors.h"

namespace tokendepot::cuda {

inline Status check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return {};
  cudaGetLastError();  // told here, and not to whoever asks next on this thread
  return fail(ErrorKind::io, "CUDA: {}: {}", what, cudaGetErrorString(status));
}

/// For each of the device's own threads, first. While the engine captures a graph, a thread in the mode that
/// it is born with must not allocate, register or even ask an event: the call fails, and with it the capture.
/// Nothing of ours is part of a graph.
inline Status enter_device(int ordinal) {
  if (auto s = check(cudaSetDevice(ordinal), "cudaSetDevice"); !s) return s;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  return check(cudaThreadExchangeStreamCaptureMode(&mode), "the thread's capture mode");
}

}  // namespace tokendepot::cuda
