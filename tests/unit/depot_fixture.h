// A small paged cache on the host and a depot in a temporary directory, for tests of the whole engine.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "temporary_directory.h"
#include "tokendepot/depot.h"

namespace tokendepot::testing {

using namespace std::chrono_literals;

/// Blocks-first NHD cache, K and V in separate halves of a block: (blocks, 2, block_tokens, heads, row).
class HostCache {
 public:
  HostCache(GroupShape shape, uint32_t blocks) : shape_(shape), blocks_(blocks) {
    heads_ = shape.part.heads();
    plane_ = uint64_t{shape.block_tokens} * heads_ * shape.row_bytes;
    memory_.resize(shape.part.layers(), std::vector<std::byte>(2 * plane_ * blocks));
  }
  PagedCache paged() {
    PagedCache cache;
    cache.shape = shape_;
    cache.block_count = blocks_;
    for (auto& layer : memory_) {
      auto& planes = cache.layers.emplace_back();
      for (uint64_t p = 0; p < shape_.planes; ++p) {
        planes.push_back({layer.data() + p * plane_, static_cast<int64_t>(2 * plane_), shape_.row_bytes,
                          static_cast<int64_t>(heads_ * shape_.row_bytes), 0});
      }
    }
    return cache;
  }
  void fill(uint32_t seed) {
    std::mt19937_64 random(seed);
    for (auto& layer : memory_) {
      for (size_t i = 0; i + 8 <= layer.size(); i += 8) {
        const uint64_t value = random();
        std::memcpy(layer.data() + i, &value, 8);
      }
    }
  }
  void clear(std::byte with = std::byte{0xEE}) {
    for (auto& layer : memory_) std::fill(layer.begin(), layer.end(), with);
  }
  /// All bytes of one block, layer after layer.
  std::vector<std::byte> block(int32_t id) const {
    std::vector<std::byte> bytes;
    for (const auto& layer : memory_) {
      const auto begin = layer.begin() + static_cast<int64_t>(2 * plane_) * id;
      bytes.insert(bytes.end(), begin, begin + static_cast<int64_t>(2 * plane_));
    }
    return bytes;
  }

 private:
  GroupShape shape_;
  uint32_t blocks_;
  uint64_t heads_;
  uint64_t plane_;
  std::vector<std::vector<std::byte>> memory_;
};

inline constexpr uint32_t kChunkTokens = 64;
inline constexpr uint32_t kBlockTokens = 16;
inline constexpr uint32_t kBlocksPerChunk = kChunkTokens / kBlockTokens;

inline GroupShape small_shape(Part part = {0, 2, 0, 4}) {
  GroupShape shape;
  shape.part = part;
  shape.tokens = kChunkTokens;
  shape.block_tokens = kBlockTokens;
  shape.row_bytes = 64;
  return shape;
}

inline GroupWant want_of(const GroupShape& shape, uint32_t window_chunks = 0) {
  return {shape.group, shape.kind, shape.part, shape.tokens, window_chunks};
}

/// Keys of a prompt of `chunks` chunks whose token ids derive from `seed`.
inline std::vector<Key> prompt_keys(const NamespaceDigest& ns, uint32_t seed, size_t chunks) {
  std::mt19937 random(seed);
  std::vector<uint32_t> tokens(chunks * kChunkTokens);
  for (uint32_t& token : tokens) token = random() % 32000;
  KeyChain chain(ns, kChunkTokens);
  chain.append(tokens);
  return chain.keys();
}

inline std::vector<int32_t> iota_blocks(int32_t first, size_t count) {
  std::vector<int32_t> blocks(count);
  for (size_t i = 0; i < count; ++i) blocks[i] = first + static_cast<int32_t>(i);
  return blocks;
}

/// Waits for one job's completion.
inline Completion wait_for(Depot& depot, uint64_t job, std::chrono::milliseconds limit = 60s) {
  const auto end = std::chrono::steady_clock::now() + limit;
  while (std::chrono::steady_clock::now() < end) {
    for (Completion& done : depot.poll()) {
      if (done.job == job) return done;
    }
    depot.wait_ended(10ms);
  }
  ADD_FAILURE() << "job " << job << " was not reported";
  return {};
}

/// Opens a depot, registers the tests' namespace with it as `ns`, and attaches `cache`.
inline std::unique_ptr<Depot> open_attached(const Options& options, NamespaceDigest& ns, HostCache& cache) {
  auto depot = Depot::open(options);
  if (!depot) {
    ADD_FAILURE() << depot.error().message;
    std::abort();
  }
  ns = *(*depot)->register_namespace(R"({"model":"m"})");
  EXPECT_TRUE((*depot)->attach(cache.paged()));
  return std::move(*depot);
}

/// Calls `store` until it returns true: a depot drops stores while its next segment is made ready, which
/// takes seconds on a disk that others keep busy.
template <class Store>
void until_stored(Store store) {
  const auto end = std::chrono::steady_clock::now() + 60s;
  while (!store()) {
    if (std::chrono::steady_clock::now() > end) {
      ADD_FAILURE() << "never stored";
      return;
    }
    usleep(10'000);
  }
}

/// Stores chunk i of the prompt from blocks [4 i, 4 i + 4). Returns the completion.
inline Completion store_chunks(Depot& depot, uint64_t job, const NamespaceDigest& ns,
                               std::span<const Key> keys, size_t first, size_t last) {
  StorePlan plan;
  plan.ns = ns;
  for (size_t i = first; i < last; ++i) {
    plan.items.push_back({keys[i], static_cast<uint32_t>(i), 0,
                          iota_blocks(static_cast<int32_t>(i * kBlocksPerChunk), kBlocksPerChunk)});
  }
  EXPECT_TRUE(depot.submit_store(job, plan));
  EXPECT_TRUE(depot.wait_gathered(60s));
  return wait_for(depot, job);
}

/// The same, again until every chunk is stored.
inline void store_until_all_are(Depot& depot, uint64_t& job, const NamespaceDigest& ns,
                                std::span<const Key> keys, size_t first, size_t last) {
  until_stored([&] { return store_chunks(depot, job++, ns, keys, first, last).items_ok == last - first; });
}

inline Result<LoadPlan> plan_chunks(Depot& depot, const NamespaceDigest& ns, std::span<const Key> keys,
                                    const GroupWant& want, size_t first, size_t last, int32_t first_block,
                                    std::chrono::nanoseconds deadline = 60s) {
  const auto blocks = iota_blocks(first_block, (last - first) * kBlocksPerChunk);
  const Depot::LoadGroup group{want, static_cast<uint32_t>(first), kBlocksPerChunk, blocks};
  return depot.plan_load(ns, keys, std::span(&group, 1), deadline);
}

}  // namespace tokendepot::testing
