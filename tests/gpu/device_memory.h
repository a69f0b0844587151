// Device memory and paged caches in it, for tests that need a GPU.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <vector>

#include "tokendepot/layout.h"

namespace tokendepot::testing {

inline bool has_gpu() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

#define SKIP_WITHOUT_GPU() \
  if (!::tokendepot::testing::has_gpu()) GTEST_SKIP() << "no GPU on this machine"

inline void must(cudaError_t status) {
  ASSERT_EQ(status, cudaSuccess) << cudaGetErrorString(status);
}

class DeviceMemory {
 public:
  explicit DeviceMemory(uint64_t bytes) : bytes_(bytes) { must(cudaMalloc(&memory_, bytes)); }
  ~DeviceMemory() { cudaFree(memory_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  std::byte* data() const { return static_cast<std::byte*>(memory_); }
  uint64_t size() const { return bytes_; }
  void upload(const std::vector<uint8_t>& from) {
    must(cudaMemcpy(memory_, from.data(), from.size(), cudaMemcpyHostToDevice));
  }
  /// Done when it returns: streams that do not wait for the default one may go on.
  void fill(uint64_t begin, uint64_t bytes, uint8_t value) {
    must(cudaMemset(data() + begin, value, bytes));
    must(cudaDeviceSynchronize());
  }
  std::vector<uint8_t> download() const {
    std::vector<uint8_t> bytes(bytes_);
    must(cudaMemcpy(bytes.data(), memory_, bytes_, cudaMemcpyDeviceToHost));
    return bytes;
  }

 private:
  void* memory_ = nullptr;
  uint64_t bytes_;
};

inline std::vector<uint8_t> random_bytes(uint64_t bytes, uint64_t seed) {
  std::vector<uint8_t> out(bytes);
  std::mt19937_64 random(seed);
  for (uint64_t at = 0; at < bytes; at += 8) {
    const uint64_t value = random();
    std::memcpy(out.data() + at, &value, std::min<uint64_t>(8, bytes - at));
  }
  return out;
}

/// How a random cache lies in memory.
struct CacheForm {
  GroupShape shape;
  uint32_t blocks = 0;
  bool heads_first = false;   // HND instead of NHD
  uint32_t split_layers = 0;  // opaque: a bit for each layer whose pages are in two runs

  uint64_t page_bytes() const {
    return shape.kind == LayoutKind::opaque
               ? shape.page_bytes
               : uint64_t{shape.planes} * shape.block_tokens * shape.part.heads() * shape.row_bytes;
  }
  uint64_t bytes() const { return page_bytes() * blocks * shape.part.layers(); }

  PagedCache at(std::byte* base) const {
    PagedCache cache;
    cache.shape = shape;
    cache.block_count = blocks;
    const auto page = static_cast<int64_t>(page_bytes());
    for (uint32_t layer = 0; layer < shape.part.layers(); ++layer) {
      auto& planes = cache.layers.emplace_back();
      std::byte* const first = base + layer * page_bytes() * blocks;
      if (shape.kind == LayoutKind::opaque) {
        const bool two_pieces = layer < 32 && (split_layers >> layer & 1u) != 0;
        const uint32_t half = two_pieces ? std::max(16u, shape.page_bytes / 32 * 16) : shape.page_bytes;
        if (!two_pieces || half >= shape.page_bytes) {
          planes.push_back({first, page, 0, 0, shape.page_bytes});
        } else {
          planes.push_back({first, page, 0, 0, half});
          planes.push_back({first + half, page, 0, 0, shape.page_bytes - half});
        }
        continue;
      }
      const uint64_t plane = uint64_t{shape.block_tokens} * shape.part.heads() * shape.row_bytes;
      const int64_t row = shape.row_bytes;
      for (uint32_t p = 0; p < shape.planes; ++p) {
        planes.push_back({first + p * plane, page, heads_first ? row * shape.block_tokens : row,
                          heads_first ? row : row * static_cast<int64_t>(shape.part.heads()), 0});
      }
    }
    return cache;
  }
};

}  // namespace tokendepot::testing
