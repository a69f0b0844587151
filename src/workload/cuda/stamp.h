#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace tokendepot::cuda {

/// Stamps `bytes` of device memory, a multiple of 512, in order of `stream`.
cudaError_t stamp_async(void* memory, uint64_t bytes, uint32_t process, uint32_t serial, cudaStream_t stream);

}  // namespace tokendepot::cuda
