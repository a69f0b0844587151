// What a keeper knows of its segments directory without listing it, and when it lists all the same.
#include "store/segment_inventory.h"

#include <filesystem>
#include <fstream>

#include "depot_fixture.h"
#include "store/replay.h"
#include "store/root_writer.h"

namespace tokendepot::testing {
namespace {

constexpr uint64_t kMiB = 1 << 20;
constexpr uint64_t kSecond = 1'000'000'000;

struct HandClock final : Clock {
  uint64_t steady_ns() const override { return now; }
  uint64_t wall_ns() const override { return now; }
  uint64_t now = 1000 * kSecond;
};

SegmentFileName segment(uint32_t n) {
  return {{0x77, n}};
}

class SegmentInventoryTest : public ::testing::Test {
 protected:
  SegmentInventoryTest() { std::filesystem::create_directory(segments()); }
  std::string segments() const { return directory_ / "segments"; }
  std::string lock_path() const { return directory_ / "keeper.lock"; }

  /// One of several that share the root.
  struct Process {
    explicit Process(SegmentInventoryTest& test)
        : election(test.lock_path()), inventory(test.segments(), test.clock_) {}
    KeeperLock lock() { return std::move(**election.acquire(1000)); }
    uint64_t bytes() {
      KeeperLock held = lock();
      EXPECT_TRUE(inventory.catch_up(held));
      return inventory.bytes();
    }
    void make(const SegmentFileName& file, uint64_t size) {
      KeeperLock held = lock();
      EXPECT_TRUE(inventory.catch_up(held));
      EXPECT_TRUE(inventory.will_be(held, file, size));
      std::ofstream(inventory.path_of(file)).close();
      std::filesystem::resize_file(inventory.path_of(file), size);
    }
    void remove(const SegmentFileName& file) {
      KeeperLock held = lock();
      EXPECT_TRUE(inventory.catch_up(held));
      std::filesystem::remove(inventory.path_of(file));
      inventory.has_gone(held, file);
    }
    KeeperElection election;
    SegmentInventory inventory;
  };
  /// Seen by listings only: nobody leaves a note of it.
  void put_unnoted(uint64_t size) {
    std::ofstream(segments() + "/by-hand").close();
    std::filesystem::resize_file(segments() + "/by-hand", size);
  }
  void change_lock_file(uint64_t offset) {
    std::fstream file(lock_path(), std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(static_cast<std::streamoff>(offset));
    const char flipped = static_cast<char>(file.get() ^ 1);
    file.seekp(static_cast<std::streamoff>(offset));
    file.put(flipped);
  }

  TemporaryDirectory directory_;
  HandClock clock_;
};

TEST_F(SegmentInventoryTest, WhatOthersMakeAndRemoveIsKnownWithoutAListing) {
  Process one(*this);
  Process other(*this);
  ASSERT_EQ(one.bytes(), 0u);
  ASSERT_EQ(other.bytes(), 0u);
  put_unnoted(7);
  one.make(segment(1), 100);
  one.make({segment(2).segment, true}, 1000);
  EXPECT_EQ(other.bytes(), 1100u);
  other.remove(segment(1));
  EXPECT_EQ(one.bytes(), 1000u);
  EXPECT_EQ(Process(*this).bytes(), 1007u) << "who comes new lists";
}

TEST_F(SegmentInventoryTest, NotesThatDoNotReachBackAreReplacedByAListing) {
  Process seldom(*this);
  Process often(*this);
  ASSERT_EQ(seldom.bytes(), 0u);
  put_unnoted(7);
  often.make(segment(0), 100);
  {
    KeeperLock held = often.lock();
    for (uint64_t i = 0; i < kNotesKept / 2; ++i) {
      ASSERT_TRUE(often.inventory.will_be(held, segment(1), 1));
      often.inventory.has_gone(held, segment(1));
    }
  }
  EXPECT_EQ(seldom.bytes(), 107u);
}

TEST_F(SegmentInventoryTest, AsManyNotesAsAreKeptCanBeFollowedAcrossTheirEnd) {
  Process one(*this);
  Process other(*this);
  ASSERT_EQ(one.bytes(), 0u);
  ASSERT_EQ(other.bytes(), 0u);
  put_unnoted(7);
  for (uint32_t round = 0; round < 3; ++round) {
    KeeperLock held = other.lock();
    ASSERT_TRUE(other.inventory.catch_up(held));
    for (uint32_t i = 0; i < kNotesKept; ++i)
      ASSERT_TRUE(other.inventory.will_be(held, segment(i), 1 + round));
    held = KeeperLock();
    EXPECT_EQ(one.bytes(), kNotesKept * (1 + round));
  }
}

TEST_F(SegmentInventoryTest, DamagedNotesAreReplacedByAListing) {
  for (const uint64_t at : {uint64_t{kStampBytes}, uint64_t{kStampBytes + kNotesEndBytes - 1}}) {
    Process one(*this);
    Process other(*this);
    std::filesystem::remove(segments() + "/by-hand");
    const uint64_t before = one.bytes();
    put_unnoted(7);
    other.make(segment(static_cast<uint32_t>(at)), 100);
    change_lock_file(at);
    EXPECT_EQ(one.bytes(), before + 107) << at;
  }
  Process one(*this);
  Process other(*this);
  std::filesystem::remove(segments() + "/by-hand");
  const uint64_t before = one.bytes();
  put_unnoted(7);
  other.make(segment(3), 100);
  uint64_t number = 0;
  {
    KeeperLock held = other.lock();
    number = *held.noted() - 1;
  }
  change_lock_file(place_of_note(number) + 9);
  EXPECT_EQ(one.bytes(), before + 107);
}

TEST_F(SegmentInventoryTest, AHolderThatKeepsNoNotesMakesAllOthersList) {
  Process one(*this);
  ASSERT_EQ(one.bytes(), 0u);
  {
    // What a program before the notes does: a higher epoch, nothing else.
    KeeperStamp stamp;
    std::array<std::byte, kStampBytes> bytes{};
    const auto file = File::open(lock_path(), {.write = true});
    ASSERT_TRUE(file && file->read_at(bytes, 0));
    stamp = decode_stamp(bytes);
    ++stamp.epoch;
    encode_stamp(stamp, bytes);
    ASSERT_TRUE(file->write_at(bytes, 0));
    put_unnoted(7);
  }
  EXPECT_EQ(one.bytes(), 7u);
}

TEST_F(SegmentInventoryTest, AKeeperFileThatWasMadeAnewMakesAllList) {
  Process one(*this);
  one.make(segment(1), 100);
  std::filesystem::remove(lock_path());
  Process other(*this);
  other.make(segment(2), 50);
  put_unnoted(7);
  EXPECT_EQ(one.bytes(), 157u);
}

TEST_F(SegmentInventoryTest, AFileThatWasNotedAndNeverMadeCountsUntilTheNextListing) {
  Process dying(*this);
  Process other(*this);
  ASSERT_EQ(other.bytes(), 0u);
  {
    KeeperLock held = dying.lock();
    ASSERT_TRUE(dying.inventory.will_be(held, segment(1), 100));
  }
  EXPECT_EQ(other.bytes(), 100u);
  KeeperLock held = other.lock();
  EXPECT_FALSE(other.inventory.list_again(held)) << "at most once a second";
  clock_.now += kSecond;
  EXPECT_TRUE(other.inventory.list_again(held));
  EXPECT_EQ(other.inventory.bytes(), 0u);
}

TEST_F(SegmentInventoryTest, WhatWentWithoutTheLockIsNotedByTheNextHolder) {
  Process one(*this);
  Process other(*this);
  one.make(segment(1), 100);
  one.make(segment(2), 50);
  ASSERT_EQ(other.bytes(), 150u);
  std::filesystem::remove(one.inventory.path_of(segment(1)));
  one.inventory.may_have_gone(segment(1));
  one.inventory.may_have_gone(segment(2));  // and is still there
  EXPECT_EQ(one.bytes(), 50u);
  EXPECT_EQ(other.bytes(), 50u);
}

TEST_F(SegmentInventoryTest, SegmentsThatAreRemovedByHandMakeRoomWithinASecond) {
  Options options;
  options.roots = {{.path = directory_ / "root", .capacity_bytes = 3 * kMiB, .segment_bytes = kMiB}};
  SegmentTable segments;
  auto root = std::move(*Root::open(options.roots[0], 0, options));
  Replay replay(*root, segments, nullptr);
  ASSERT_TRUE(replay.first());
  auto writer = std::move(*RootWriter::open(*root, replay, segments, clock_, 0));
  // Nothing speaks of these, so nothing can be evicted.
  for (uint32_t n = 0; n < 3; ++n) {
    const std::string path = root->files().path_of(segment(n).segment);
    std::ofstream(path).close();
    std::filesystem::resize_file(path, kMiB);
  }
  const auto full = writer->prepare_spare(nullptr);
  ASSERT_FALSE(full);
  EXPECT_EQ(full.error().kind, ErrorKind::no_space);
  std::filesystem::remove(root->files().path_of(segment(0).segment));
  clock_.now += kSecond;
  EXPECT_TRUE(writer->prepare_spare(nullptr));
}

}  // namespace
}  // namespace tokendepot::testing
