// The driver's errors as ours.
#pragma once

#include <cuda_runtime_api.h>

#include "base/errors.h"

namespace tokendepot::cuda {

inline Status check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return {};
  return fail(ErrorKind::io, "CUDA: {}: {}", what, cudaGetErrorString(status));
}

}  // namespace tokendepot::cuda
