// Several writers on one root as on several hosts: locks that a broken connection has freed, clocks that
// differ, more journals than descriptors.
#include <fcntl.h>
#include <unistd.h>

#include "depot_fixture.h"
#include "store/root_writer.h"

namespace tokendepot::testing {
namespace {

namespace fs = std::filesystem;

class SharedRoot : public ::testing::Test {
 protected:
  /// A process that writes to the root.
  struct Process {
    std::unique_ptr<Root> root;
    SegmentTable segments;
    std::unique_ptr<Catalog> catalog;
    std::unique_ptr<Replay> replay;
    std::unique_ptr<RootWriter> writer;
  };

  std::unique_ptr<Process> start(const Clock& clock = system_clock()) {
    auto process = std::make_unique<Process>();
    Options options;
    const RootOptions root{
        .path = directory_.path() + "/root", .capacity_bytes = 16 << 20, .segment_bytes = 1 << 20};
    process->root = std::move(*Root::open(root, 0, options));
    process->catalog = std::make_unique<Catalog>(process->segments);
    process->replay = std::make_unique<Replay>(*process->root, process->segments, process->catalog.get());
    EXPECT_TRUE(process->replay->first());
    process->writer =
        std::move(*RootWriter::open(*process->root, *process->replay, process->segments, clock, 0));
    EXPECT_TRUE(process->writer->prepare_spare(nullptr));
    return process;
  }

  static std::string journal_of(const Process& process) {
    return process.root->journals_dir() + "/" + journal_name(process.writer->writer_id());
  }

  /// What the server does when the client's connection breaks: the descriptor stays, the lock goes.
  static void lose_lock(const std::string& path) {
    bool found = false;
    for (const auto& entry : fs::directory_iterator("/proc/self/fd")) {
      std::error_code gone;
      if (fs::read_symlink(entry, gone) != path || gone) continue;
      struct flock lock{};
      lock.l_type = F_UNLCK;
      lock.l_whence = SEEK_SET;
      EXPECT_EQ(fcntl(std::stoi(entry.path().filename()), F_OFD_SETLK, &lock), 0);
      found = true;
    }
    EXPECT_TRUE(found) << path;
  }

  static bool is_locked(const std::string& path) { return *File::open(path, {})->is_locked_by_another(); }

  static Record put_of(uint8_t key) {
    Record put;
    put.key.bytes.fill(key);
    put.part = {0, 2, 0, 4};
    put.tokens = 64;
    return put;
  }

  TemporaryDirectory directory_{"/dev/shm"};
};

TEST_F(SharedRoot, ALockThatNobodyTookMeanwhileIsTakenBack) {
  const auto owner = start();
  const auto before = owner->writer->writer_id();
  lose_lock(journal_of(*owner));
  EXPECT_FALSE(is_locked(journal_of(*owner)));
  owner->writer->confirm_hold();
  EXPECT_EQ(owner->writer->writer_id(), before);
  EXPECT_TRUE(is_locked(journal_of(*owner)));
}

TEST_F(SharedRoot, AJournalThatAnotherProcessTookOverIsLeftToIt) {
  const auto owner = start();
  const auto first = owner->writer->reserve(4096);
  ASSERT_TRUE(first);
  ASSERT_TRUE(owner->writer->acknowledge(*first, put_of(1)));
  const auto under_way = owner->writer->reserve(4096);
  ASSERT_TRUE(under_way);
  const std::string lost = journal_of(*owner);
  lose_lock(lost);
  const auto taker = start();
  ASSERT_EQ(journal_of(*taker), lost);
  ASSERT_EQ(taker->catalog->entries(), 1u);

  owner->writer->confirm_hold();
  EXPECT_NE(journal_of(*owner), lost);
  EXPECT_TRUE(is_locked(journal_of(*owner)));
  // What was reserved in the lost segment may be overwritten by its new owner: it is not acknowledged.
  const auto refused = owner->writer->acknowledge(*under_way, put_of(2));
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().kind, ErrorKind::closed);
  // Both go on, in segments of their own, and see each other.
  ASSERT_TRUE(owner->writer->prepare_spare(nullptr));
  const auto of_owner = owner->writer->reserve(4096);
  const auto of_taker = taker->writer->reserve(4096);
  ASSERT_TRUE(of_owner);
  ASSERT_TRUE(of_taker);
  EXPECT_NE(of_owner->where.segment, of_taker->where.segment);
  EXPECT_TRUE(owner->writer->acknowledge(*of_owner, put_of(3)));
  EXPECT_TRUE(taker->writer->acknowledge(*of_taker, put_of(4)));
  owner->replay->poll();
  taker->replay->poll();
  EXPECT_EQ(owner->catalog->entries(), 3u);
  EXPECT_EQ(taker->catalog->entries(), 3u);
}

TEST_F(SharedRoot, AJournalThatAnotherProcessTookOverAndLeftIsLeft) {
  const auto owner = start();
  const auto first = owner->writer->reserve(4096);
  ASSERT_TRUE(first);
  ASSERT_TRUE(owner->writer->acknowledge(*first, put_of(1)));
  const std::string lost = journal_of(*owner);
  lose_lock(lost);
  {
    const auto taker = start();
    ASSERT_EQ(journal_of(*taker), lost);
    const auto place = taker->writer->reserve(4096);
    ASSERT_TRUE(place);
    ASSERT_TRUE(taker->writer->acknowledge(*place, put_of(2)));
  }
  owner->writer->confirm_hold();  // its lock is free, but records are in it that the owner did not write
  EXPECT_NE(journal_of(*owner), lost);
}

TEST_F(SharedRoot, AJournalThatWasRemovedIsReplaced) {
  const auto owner = start();
  const std::string removed = journal_of(*owner);
  fs::remove(removed);
  owner->writer->confirm_hold();
  EXPECT_NE(journal_of(*owner), removed);
  EXPECT_TRUE(fs::exists(journal_of(*owner)));
}

class SkewedClock final : public Clock {
 public:
  explicit SkewedClock(std::chrono::hours ahead) : ahead_(ahead) {}
  uint64_t steady_ns() const override { return system_clock().steady_ns(); }
  uint64_t wall_ns() const override {
    return system_clock().wall_ns() + static_cast<uint64_t>(std::chrono::nanoseconds(ahead_).count());
  }

 private:
  const std::chrono::hours ahead_;
};

TEST_F(SharedRoot, ClocksAMonthApartLoseNothingAndKeepTheCapacity) {
  const SkewedClock ahead(std::chrono::hours(24 * 30));
  const SkewedClock behind(-std::chrono::hours(24 * 30));
  const auto first = start(ahead);
  const auto second = start(behind);
  constexpr uint64_t kExtent = 512 << 10;
  const PartShape shape{0, LayoutKind::canonical, {0, 2, 0, 4}, 64};
  uint8_t key = 0;
  for (int round = 0; round < 40; ++round) {
    for (const auto& [writer, reader] : {std::pair(first.get(), second.get()), {second.get(), first.get()}}) {
      auto place = writer->writer->reserve(kExtent);
      if (!place) {
        ASSERT_TRUE(writer->writer->prepare_spare(nullptr)) << round;
        place = writer->writer->reserve(kExtent);
      }
      ASSERT_TRUE(place) << place.error().message;
      const Record put = put_of(++key);
      ASSERT_TRUE(writer->writer->acknowledge(*place, put));
      writer->writer->touch(place->slot);
      reader->replay->poll();
      EXPECT_TRUE(reader->catalog->find(put.key, *reader->catalog->part_id(shape))) << round;
      uint64_t bytes = 0;
      for (const auto& file : fs::directory_iterator(writer->root->segments_dir())) bytes += file.file_size();
      EXPECT_LE(bytes, writer->root->capacity());
    }
  }
  EXPECT_GT(first->writer->evicted_segments() + second->writer->evicted_segments(), 8u);
}

TEST_F(SharedRoot, ManyJournalsAreTailedThroughFewDescriptors) {
  const auto reader = start();
  const auto descriptors = [] {
    return std::distance(fs::directory_iterator("/proc/self/fd"), fs::directory_iterator());
  };
  const auto before = descriptors();
  std::vector<JournalWriter> others;
  for (int i = 0; i < 200; ++i)
    others.push_back(std::move(*JournalWriter::create(reader->root->journals_dir())));
  for (uint8_t round = 1; round <= 3; ++round) {
    for (JournalWriter& other : others) {
      Record put = put_of(round);
      const uint64_t writer = other.writer();
      std::memcpy(put.key.bytes.data() + 8, &writer, sizeof writer);
      put.where = {{writer, 0}, uint64_t{round} * 4096, 4096};
      ASSERT_TRUE(other.append(put));
    }
    reader->replay->poll();
    EXPECT_EQ(reader->catalog->entries(), 200u * round);
    EXPECT_LE(descriptors() - before, 200 + 64);
  }
}

}  // namespace
}  // namespace tokendepot::testing
