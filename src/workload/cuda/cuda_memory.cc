#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "device/cuda/status.h"
#include "workload/cache_memory.h"
#include "workload/payload.h"

namespace tokendepot {
namespace {

/// Stamps go through pinned pieces in turn, so that the host does not wait for the copy.
constexpr size_t kPieces = 16;

class CudaMemory final : public CacheMemory {
 public:
  static Result<std::unique_ptr<CacheMemory>> make(int ordinal, uint64_t bytes);
  ~CudaMemory() override {
    cudaSetDevice(ordinal_);
    if (stream_ != nullptr) cudaStreamSynchronize(stream_);
    for (Piece& piece : pieces_) {
      cudaFreeHost(piece.host);
      cudaFree(piece.device);
      if (piece.taken != nullptr) cudaEventDestroy(piece.taken);
    }
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
  Status stamp(uint64_t at, std::span<const uint64_t> stamps) override;
  void* stream() override { return stream_; }

 private:
  struct Piece {
    void* host = nullptr;
    void* device = nullptr;
    cudaEvent_t taken = nullptr;
  };
  static constexpr size_t kPieceStamps = 64 << 10;  // those of 32 MiB

  explicit CudaMemory(int ordinal) : ordinal_(ordinal) {}

  int ordinal_;
  void* data_ = nullptr;
  cudaStream_t stream_ = nullptr;
  std::array<Piece, kPieces> pieces_;
  size_t next_piece_ = 0;
};

Result<std::unique_ptr<CacheMemory>> CudaMemory::make(int ordinal, uint64_t bytes) {
  std::unique_ptr<CudaMemory> made(new CudaMemory(ordinal));
  if (auto s = cuda::enter_device(ordinal); !s) return std::unexpected(s.error());
  if (auto s = cuda::check(cudaMalloc(&made->data_, bytes), "device memory for the paged cache"); !s)
    return fail(ErrorKind::no_space, "no {} bytes on cuda:{} for the paged cache: {}", bytes, ordinal,
                s.error().message);
  if (auto s = cuda::check(cudaStreamCreateWithFlags(&made->stream_, cudaStreamNonBlocking), "a stream"); !s)
    return std::unexpected(s.error());
  constexpr size_t kPieceBytes = kPieceStamps * sizeof(uint64_t);
  for (Piece& piece : made->pieces_) {
    for (const cudaError_t status : {cudaHostAlloc(&piece.host, kPieceBytes, cudaHostAllocDefault),
                                     cudaMalloc(&piece.device, kPieceBytes),
                                     cudaEventCreateWithFlags(&piece.taken, cudaEventDisableTiming)}) {
      if (auto s = cuda::check(status, "memory for stamps"); !s) return std::unexpected(s.error());
    }
  }
  return made;
}

// One copy over the link and one inside the device: single words over the link would cost more than the
// extent.
Status CudaMemory::stamp(uint64_t at, std::span<const uint64_t> stamps) {
  if (auto s = cuda::enter_device(ordinal_); !s) return s;
  for (size_t first = 0; first < stamps.size(); first += kPieceStamps) {
    const auto part = stamps.subspan(first, std::min(kPieceStamps, stamps.size() - first));
    Piece& piece = pieces_[next_piece_++ % kPieces];
    if (auto s = cuda::check(cudaEventSynchronize(piece.taken), "stamps"); !s) return s;
    std::memcpy(piece.host, part.data(), part.size_bytes());
    for (const cudaError_t status :
         {cudaMemcpyAsync(piece.device, piece.host, part.size_bytes(), cudaMemcpyHostToDevice, stream_),
          cudaMemcpy2DAsync(data() + at + first * kStampEvery, kStampEvery, piece.device, sizeof(uint64_t),
                            sizeof(uint64_t), part.size(), cudaMemcpyDeviceToDevice, stream_),
          cudaEventRecord(piece.taken, stream_)}) {
      if (auto s = cuda::check(status, "stamps"); !s) return s;
    }
  }
  return {};
}

}  // namespace

Result<std::unique_ptr<CacheMemory>> make_cuda_memory(uint32_t ordinal, uint64_t bytes) {
  return CudaMemory::make(static_cast<int>(ordinal), bytes);
}

}  // namespace tokendepot
