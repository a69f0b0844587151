#include "workload/cuda/stamp.h"

#include "workload/stamp_word.h"

namespace tokendepot::cuda {
namespace {

__global__ void stamp(uint64_t* memory, uint64_t units, uint32_t process, uint32_t serial) {
  const uint64_t unit = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (unit < units) memory[unit * (kStampEvery / sizeof(uint64_t))] = stamp_word(process, serial, unit);
}

}  // namespace

cudaError_t stamp_async(void* memory, uint64_t bytes, uint32_t process, uint32_t serial, cudaStream_t stream) {
  constexpr unsigned kThreads = 256;
  const uint64_t units = bytes / kStampEvery;
  const auto blocks = static_cast<unsigned>((units + kThreads - 1) / kThreads);
  stamp<<<blocks, kThreads, 0, stream>>>(static_cast<uint64_t*>(memory), units, process, serial);
  return cudaGetLastError();
}

}  // namespace tokendepot::cuda
