// A journal whose lock was lost, as on a network file system after a broken connection.
#include <fcntl.h>
#include <unistd.h>

#include "depot_fixture.h"
#include "store/root_writer.h"

namespace tokendepot::testing {
namespace {

namespace fs = std::filesystem;

class Hold : public ::testing::Test {
 protected:
  /// A process that writes to the root.
  struct Process {
    std::unique_ptr<Root> root;
    SegmentTable segments;
    std::unique_ptr<Catalog> catalog;
    std::unique_ptr<Replay> replay;
    std::unique_ptr<RootWriter> writer;
  };

  std::unique_ptr<Process> start() {
    auto process = std::make_unique<Process>();
    Options options;
    const RootOptions root{
        .path = directory_.path() + "/root", .capacity_bytes = 16 << 20, .segment_bytes = 1 << 20};
    process->root = std::move(*Root::open(root, 0, options));
    process->catalog = std::make_unique<Catalog>(process->segments);
    process->replay = std::make_unique<Replay>(*process->root, process->segments, process->catalog.get());
    EXPECT_TRUE(process->replay->first());
    process->writer =
        std::move(*RootWriter::open(*process->root, *process->replay, process->segments, system_clock(), 0));
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

TEST_F(Hold, ALockThatNobodyTookMeanwhileIsTakenBack) {
  const auto owner = start();
  const auto before = owner->writer->writer_id();
  lose_lock(journal_of(*owner));
  EXPECT_FALSE(is_locked(journal_of(*owner)));
  owner->writer->confirm_hold();
  EXPECT_EQ(owner->writer->writer_id(), before);
  EXPECT_TRUE(is_locked(journal_of(*owner)));
}

TEST_F(Hold, AJournalThatAnotherProcessTookOverIsLeftToIt) {
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

TEST_F(Hold, AJournalThatAnotherProcessTookOverAndLeftIsLeft) {
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

TEST_F(Hold, AJournalThatWasRemovedIsReplaced) {
  const auto owner = start();
  const std::string removed = journal_of(*owner);
  fs::remove(removed);
  owner->writer->confirm_hold();
  EXPECT_NE(journal_of(*owner), removed);
  EXPECT_TRUE(fs::exists(journal_of(*owner)));
}

}  // namespace
}  // namespace tokendepot::testing
