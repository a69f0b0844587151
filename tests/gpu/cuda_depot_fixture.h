// Whole depots on a GPU: what the tests of every kind of root share.
#pragma once

#include <dlfcn.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "device_memory.h"
#include "unit/depot_fixture.h"

namespace tokendepot::testing {

// More extents than the slab holds; half as many where ThreadSanitizer keeps four bytes about each of theirs.
#if defined(__has_feature)
inline constexpr uint32_t kChunks = __has_feature(thread_sanitizer) ? 24 : 48;
#else
inline constexpr uint32_t kChunks = 48;
#endif
inline constexpr uint32_t kCacheBlocks = 2 * kChunks * kBlocksPerChunk;  // to store from, and to load into

inline CacheForm form_of() {
  CacheForm form;
  form.shape = small_shape({0, 8, 0, 8});
  form.shape.row_bytes = 256;  // extents of 2 MiB
  form.blocks = kCacheBlocks;
  return form;
}

/// A depot in one directory and a paged cache on the GPU.
class CudaDepot : public ::testing::Test {
 protected:
  /// `base` holds the root. Skips the test where there is no GPU.
  void prepare(const std::string& base, TransportChoice transport) {
    SKIP_WITHOUT_GPU();
    transport_ = transport;
    directory_ = std::make_unique<TemporaryDirectory>(base);
    memory_ = std::make_unique<DeviceMemory>(form_.bytes());
    cells_ = random_bytes(form_.bytes(), 1);
    memory_->upload(cells_);
  }
  static std::string disk() {
    const char* const named = std::getenv("TOKENDEPOT_BENCH_DIR");
    return named != nullptr ? named : "/var/tmp";
  }
  /// The same, on a disk and through cuFile. Skips the test where cuFile does not take its files.
  void prepare_cufile() {
    prepare(disk(), TransportChoice::gds);
    if (IsSkipped() || HasFatalFailure()) return;
    if (dlopen("libcufile.so.0", RTLD_NOW | RTLD_LOCAL) == nullptr) GTEST_SKIP() << dlerror();
    const auto depot = Depot::open(options());
    ASSERT_TRUE(depot) << depot.error().message;
    const RootStats root = (*depot)->stats().roots.at(0);
    if (!root.transport.starts_with("gds")) GTEST_SKIP() << root.transport << ": " << root.reason;
  }
  Options options() const {
    Options options;
    options.roots = {{.path = directory_->path() + "/root",
                      .capacity_bytes = 256ull << 20,
                      .segment_bytes = 16ull << 20,
                      .transport = transport_}};
    options.device = "cuda:0";
    options.device_slab_bytes = 64ull << 20;
    options.slab_bytes = 64ull << 20;
    options.free_space_reserve = 0;
    options.poll_ms = 20;
    options.scrub_bytes_per_second = 0;  // it would find planted damage before a load does
    options.eviction_grace_ms = 0;       // a root of 16 segments has no room for a grace's worth of stores
    return options;
  }
  std::unique_ptr<Depot> open(const Options& with) {
    auto depot = Depot::open(with);
    if (!depot) {
      ADD_FAILURE() << depot.error().message;
      return nullptr;
    }
    ns_ = *(*depot)->register_namespace(R"({"model":"m"})");
    keys_ = prompt_keys(ns_, 1, kChunks);
    EXPECT_TRUE((*depot)->attach(form_.at(memory_->data())));
    return std::move(*depot);
  }
  /// Stores what the first half of the cache holds; what a busy machine drops is stored again.
  void store(Depot& depot) {
    for (size_t chunk = 0; chunk < kChunks; ++chunk) {
      int attempt = 0;
      while (store_chunks(depot, ++job_, ns_, keys_, chunk, chunk + 1).items_ok != 1) {
        ASSERT_LT(++attempt, 100) << "never stored";
        usleep(20'000);
      }
    }
    ASSERT_TRUE(depot.flush(10s));
  }
  Completion load(Depot& depot, size_t first, size_t last) {
    auto plan = plan_chunks(depot, ns_, keys_, want_, first, last,
                            static_cast<int32_t>((kChunks + first) * kBlocksPerChunk));
    if (!plan) {
      ADD_FAILURE() << plan.error().message;
      return {};
    }
    const uint64_t job = ++job_;
    EXPECT_TRUE(depot.submit_load(job, std::move(*plan)));
    return wait_for(depot, job, 30s);
  }
  /// All of a block in a copy of the cache, layer after layer.
  std::vector<uint8_t> block_of(const std::vector<uint8_t>& cache, uint64_t block) const {
    std::vector<uint8_t> bytes;
    const auto page = static_cast<int64_t>(form_.page_bytes());
    for (int64_t layer = 0; layer < form_.shape.part.layers(); ++layer) {
      const auto begin = cache.begin() + (layer * form_.blocks + static_cast<int64_t>(block)) * page;
      bytes.insert(bytes.end(), begin, begin + page);
    }
    return bytes;
  }
  void expect_loaded(size_t first, size_t last) const {
    const auto now = memory_->download();
    for (uint64_t block = first * kBlocksPerChunk; block < last * kBlocksPerChunk; ++block) {
      ASSERT_EQ(block_of(now, kChunks * kBlocksPerChunk + block), block_of(cells_, block)) << block;
    }
  }
  void clear() { memory_->fill(0, memory_->size(), 0xEE); }

  const CacheForm form_ = form_of();
  const GroupWant want_ = want_of(form_.shape);
  TransportChoice transport_ = TransportChoice::automatic;
  std::unique_ptr<TemporaryDirectory> directory_;
  std::unique_ptr<DeviceMemory> memory_;
  std::vector<uint8_t> cells_;
  NamespaceDigest ns_;
  std::vector<Key> keys_;
  uint64_t job_ = 0;
};

}  // namespace tokendepot::testing
