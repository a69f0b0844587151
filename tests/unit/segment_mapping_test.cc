// Mapped segments and the device: adopted once, given back before they are unmapped, hottest first.
#include "store/segment_mapping.h"

#include <gmock/gmock.h>
#include <sys/resource.h>

#include "base/log.h"
#include "depot_fixture.h"
#include "recording_device.h"
#include "store/replay.h"
#include "store/root_writer.h"

namespace tokendepot::testing {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr uint64_t kSegment = 1 << 20;

/// What one process holds of a root whose device registers mappings.
struct Process {
  Process(const Options& options, RecordingDevice& device) {
    root = std::move(*Root::open(options.roots[0], 0, options, &device));
    replay = std::make_unique<Replay>(*root, segments, nullptr);
    EXPECT_TRUE(replay->first());
    writer = std::move(*RootWriter::open(*root, *replay, segments, system_clock(), 0));
  }
  /// Fills one segment to its end.
  SegmentId fill_a_segment() {
    if (writer->wants_spare()) {
      EXPECT_TRUE(writer->prepare_spare(nullptr));
    }
    auto place = writer->reserve(kSegment);
    EXPECT_TRUE(place) << place.error().message;
    Record put;
    put.part = {0, 1, 0, 1};
    put.tokens = 16;
    EXPECT_TRUE(writer->acknowledge(*place, put));
    return place->where.segment;
  }

  SegmentTable segments;
  std::unique_ptr<Root> root;
  std::unique_ptr<Replay> replay;
  std::unique_ptr<RootWriter> writer;
};

class SegmentMappingTest : public ::testing::Test {
 protected:
  Options options(uint64_t capacity = 4 * kSegment) const {
    Options options;
    options.roots = {
        {.path = directory_.path() + "/root", .capacity_bytes = capacity, .segment_bytes = kSegment}};
    options.free_space_reserve = 0;
    return options;
  }

  const TemporaryDirectory directory_{"/dev/shm"};
  const std::atomic<bool> go_on_ = false;
};

TEST_F(SegmentMappingTest, ARecycledSegmentKeepsTheMappingThatTheDeviceKnows) {
  RecordingDevice device;
  {
    Process process(options(), device);
    for (int i = 0; i < 20; ++i) process.fill_a_segment();
    EXPECT_EQ(process.writer->evicted_segments(), 16u);
    EXPECT_EQ(device.heats().size(), 4u) << "one mapping for each file, for all its lives";
    EXPECT_EQ(device.releases(), 0u);
    EXPECT_EQ(device.adopted_bytes(), process.root->files().mapped_bytes());
  }
  EXPECT_EQ(device.releases(), 4u);
}

TEST_F(SegmentMappingTest, SegmentsOfAnEarlierProcessKeepTheirMappingsWhenTheyAreRecycled) {
  {
    RecordingDevice device;
    Process process(options(), device);
    for (int i = 0; i < 4; ++i) process.fill_a_segment();
  }
  RecordingDevice device;
  Process process(options(), device);
  process.root->map_ahead(process.segments, go_on_);
  ASSERT_EQ(device.adopted().size(), 4u);
  for (const auto& [at, range] : device.adopted()) EXPECT_TRUE(range.writable);
  const size_t before = device.releases();
  for (int i = 0; i < 8; ++i) process.fill_a_segment();
  EXPECT_EQ(device.heats().size(), 4u + before);
  EXPECT_EQ(device.releases(), before);
}

TEST_F(SegmentMappingTest, WhatIsThereIsMappedAheadHottestFirstAndOnce) {
  std::vector<SegmentId> ids;
  {
    RecordingDevice device;
    Process process(options(8 * kSegment), device);
    for (int i = 0; i < 5; ++i) ids.push_back(process.fill_a_segment());
  }
  RecordingDevice device;
  const Options one = options(8 * kSegment);
  const auto root = std::move(*Root::open(one.roots[0], 0, one, &device));
  SegmentTable segments;
  Replay replay(*root, segments, nullptr);
  ASSERT_TRUE(replay.first());
  const uint64_t now = system_clock().wall_ns();
  for (const size_t i : {0, 1, 2, 3, 4}) segments.touch(*segments.find(ids[i]), now + (i * 3 % 5) * 1000);
  root->map_ahead(segments, go_on_);
  EXPECT_THAT(device.heats(), ElementsAre(now + 4000, now + 3000, now + 2000, now + 1000, now));
  root->map_ahead(segments, go_on_);
  const auto lease = root->files().open(ids[2]);
  EXPECT_TRUE(lease);
  EXPECT_EQ(device.heats().size(), 5u);
  EXPECT_EQ(root->files().mapped_bytes(), 5 * kSegment);
}

TEST_F(SegmentMappingTest, NoMoreIsMappedAheadThanTheCapacity) {
  {
    RecordingDevice device;
    Process process(options(8 * kSegment), device);
    for (int i = 0; i < 8; ++i) process.fill_a_segment();
  }
  RecordingDevice device;
  const Options less = options(3 * kSegment);
  const auto root = std::move(*Root::open(less.roots[0], 0, less, &device));
  SegmentTable segments;
  Replay replay(*root, segments, nullptr);
  ASSERT_TRUE(replay.first());
  root->map_ahead(segments, go_on_);
  EXPECT_EQ(device.adopted_bytes(), 3 * kSegment);
}

TEST_F(SegmentMappingTest, TooFewOpenFilesForAllSegmentsAreSaidWithWhatToSet) {
  {
    RecordingDevice device;
    Process process(options(8 * kSegment), device);
    for (int i = 0; i < 8; ++i) process.fill_a_segment();
  }
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
  const rlimit few{40, before.rlim_max};  // for 5 segments
  RecordingDevice device;
  const Options all = options(8 * kSegment);
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &few), 0);
  auto root = Root::open(all.roots[0], 0, all, &device);
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &before), 0);
  ASSERT_TRUE(root) << root.error().message;
  SegmentTable segments;
  Replay replay(**root, segments, nullptr);
  ASSERT_TRUE(replay.first());
  std::vector<std::string> warnings;
  set_log_sink([&](LogLevel level, std::string_view line) {
    if (level == LogLevel::warning) warnings.emplace_back(line);
  });
  (*root)->map_ahead(segments, go_on_);
  set_log_sink(nullptr);
  EXPECT_EQ(device.adopted_bytes(), 5 * kSegment);
  EXPECT_THAT(warnings, ElementsAre(AllOf(HasSubstr("5 of its 8 segments"), HasSubstr("ulimit -n"),
                                          HasSubstr("expected 64 or more"))));
}

TEST_F(SegmentMappingTest, ADroppedSegmentIsGivenBackWhenItsLastLeaseEnds) {
  RecordingDevice device;
  Process process(options(), device);
  const SegmentId id = process.fill_a_segment();
  process.fill_a_segment();
  auto lease = process.root->files().open(id);
  ASSERT_TRUE(lease);
  process.root->files().drop(id);
  EXPECT_EQ(device.releases(), 0u);
  EXPECT_EQ((*lease)->mapping.size(), kSegment);
  *lease = SegmentLease();
  EXPECT_EQ(device.releases(), 1u);
}

TEST_F(SegmentMappingTest, WhatAnotherProcessRecyclesIsGivenBack) {
  RecordingDevice device;
  RecordingDevice others_device;
  Process process(options(6 * kSegment), device);
  Process other(options(6 * kSegment), others_device);
  std::vector<SegmentId> theirs;
  for (int i = 0; i < 3; ++i) theirs.push_back(other.fill_a_segment());
  process.replay->poll();
  process.root->map_ahead(process.segments, go_on_);
  ASSERT_GE(device.adopted().size(), 3u);
  for (int i = 0; i < 8; ++i) other.fill_a_segment();
  process.replay->poll();
  EXPECT_GE(device.releases(), 3u);
  process.root->map_ahead(process.segments, go_on_);
  EXPECT_EQ(device.adopted_bytes(), process.root->files().mapped_bytes());
}

TEST_F(SegmentMappingTest, AMappingThatIsMovedOverAnotherGivesThatBack) {
  RecordingDevice device;
  const std::string path = directory_.path() + "/file";
  const auto file = File::open(path, {.write = true, .create = true});
  ASSERT_TRUE(file);
  ASSERT_TRUE(file->truncate(8192));
  const auto map = [&] {
    return SegmentMapping(std::move(*Mapping::map(*file, 8192, true)), true, &device, 1);
  };
  SegmentMapping first = map();
  SegmentMapping second = map();
  std::byte* const kept = second.data();
  first = std::move(second);
  EXPECT_EQ(device.releases(), 1u);
  EXPECT_EQ(first.data(), kept);
  first = {};
  EXPECT_EQ(device.releases(), 2u);
  EXPECT_FALSE(first.is_mapped());
}

}  // namespace
}  // namespace tokendepot::testing
