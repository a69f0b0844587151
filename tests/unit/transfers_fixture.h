// A depot on one root of each kind (memory, disk with threads, disk with io_uring) and what loads and stores
// on it need.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <vector>

#include "depot_fixture.h"

namespace tokendepot::testing {

inline constexpr uint32_t kBlocks = 256;

class TransfersOn : public ::testing::TestWithParam<std::string> {
 protected:
  TransfersOn() : directory_(GetParam() == "tmpfs" ? "/dev/shm" : "/tmp"), cache_(small_shape(), kBlocks) {}

  Options options(uint64_t capacity = 64 << 20) {
    Options options;
    options.roots = {{.path = directory_.path() + "/root",
                      .capacity_bytes = capacity,
                      .segment_bytes = 1 << 20,
                      .io = GetParam() == "uring" ? IoChoice::uring : IoChoice::threads}};
    options.slab_bytes = 8 << 20;
    options.poll_ms = 20;
    options.free_space_reserve = 0;
    options.eviction_grace_ms = 0;
    options.scrub_bytes_per_second = 0;  // it would find planted damage before a load does
    return options;
  }
  std::unique_ptr<Depot> open() { return open(options()); }
  std::unique_ptr<Depot> open(const Options& with) {
    auto depot = Depot::open(with);
    if (!depot) {
      ADD_FAILURE() << depot.error().message;
      std::abort();
    }
    ns_ = *(*depot)->register_namespace(R"({"model":"m"})");
    return std::move(*depot);
  }
  void store_all(Depot& depot, std::span<const Key> keys, size_t first, size_t last) {
    uint64_t job = 1'000'000 + next_job_;
    store_until_all_are(depot, job, ns_, keys, first, last);
    next_job_ = job - 1'000'000;
  }
  LoadPlan plan_of(Depot& depot, std::span<const Key> keys, size_t first, size_t last, int32_t block,
                   std::chrono::nanoseconds deadline = 0ns) {
    auto plan = plan_chunks(depot, ns_, keys, want_, first, last, block, deadline);
    EXPECT_TRUE(plan) << (plan ? "" : plan.error().message);
    return plan ? *plan : LoadPlan{};
  }
  Completion load(Depot& depot, LoadPlan plan) {
    const uint64_t job = 2'000'000 + next_job_++;
    EXPECT_TRUE(depot.submit_load(job, std::move(plan)));
    return wait_for(depot, job);
  }
  std::vector<std::vector<std::byte>> blocks(int32_t first, int32_t count) {
    std::vector<std::vector<std::byte>> all;
    for (int32_t b = 0; b < count; ++b) all.push_back(cache_.block(first + b));
    return all;
  }

  TemporaryDirectory directory_;
  HostCache cache_;
  NamespaceDigest ns_;
  const GroupWant want_ = want_of(small_shape());
  uint64_t next_job_ = 0;
};

}  // namespace tokendepot::testing
