// Who is a root's keeper: death frees the lock, standing still loses it, and who lost it does no harm.
#include "store/keeper_lock.h"

#include <signal.h>
#include <sys/wait.h>

#include <fstream>
#include <map>

#include "depot_fixture.h"
#include "forked_child.h"
#include "store/replay.h"
#include "store/root_writer.h"

namespace tokendepot::testing {
namespace {

constexpr uint64_t kStuckMs = 300;
constexpr uint64_t kSegment = 1 << 20;

class KeeperLockTest : public ::testing::Test {
 protected:
  KeeperLockTest() : directory_("/dev/shm") {}
  std::string path() const { return directory_.path() + "/keeper.lock"; }
  TemporaryDirectory directory_;
};

TEST_F(KeeperLockTest, OneHolderAtATimeAndTheNextAfterIt) {
  KeeperElection a(path());
  KeeperElection b(path());
  {
    const auto held = a.acquire(0);
    ASSERT_TRUE(held && *held);
    EXPECT_TRUE((*held)->held());
    const auto other = b.acquire(20);
    ASSERT_TRUE(other);
    EXPECT_FALSE(*other);
  }
  const auto other = b.acquire(0);
  EXPECT_TRUE(other && *other);
}

TEST_F(KeeperLockTest, ADeadHolderFreesItAtOnce) {
  const pid_t child = fork();
  if (child == 0) {
    KeeperElection mine(path());
    const auto held = mine.acquire(0);
    raise(held && *held ? SIGKILL : SIGTERM);
  }
  int status = 0;
  waitpid(child, &status, 0);
  ASSERT_EQ(WTERMSIG(status), SIGKILL) << "it held the lock";
  KeeperElection next(path());
  const auto held = next.acquire(0);
  EXPECT_TRUE(held && *held);
}

TEST_F(KeeperLockTest, AStoppedHolderIsPassedOverAndSeesItWhenItGoesOn) {
  const pid_t child = fork();
  if (child == 0) {
    KeeperElection mine(path());
    const auto held = mine.acquire(0);
    if (!held || !*held || !(*held)->held()) _exit(1);
    raise(SIGSTOP);
    _exit((*held)->held() ? 2 : 0);
  }
  int status = 0;
  waitpid(child, &status, WUNTRACED);
  ASSERT_TRUE(WIFSTOPPED(status));
  KeeperElection next(path(), kStuckMs);
  const auto early = next.acquire(20);
  ASSERT_TRUE(early);
  EXPECT_FALSE(*early) << "a holder that stood still for a moment keeps it";
  std::optional<KeeperLock> held;
  for (int i = 0; i < 100 && !held; ++i) held = std::move(*next.acquire(50));
  ASSERT_TRUE(held);
  kill(child, SIGCONT);
  waitpid(child, &status, 0);
  EXPECT_EQ(WEXITSTATUS(status), 0) << "it still believed that it was the keeper";
  EXPECT_TRUE(held->held());
}

TEST_F(KeeperLockTest, AHolderThatRenewsIsNotPassedOver) {
  KeeperElection a(path());
  KeeperElection b(path(), kStuckMs);
  auto held = a.acquire(0);
  ASSERT_TRUE(held && *held);
  for (int i = 0; i < 40; ++i) {
    (*held)->renew();
    const auto other = b.acquire(20);
    ASSERT_TRUE(other);
    ASSERT_FALSE(*other);
  }
  EXPECT_TRUE((*held)->held());
}

/// What one process holds of a root.
struct Process {
  explicit Process(const std::string& path) {
    Options options;
    options.roots = {{.path = path, .capacity_bytes = 4 * kSegment, .segment_bytes = kSegment}};
    root = std::move(*Root::open(options.roots[0], 0, options));
    replay = std::make_unique<Replay>(*root, segments, &catalog);
    EXPECT_TRUE(replay->first());
    writer = std::move(*RootWriter::open(*root, *replay, segments, system_clock(), 0));
  }
  SegmentId fill_a_segment(uint8_t seed) {
    replay->poll();
    if (writer->wants_spare()) {
      EXPECT_TRUE(writer->prepare_spare(nullptr));
    }
    auto place = writer->reserve(kSegment);
    EXPECT_TRUE(place);
    Record put;
    put.key.bytes[0] = seed;
    put.part = {0, 1, 0, 1};
    put.tokens = 16;
    EXPECT_TRUE(writer->acknowledge(*place, put));
    return place->where.segment;
  }
  bool has(const SegmentId& id) { return std::filesystem::exists(root->files().path_of(id)); }

  SegmentTable segments;
  Catalog catalog{segments};
  std::unique_ptr<Root> root;
  std::unique_ptr<Replay> replay;
  std::unique_ptr<RootWriter> writer;
};

class StaleKeeper : public KeeperLockTest {
 protected:
  std::string root() const { return directory_.path() + "/root"; }
  /// What a process does that has waited for a minute: afterwards the present holder has lost the lock.
  void take_over() { std::filesystem::remove(root() + "/keeper.lock"); }
};

TEST_F(StaleKeeper, WhoLostTheLockWhileItEvictedEvictsNothing) {
  Process stale(root());
  std::map<SegmentId, bool> filled;
  for (uint8_t i = 0; i < 4; ++i) filled[stale.fill_a_segment(i)] = true;
  size_t before = 0;
  for (const auto& [id, unused] : filled) before += stale.has(id) ? 1 : 0;
  // It was stopped between the choice of a victim and its end.
  const auto late = stale.writer->prepare_spare([&](uint32_t) -> Status {
    take_over();
    return {};
  });
  ASSERT_FALSE(late);
  EXPECT_EQ(late.error().kind, ErrorKind::busy) << late.error().message;
  size_t after = 0;
  for (const auto& [id, unused] : filled) after += stale.has(id) ? 1 : 0;
  EXPECT_EQ(after, before);
  EXPECT_TRUE(stale.writer->prepare_spare(nullptr)) << "and as a keeper again it goes on";
}

TEST_F(StaleKeeper, AVictimThatAnotherKeeperRecycledMeanwhileIsNotTakenFromIt) {
  Process stale(root());
  Process other(root());
  std::vector<SegmentId> filled;
  for (uint8_t i = 0; i < 3; ++i) filled.push_back(stale.fill_a_segment(i));
  other.replay->poll();
  // The stale one has looked whether it is still the keeper; then the other evicts the same segment, recycles
  // it, fills it and acknowledges. Ids are never given twice, so the late rename finds nothing.
  SegmentId theirs{};
  for (uint8_t i = 10; i < 13; ++i) theirs = other.fill_a_segment(i);
  ASSERT_FALSE(stale.has(filled[0]));
  ASSERT_EQ(rename_file(stale.root->files().path_of(filled[0]),
                        stale.root->files().path_of({stale.writer->writer_id(), 99}))
                .error()
                .kind,
            ErrorKind::not_found);
  EXPECT_TRUE(other.has(theirs));
  // What the stale one still believes in is told as absent, and it recovers by itself.
  for (uint8_t i = 20; i < 24; ++i) stale.fill_a_segment(i);
}

TEST_F(StaleKeeper, ALateCopyIsNotPublishedOverAnotherOne) {
  Process stale(root());
  Process other(root());
  const SegmentId id{0x77, 1};
  const auto late = stale.writer->open_copy(id, kSegment, nullptr);
  ASSERT_TRUE(late);
  // Where locks die with a lease, the other takes it for a leftover, removes it and makes its own.
  std::filesystem::remove(late->path());
  const auto copy = other.writer->open_copy(id, kSegment, nullptr);
  ASSERT_TRUE(copy);
  const auto published = stale.writer->publish_copy(id, *late, kSegment);
  ASSERT_FALSE(published);
  EXPECT_EQ(published.error().kind, ErrorKind::busy);
  EXPECT_FALSE(stale.has(id));
  EXPECT_TRUE(other.writer->publish_copy(id, *copy, 4096));
  EXPECT_TRUE(other.has(id));
}

TEST_F(StaleKeeper, ACopyThatComesAfterItsSegmentWasCondemnedThereServesNobody) {
  Process stale(root());
  Process other(root());
  const SegmentId id{0x77, 1};
  const auto late = stale.writer->open_copy(id, kSegment, nullptr);
  ASSERT_TRUE(late);
  Record condemn;
  condemn.type = RecordType::condemn_segment;
  condemn.where.segment = id;
  other.replay->apply(condemn);
  ASSERT_TRUE(stale.writer->publish_copy(id, *late, kSegment));
  other.replay->poll();
  EXPECT_EQ(other.segments.present_in(*other.segments.find(id)), 0u);
}

}  // namespace
}  // namespace tokendepot::testing
