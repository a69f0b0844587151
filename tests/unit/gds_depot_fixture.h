// A whole depot that stores and loads past the host through a fake cuFile.
#pragma once

#include <algorithm>
#include <mutex>

#include "base/log.h"
#include "depot_fixture.h"
#include "device/gds/gds_lane.h"
#include "format/extent.h"
#include "gds_fixture.h"
#include "open_depot.h"

namespace tokendepot::testing {

inline constexpr uint32_t kBlocks = 256;
inline constexpr size_t kChunks = 12;
inline constexpr int32_t kElsewhere = 128;

class GdsDepot : public ::testing::Test {
 protected:
  GdsDepot() : directory_("/tmp"), cache_(small_shape(), kBlocks) {
    options_.roots = {{.path = directory_.path() + "/root",
                       .capacity_bytes = 64 << 20,
                       .segment_bytes = 1 << 20,
                       .transport = TransportChoice::gds,
                       .io = IoChoice::threads}};
    options_.free_space_reserve = 0;
    options_.scrub_bytes_per_second = 0;  // it would find planted damage before a load does
    options_.poll_ms = 20;
    set_log_sink([this](LogLevel, std::string_view line) {
      const std::lock_guard lock(log_mutex_);
      log_ += std::string(line) + "\n";
    });
  }
  ~GdsDepot() override {
    depot_.reset();
    set_log_sink(nullptr);
    EXPECT_EQ(fake_.wrong_calls, 0);
    EXPECT_EQ(fake_.open_files, 0) << "every handle ends before its file";
    EXPECT_EQ(fake_.registered_buffers, 0);
  }
  void SetUp() override {
    if (!probe_direct_alignment(directory_.path())) GTEST_SKIP() << "/tmp has no O_DIRECT";
  }

  Result<std::unique_ptr<Depot>> try_open(const char* library = FAKE_CUFILE_WHOLE,
                                          const std::string& device = "cuda:0") {
    auto made = std::make_unique<GpuLikeDevice>(file_slab_bytes_, device);
    device_ = made.get();
    return open_depot_on(std::move(made), options_, library);
  }
  void open(const char* library = FAKE_CUFILE_WHOLE) {
    depot_.reset();
    auto opened = try_open(library);
    ASSERT_TRUE(opened) << opened.error().message;
    depot_ = std::move(*opened);
    ns_ = *depot_->register_namespace(R"({"model":"m"})");
    keys_ = prompt_keys(ns_, 1, kChunks);
    ASSERT_TRUE(depot_->attach(cache_.paged()));
  }
  Completion store(size_t first, size_t last) {
    return store_chunks(*depot_, ++job_, ns_, keys_, first, last);
  }
  /// Retries while a busy machine makes the depot drop stores.
  void store_all() {
    cache_.fill(1);
    until_stored([&] { return store(0, kChunks).items_ok == kChunks; });
  }
  /// Loads all chunks to other blocks and compares every byte.
  Completion load_all(std::chrono::nanoseconds deadline = 0ns) {
    auto plan = plan_chunks(*depot_, ns_, keys_, want_of(small_shape()), 0, kChunks, kElsewhere, deadline);
    EXPECT_TRUE(plan) << (plan ? "" : plan.error().message);
    if (!plan) return {};
    EXPECT_TRUE(depot_->submit_load(++job_, *plan));
    Completion done = wait_for(*depot_, job_);
    if (done.failures.empty()) expect_equal();
    return done;
  }
  void expect_equal() {
    for (int32_t b = 0; b < static_cast<int32_t>(kChunks * kBlocksPerChunk); ++b)
      ASSERT_EQ(cache_.block(kElsewhere + b), cache_.block(b)) << b;
  }
  std::string transport() { return depot_->stats().roots.at(0).transport; }
  uint64_t errors() { return depot_->stats().roots.at(0).gds_errors; }
  std::string logged() {
    const std::lock_guard lock(log_mutex_);
    return log_;
  }

  const uint64_t payload_ = small_shape().payload_bytes();
  const uint64_t header_ = extent_header_bytes(small_shape().shards());
  FakeCuFileControl& fake_ = fresh_fake();
  TemporaryDirectory directory_;
  HostCache cache_;
  Options options_;
  uint64_t file_slab_bytes_ = 8 << 20;
  GpuLikeDevice* device_ = nullptr;  // of the depot that was opened last
  std::unique_ptr<Depot> depot_;
  NamespaceDigest ns_;
  std::vector<Key> keys_;
  uint64_t job_ = 0;
  std::mutex log_mutex_;
  std::string log_;
};

}  // namespace tokendepot::testing
