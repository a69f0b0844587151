#include <cuda_runtime_api.h>

#include "device/cuda/status.h"
#include "workload/cache_memory.h"
#include "workload/cuda/stamp.h"

namespace tokendepot {
namespace {

class CudaMemory final : public CacheMemory {
 public:
  static Result<std::unique_ptr<CacheMemory>> make(int ordinal, uint64_t bytes);
  ~CudaMemory() override {
    cudaSetDevice(ordinal_);
    if (stream_ != nullptr) cudaStreamSynchronize(stream_);
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
    cudaFree(data_);
  }
  CudaMemory(const CudaMemory&) = delete;
  CudaMemory& operator=(const CudaMemory&) = delete;

  std::byte* data() override { return static_cast<std::byte*>(data_); }
  Status write(uint64_t at, std::span<const std::byte> bytes) override {
    if (auto s = cuda::enter_device(ordinal_); !s) return s;
    if (auto s = cuda::check(
            cudaMemcpyAsync(data() + at, bytes.data(), bytes.size(), cudaMemcpyHostToDevice, stream_),
            "filling the paged cache");
        !s)
      return s;
    return cuda::check(cudaStreamSynchronize(stream_), "filling the paged cache");
  }
  Status read(uint64_t at, std::span<std::byte> out) override {
    if (auto s = cuda::enter_device(ordinal_); !s) return s;
    if (auto s =
            cuda::check(cudaMemcpyAsync(out.data(), data() + at, out.size(), cudaMemcpyDeviceToHost, stream_),
                        "reading the paged cache");
        !s)
      return s;
    return cuda::check(cudaStreamSynchronize(stream_), "reading the paged cache");
  }
  Status stamp(uint64_t at, uint64_t bytes, const PayloadId& id) override {
    if (auto s = cuda::enter_device(ordinal_); !s) return s;
    return cuda::check(cuda::stamp_async(data() + at, bytes, id.process, id.serial, stream_),
                       "stamping a payload");
  }
  void* stream() override { return stream_; }

 private:
  explicit CudaMemory(int ordinal) : ordinal_(ordinal) {}

  int ordinal_;
  void* data_ = nullptr;
  cudaStream_t stream_ = nullptr;
};

Result<std::unique_ptr<CacheMemory>> CudaMemory::make(int ordinal, uint64_t bytes) {
  std::unique_ptr<CudaMemory> made(new CudaMemory(ordinal));
  if (auto s = cuda::enter_device(ordinal); !s) return std::unexpected(s.error());
  if (auto s = cuda::check(cudaMalloc(&made->data_, bytes), "device memory for the paged cache"); !s)
    return fail(ErrorKind::no_space, "no {} bytes on cuda:{} for the paged cache: {}", bytes, ordinal,
                s.error().message);
  if (auto s = cuda::check(cudaStreamCreateWithFlags(&made->stream_, cudaStreamNonBlocking), "a stream"); !s)
    return std::unexpected(s.error());
  return made;
}

}  // namespace

Result<std::unique_ptr<CacheMemory>> make_cuda_memory(uint32_t ordinal, uint64_t bytes) {
  return CudaMemory::make(static_cast<int>(ordinal), bytes);
}

}  // namespace tokendepot
