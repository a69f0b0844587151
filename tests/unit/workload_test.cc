#include "tokendepot/workload.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <set>

#include "temporary_directory.h"
#include "workload/extent_shape.h"

namespace tokendepot {
namespace {

bool never() {
  return false;
}

TEST(LatencyHistogram, ReportsAValueAtMostOne128thTooHigh) {
  for (uint64_t value = 1; value < (1ull << 45); value = value * 5 / 4 + 1) {
    LatencyHistogram histogram;
    histogram.add(value);
    const auto buckets = histogram.buckets();
    ASSERT_EQ(buckets.size(), 1u);
    EXPECT_GE(buckets[0].first, value);
    EXPECT_LE(static_cast<double>(buckets[0].first), static_cast<double>(value) * (1 + 1.0 / 128)) << value;
  }
}

TEST(LatencyHistogram, KeepsEveryCountInAscendingOrder) {
  LatencyHistogram histogram;
  for (uint64_t value = 100'000; value > 0; --value) histogram.add(value);
  uint64_t total = 0, before = 0;
  for (const auto& [largest, count] : histogram.buckets()) {
    EXPECT_GT(largest, before);
    before = largest;
    total += count;
  }
  EXPECT_EQ(total, 100'000u);
}

TEST(ExtentShape, PayloadHasExactlyTheBytesAskedFor) {
  for (const uint64_t bytes : {4096ull, 8192ull, 12288ull, 65536ull, 118784ull, 1ull << 20, 5ull << 19,
                               10ull << 20, 80ull << 20, (256ull << 20) - 4096, 256ull << 20}) {
    const GroupShape shape = shape_of_bytes(3, bytes);
    EXPECT_EQ(shape.payload_bytes(), bytes);
    EXPECT_EQ(shape.shards() * shape.shard_bytes(), bytes) << "padding would not be payload";
    std::byte memory;
    EXPECT_TRUE(validate(cache_of_slots(shape, &memory, 2)));
  }
}

/// On tmpfs, where the root is mapped, and on the disk.
class WorkloadTest : public ::testing::TestWithParam<const char*> {
 protected:
  WorkloadSpec spec(WorkloadKind kind, std::vector<uint64_t> sizes = {256 << 10}) const {
    WorkloadSpec made;
    made.options.roots.resize(1);
    made.options.roots[0].path = directory_ / "root";
    made.options.roots[0].capacity_bytes = 64 << 20;
    made.options.roots[0].segment_bytes = 4 << 20;
    made.options.slab_bytes = 32 << 20;
    made.options.free_space_reserve = 0;
    made.kind = kind;
    made.extent_bytes = std::move(sizes);
    made.volume_bytes = 16 << 20;
    made.in_flight = 4;
    return made;
  }
  static std::unique_ptr<Workload> filled(const WorkloadSpec& wanted) {
    auto opened = Workload::open(wanted);
    EXPECT_TRUE(opened) << opened.error().message;
    if (!opened) return nullptr;
    const auto status = (*opened)->fill(never);
    EXPECT_TRUE(status) << status.error().message;
    return std::move(*opened);
  }
  static uint64_t total(const PathBytes& paths) {
    return paths.mapped + paths.direct + paths.buffered + paths.gds_p2p + paths.gds_compat;
  }

  TemporaryDirectory directory_{GetParam()};
};

INSTANTIATE_TEST_SUITE_P(Places, WorkloadTest, ::testing::Values("/dev/shm", "/var/tmp"),
                         [](const auto& place) { return place.index == 0 ? "Memory" : "Disk"; });

TEST_P(WorkloadTest, LoadsAreCountedByPathAndCompareEqual) {
  const auto workload = filled(spec(WorkloadKind::read));
  const auto run = workload->run(0.02, never);
  ASSERT_TRUE(run) << run.error().message;
  EXPECT_GE(run->extents, 1u);
  EXPECT_EQ(run->failed, 0u);
  EXPECT_EQ(run->bytes, run->extents * (256 << 10));
  EXPECT_GE(total(run->loaded), run->bytes);
  EXPECT_EQ(total(run->stored), 0u);
  ASSERT_EQ(run->classes.size(), 1u);
  EXPECT_EQ(run->classes[0].count, run->extents);
  const auto check = workload->verify(1, never);
  ASSERT_TRUE(check) << check.error().message;
  EXPECT_GE(check->extents, 64u);  // the volume; what the run left comes on top
  EXPECT_EQ(check->wrong, 0u) << check->first_wrong;
}

TEST_P(WorkloadTest, StoresGoIntoRecycledSegmentsAndReadBackAsTheyWere) {
  const auto workload = filled(spec(WorkloadKind::write));
  EXPECT_GE(workload->stats().roots[0].evicted_segments, 1u);
  const auto run = workload->run(0.02, never);
  ASSERT_TRUE(run) << run.error().message;
  EXPECT_EQ(run->failed, 0u);
  EXPECT_EQ(total(run->loaded), 0u);
  EXPECT_GE(total(run->stored), run->bytes);
  const auto check = workload->verify(1, never);
  ASSERT_TRUE(check) << check.error().message;
  EXPECT_GE(check->extents, 1u);
  EXPECT_EQ(check->wrong, 0u) << check->first_wrong;
}

TEST_P(WorkloadTest, MixedSizesHaveLatenciesOfTheirOwnForLoadsAndStores) {
  auto wanted = spec(WorkloadKind::mixed, {64 << 10, 1 << 20});
  wanted.options.roots[0].capacity_bytes = 128 << 20;
  wanted.in_flight = 16;  // the first of them are loads and stores of both sizes
  const auto workload = filled(wanted);
  const auto run = workload->run(0.1, never);
  ASSERT_TRUE(run) << run.error().message;
  EXPECT_EQ(run->failed, 0u) << run->failure;
  std::set<std::pair<bool, uint64_t>> seen;
  uint64_t extents = 0, bytes = 0;
  for (const WorkloadClass& counted : run->classes) {
    seen.emplace(counted.write, counted.extent_bytes);
    extents += counted.count;
    bytes += counted.count * counted.extent_bytes;
  }
  EXPECT_EQ(seen.size(), 4u);
  EXPECT_EQ(extents, run->extents);
  EXPECT_EQ(bytes, run->bytes);
  const auto check = workload->verify(1, never);
  ASSERT_TRUE(check) << check.error().message;
  EXPECT_EQ(check->wrong, 0u) << check->first_wrong;
}

TEST_P(WorkloadTest, ABurstTellsTheEndOfItsFirstAndOfItsLastRequest) {
  auto wanted = spec(WorkloadKind::burst);
  wanted.request_extents = 4;
  const auto workload = filled(wanted);
  const auto run = workload->run(0, never);
  ASSERT_TRUE(run) << run.error().message;
  ASSERT_EQ(run->bursts.size(), 1u);
  EXPECT_GT(run->bursts[0].first, 0);
  EXPECT_LE(run->bursts[0].first, run->bursts[0].second);
  EXPECT_EQ(run->extents, 16u);
  ASSERT_EQ(run->classes.size(), 1u);
  EXPECT_EQ(run->classes[0].extent_bytes, 4u * (256 << 10));
  EXPECT_EQ(run->classes[0].count, 4u);
}

TEST_P(WorkloadTest, AByteThatFlipsOnTheMediumIsFound) {
  const auto workload = filled(spec(WorkloadKind::read));
  for (const auto& entry : std::filesystem::directory_iterator(directory_ / "root/segments")) {
    constexpr off_t kInPayload = 100'000;
    char byte = 0;
    const int fd = ::open(entry.path().c_str(), O_RDWR | O_CLOEXEC);
    if (fd < 0 || ::pread(fd, &byte, 1, kInPayload) != 1) continue;  // the next segment, being made
    byte ^= 0x20;
    ASSERT_EQ(::pwrite(fd, &byte, 1, kInPayload), 1);
    ASSERT_EQ(::fsync(fd), 0);
    ::close(fd);
  }
  const auto check = workload->verify(1, never);
  ASSERT_TRUE(check) << check.error().message;
  EXPECT_GE(check->wrong, 1u);
  EXPECT_NE(check->first_wrong, "");
}

TEST_P(WorkloadTest, TheLimitIsMeasuredForEveryKindOfTraffic) {
  for (const WorkloadKind kind :
       {WorkloadKind::read, WorkloadKind::write, WorkloadKind::mixed, WorkloadKind::burst}) {
    TemporaryDirectory own(GetParam());
    auto wanted = spec(kind);
    wanted.options.roots[0].path = own / "root";
    auto workload = Workload::open(wanted);
    ASSERT_TRUE(workload) << workload.error().message;
    const auto limits = (*workload)->limits(0.01);
    ASSERT_TRUE(limits) << limits.error().message;
    ASSERT_EQ(limits->size(), 1u);
    EXPECT_GT(limits->front().gb_per_s, 0);
    EXPECT_EQ(own.entries(), 1u) << "the control's file has a name";
  }
}

TEST_P(WorkloadTest, AnInterruptEndsARunEarlyWithWhatWasDone) {
  const auto workload = filled(spec(WorkloadKind::read));
  int asked = 0;
  const auto run = workload->run(3600, [&] { return ++asked > 1; });
  ASSERT_TRUE(run) << run.error().message;
  EXPECT_GE(run->extents, 1u);
}

TEST_P(WorkloadTest, WhatCannotBeMeasuredIsRefused) {
  const auto refused = [&](auto change) {
    auto wanted = spec(WorkloadKind::read);
    change(wanted);
    const auto opened = Workload::open(wanted);
    return !opened && opened.error().kind == ErrorKind::invalid_argument;
  };
  EXPECT_TRUE(refused([](WorkloadSpec& s) { s.extent_bytes = {}; }));
  EXPECT_TRUE(refused([](WorkloadSpec& s) { s.extent_bytes = {1000}; }));
  EXPECT_TRUE(refused([](WorkloadSpec& s) { s.extent_bytes = {512ull << 20}; }));
  EXPECT_TRUE(refused([](WorkloadSpec& s) { s.volume_bytes = 4096; }));
  EXPECT_TRUE(refused([](WorkloadSpec& s) { s.in_flight = 0; }));
  EXPECT_TRUE(refused([](WorkloadSpec& s) { s.process = 2048; }));
  EXPECT_TRUE(refused([](WorkloadSpec& s) {
    s.kind = WorkloadKind::burst;
    s.request_extents = 1000;
  }));
}

}  // namespace
}  // namespace tokendepot
