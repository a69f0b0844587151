// Device memory and paged caches in it, for tests that need a GPU.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
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

/// How a cache lies in memory.
struct CacheForm {
  enum Dimension : uint8_t { layer, block, plane, token, head };

  GroupShape shape;
  uint32_t blocks = 0;
  /// Outermost first, rows inside the last: this is NHD, one tensor a layer. Opaque pages know layers and
  /// blocks only.
  std::array<Dimension, 5> nesting{layer, block, plane, token, head};
  std::array<uint32_t, 5> gaps{};  // bytes behind each entry of a dimension
  uint32_t split_layers = 0;       // opaque: a bit for each layer whose pages are in two runs

  uint64_t bytes() const { return strides().whole; }
  /// Of one block in one layer, where the form is the default one.
  uint64_t page_bytes() const { return strides().of[block]; }

  PagedCache at(std::byte* base) const {
    PagedCache cache;
    cache.shape = shape;
    cache.block_count = blocks;
    const Strides strides = this->strides();
    const auto of = [&](Dimension dimension) { return static_cast<int64_t>(strides.of[dimension]); };
    for (uint32_t l = 0; l < shape.part.layers(); ++l) {
      auto& planes = cache.layers.emplace_back();
      std::byte* const first = base + l * of(layer);
      if (shape.kind == LayoutKind::opaque) {
        const bool two_pieces = l < 32 && (split_layers >> l & 1u) != 0;
        const uint32_t half = two_pieces ? std::max(16u, shape.page_bytes / 32 * 16) : shape.page_bytes;
        planes.push_back({first, of(block), 0, 0, std::min(half, shape.page_bytes)});
        if (half < shape.page_bytes)
          planes.push_back({first + half, of(block), 0, 0, shape.page_bytes - half});
        continue;
      }
      for (uint32_t p = 0; p < shape.planes; ++p)
        planes.push_back({first + p * of(plane), of(block), of(head), of(token), 0});
    }
    return cache;
  }

 private:
  struct Strides {
    std::array<uint64_t, 5> of{};
    uint64_t whole = 0;
  };
  Strides strides() const {
    const bool opaque = shape.kind == LayoutKind::opaque;
    const std::array<uint64_t, 5> entries{shape.part.layers(), blocks, opaque ? 1u : shape.planes,
                                          opaque ? 1u : shape.block_tokens, opaque ? 1u : shape.part.heads()};
    Strides found;
    found.whole = opaque ? shape.page_bytes : shape.row_bytes;
    for (auto dimension = nesting.rbegin(); dimension != nesting.rend(); ++dimension) {
      found.of[*dimension] = found.whole + gaps[*dimension];
      found.whole = found.of[*dimension] * entries[*dimension];
    }
    return found;
  }
};

}  // namespace tokendepot::testing
