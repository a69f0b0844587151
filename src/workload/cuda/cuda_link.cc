#include <cuda_runtime_api.h>

#include <array>
#include <cstring>

#include "device/cuda/status.h"
#include "workload/link.h"
#include "workload/meter.h"

namespace tokendepot {
namespace {

class CudaLink final : public Link {
 public:
  CudaLink(int ordinal, uint64_t bytes) : ordinal_(ordinal), bytes_(bytes) {}
  ~CudaLink() override;
  CudaLink(const CudaLink&) = delete;
  CudaLink& operator=(const CudaLink&) = delete;

  Status open();
  Result<Rate> copy(Way way, uint64_t piece, double seconds) override;
  Result<Rate> copy_large(Way way, double seconds) override { return copy(way, bytes_ / kStreams, seconds); }

 private:
  Status enqueue(Way way, uint64_t piece, uint64_t index);

  static constexpr size_t kStreams = 4;
  int ordinal_;
  uint64_t bytes_;
  void* host_ = nullptr;
  void* device_ = nullptr;
  std::array<cudaStream_t, kStreams> streams_{};
  std::array<std::array<cudaEvent_t, kStreams>, 2> ends_{};
};

CudaLink::~CudaLink() {
  cudaSetDevice(ordinal_);
  for (cudaStream_t stream : streams_) {
    if (stream != nullptr) cudaStreamDestroy(stream);
  }
  for (const auto& round : ends_) {
    for (cudaEvent_t end : round) {
      if (end != nullptr) cudaEventDestroy(end);
    }
  }
  cudaFree(device_);
  cudaFreeHost(host_);
}

Status CudaLink::open() {
  if (auto s = cuda::enter_device(ordinal_); !s) return s;
  if (auto s = cuda::check(cudaHostAlloc(&host_, bytes_, cudaHostAllocDefault),
                           "pinned memory for the link's limit");
      !s)
    return s;
  std::memset(host_, 0x5A, bytes_);
  if (auto s = cuda::check(cudaMalloc(&device_, bytes_), "device memory for the link's limit"); !s) return s;
  for (cudaStream_t& stream : streams_) {
    if (auto s = cuda::check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream"); !s)
      return s;
  }
  for (auto& round : ends_) {
    for (cudaEvent_t& end : round) {
      const auto flags = cudaEventBlockingSync | cudaEventDisableTiming;
      if (auto s = cuda::check(cudaEventCreateWithFlags(&end, flags), "an event"); !s) return s;
    }
  }
  return {};
}

Status CudaLink::enqueue(Way way, uint64_t piece, uint64_t index) {
  auto* const host = static_cast<std::byte*>(host_) + index * piece;
  auto* const device = static_cast<std::byte*>(device_) + index * piece;
  const cudaStream_t stream = streams_[index % kStreams];
  const bool in = way == Way::to_device || (way == Way::both && index % 2 == 0);
  return cuda::check(in ? cudaMemcpyAsync(device, host, piece, cudaMemcpyHostToDevice, stream)
                        : cudaMemcpyAsync(host, device, piece, cudaMemcpyDeviceToHost, stream),
                     "a copy");
}

Result<Link::Rate> CudaLink::copy(Way way, uint64_t piece, double seconds) {
  if (auto s = cuda::enter_device(ordinal_); !s) return std::unexpected(s.error());
  const uint64_t pieces = bytes_ / piece;
  const double cpu = process_cpu_s();
  const double begin = steady_s();
  uint64_t rounds = 0;
  // One round is always queued behind the one that is waited for: the link never idles.
  const auto wait_for_round = [&](uint64_t round) -> Status {
    for (cudaEvent_t end : ends_[round % 2]) {
      if (auto s = cuda::check(cudaEventSynchronize(end), "a copy"); !s) return s;
    }
    return {};
  };
  for (; rounds < 2 || steady_s() - begin < seconds; ++rounds) {
    for (uint64_t p = 0; p < pieces; ++p) {
      if (auto s = enqueue(way, piece, p); !s) return std::unexpected(s.error());
    }
    for (size_t i = 0; i < kStreams; ++i) {
      if (auto s = cuda::check(cudaEventRecord(ends_[rounds % 2][i], streams_[i]), "an event"); !s)
        return std::unexpected(s.error());
    }
    if (rounds == 0) continue;
    if (auto s = wait_for_round(rounds - 1); !s) return std::unexpected(s.error());
  }
  if (auto s = wait_for_round(rounds - 1); !s) return std::unexpected(s.error());
  const double gb = static_cast<double>(rounds * pieces * piece) * 1e-9;
  return Rate{gb / (steady_s() - begin), (process_cpu_s() - cpu) / gb};
}

}  // namespace

Result<std::unique_ptr<Link>> Link::make(uint32_t ordinal, uint64_t bytes) {
  auto made = std::make_unique<CudaLink>(static_cast<int>(ordinal), bytes);
  if (auto opened = made->open(); !opened) return std::unexpected(opened.error());
  return made;
}

}  // namespace tokendepot
