// The writing half of a root: ids, capacity, crash points, leftovers, full and vanishing media.
#include "store/root_writer.h"

#include <sys/mount.h>
#include <sys/wait.h>

#include <fstream>
#include <map>
#include <set>

#include "depot_fixture.h"
#include "forked_child.h"

namespace tokendepot::testing {
namespace {

constexpr uint64_t kSegment = 1 << 20;

/// What one process holds of a root.
struct Process {
  explicit Process(const Options& options) {
    auto opened = Root::open(options.roots[0], 0, options);
    if (!opened) {
      error = opened.error();
      return;
    }
    root = std::move(*opened);
    replay = std::make_unique<Replay>(*root, segments, &catalog);
    EXPECT_TRUE(replay->first());
    auto made = RootWriter::open(*root, *replay, segments, system_clock(), options.free_space_reserve);
    if (!made) {
      error = made.error();
      return;
    }
    writer = std::move(*made);
  }
  bool visible(const Key& key, const Record& put) {
    const auto part = catalog.part_id({put.group, put.kind, put.part, put.tokens});
    return catalog.find(key, *part).has_value();
  }

  Error error{};
  SegmentTable segments;
  Catalog catalog{segments};
  std::unique_ptr<Root> root;
  std::unique_ptr<Replay> replay;
  std::unique_ptr<RootWriter> writer;
};

Key key_of(uint32_t seed) {
  Key key;
  std::mt19937_64 random(seed);
  for (size_t i = 0; i < 4; ++i) {
    const uint64_t value = random();
    std::memcpy(key.bytes.data() + 8 * i, &value, 8);
  }
  return key;
}

Record put_of(uint32_t seed) {
  Record put;
  put.key = key_of(seed);
  put.part = {0, 1, 0, 1};
  put.tokens = 16;
  return put;
}

class RootWriterTest : public ::testing::Test {
 protected:
  explicit RootWriterTest(const std::string& base = "/dev/shm") : directory_(base) {}

  Options options(uint64_t capacity = 4 * kSegment) {
    Options options;
    options.roots = {{.path = root(), .capacity_bytes = capacity, .segment_bytes = kSegment}};
    options.free_space_reserve = 0;
    return options;
  }
  std::string root() const { return directory_.path() + "/root"; }
  std::set<std::string> files(const std::string& under) const {
    std::set<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(root() + "/" + under))
      names.insert(entry.path().filename());
    return names;
  }
  uint64_t bytes_on_medium() const {
    uint64_t total = 0;
    for (const std::string& name : files("segments"))
      total += std::filesystem::file_size(root() + "/segments/" + name);
    return total;
  }
  /// Fills one segment to its end and opens the next one, which seals it.
  static SegmentId fill_a_segment(RootWriter& writer) {
    if (writer.wants_spare()) {
      EXPECT_TRUE(writer.prepare_spare(nullptr));
    }
    auto place = writer.reserve(kSegment);
    EXPECT_TRUE(place) << place.error().message;
    EXPECT_TRUE(writer.acknowledge(*place, put_of(1)));
    return place->where.segment;
  }

  TemporaryDirectory directory_;
};

TEST_F(RootWriterTest, AnIdIsNotUsedAgainAfterAnotherProcessEvictedTheSegment) {
  std::set<SegmentId> used;
  {
    Process first(options());
    ASSERT_TRUE(first.writer);
    used.insert(fill_a_segment(*first.writer));
    used.insert(fill_a_segment(*first.writer));
    used.insert(fill_a_segment(*first.writer));
  }
  {
    Process keeps_the_journal_locked(options());
    Process second(options());
    ASSERT_TRUE(second.writer);
    keeps_the_journal_locked.writer.reset();  // dead again: its last segment is half-filled
    second.writer->tend_dead_writers();
    for (int i = 0; i < 6; ++i) fill_a_segment(*second.writer);
  }
  // Whoever takes the first journal over must not start at a sequence number that was evicted.
  for (int restart = 0; restart < 2; ++restart) {
    Process again(options());
    ASSERT_TRUE(again.writer);
    const SegmentId fresh = fill_a_segment(*again.writer);
    EXPECT_FALSE(used.contains(fresh)) << fresh.sequence;
    EXPECT_TRUE(again.visible(key_of(1), put_of(1))) << "an acknowledged put is in the catalog";
    used.insert(fresh);
  }
}

TEST_F(RootWriterTest, ACondemnedOpenSegmentIsNotWrittenOn) {
  Process process(options());
  ASSERT_TRUE(process.writer);
  ASSERT_TRUE(process.writer->prepare_spare(nullptr));
  auto place = process.writer->reserve(4096);
  ASSERT_TRUE(place);
  // Somebody else's journal takes the segment away.
  Record condemn;
  condemn.type = RecordType::condemn_segment;
  condemn.where.segment = place->where.segment;
  process.replay->apply(condemn);
  ASSERT_TRUE(process.writer->prepare_spare(nullptr));
  auto next = process.writer->reserve(4096);
  ASSERT_TRUE(next);
  EXPECT_NE(next->where.segment, place->where.segment);
  next->segment->mapping.data()[next->where.offset] = std::byte{1};  // and is mapped for writing
}

TEST_F(RootWriterTest, ALeaseOfADroppedSegmentStaysWritable) {
  Process process(options());
  ASSERT_TRUE(process.writer->prepare_spare(nullptr));
  auto place = process.writer->reserve(4096);
  ASSERT_TRUE(place);
  process.root->files().drop(place->where.segment);
  auto other = process.writer->reserve(4096);
  ASSERT_TRUE(other);
  EXPECT_TRUE(other->segment->writable);
  other->segment->mapping.data()[other->where.offset] = std::byte{1};
}

TEST_F(RootWriterTest, ACompactedJournalCannotBeTakenOverByItsOldName) {
  Process process(options());
  const std::string path = root() + "/journals/" + journal_name(process.writer->writer_id());
  auto opened_before = File::open(path, {.write = true});
  ASSERT_TRUE(opened_before);
  std::filesystem::remove(path);
  EXPECT_FALSE(opened_before->is_at_its_path());
  std::ofstream(path) << "";
  const auto stranger = JournalWriter::lock(path, process.writer->writer_id());
  ASSERT_TRUE(stranger) << "another file under that name is another journal";
  EXPECT_TRUE(stranger->has_value());
}

TEST_F(RootWriterTest, CapacityHoldsWithManyProcesses) {
  const Options four = options(8 * kSegment);
  std::vector<std::unique_ptr<Process>> processes;
  for (int i = 0; i < 4; ++i) {
    processes.push_back(std::make_unique<Process>(four));
    ASSERT_TRUE(processes.back()->writer);
  }
  uint32_t stored = 0;
  for (int round = 0; round < 12; ++round) {
    for (auto& process : processes) {
      process->replay->poll();
      if (process->writer->wants_spare()) (void)process->writer->prepare_spare(nullptr);
      if (auto place = process->writer->reserve(kSegment)) {
        stored += process->writer->acknowledge(*place, put_of(stored)) ? 1 : 0;
      }
      EXPECT_LE(bytes_on_medium(), 8 * kSegment);
    }
  }
  EXPECT_GT(stored, 8u) << "and space is recycled between them";
}

TEST_F(RootWriterTest, WithEverythingInUseStoresAreRefusedAndRecoverLater) {
  Process process(options(3 * kSegment));
  std::vector<SegmentId> filled;
  for (int i = 0; i < 3; ++i) filled.push_back(fill_a_segment(*process.writer));
  for (const SegmentId& id : filled) process.segments.acquire(*process.segments.find(id));
  const auto none = process.writer->prepare_spare(nullptr);
  ASSERT_FALSE(none);
  EXPECT_EQ(none.error().kind, ErrorKind::no_space);
  EXPECT_TRUE(process.writer->failing());
  EXPECT_EQ(process.writer->reserve(4096).error().kind, ErrorKind::no_space) << "dropped, not waited for";
  for (const SegmentId& id : filled) process.segments.release(*process.segments.find(id));
  EXPECT_TRUE(process.writer->prepare_spare(nullptr));
  EXPECT_FALSE(process.writer->failing());
  EXPECT_TRUE(process.writer->reserve(4096));
}

TEST_F(RootWriterTest, ACrashBetweenCondemnAndRenameLeavesNoFile) {
  SegmentId victim;
  {
    Process process(options());
    victim = fill_a_segment(*process.writer);
    fill_a_segment(*process.writer);
    Record condemn;
    condemn.type = RecordType::condemn_segment;
    condemn.where.segment = victim;
    condemn.time_ns = 1;
    const uint64_t id = process.writer->writer_id();
    process.writer.reset();
    auto journal = JournalWriter::lock(root() + "/journals/" + journal_name(id), id);
    ASSERT_TRUE(journal && *journal);
    ASSERT_TRUE((*journal)->append_at(std::filesystem::file_size(root() + "/journals/" + journal_name(id)) /
                                      kRecordBytes));
    ASSERT_TRUE((*journal)->append(condemn));
  }
  ASSERT_TRUE(files("segments").contains(segment_name(victim)));
  Process survivor(options());
  survivor.writer->remove_orphans();
  EXPECT_FALSE(files("segments").contains(segment_name(victim)));
}

TEST_F(RootWriterTest, ASpareMadeWhileTheJournalIsCompactedIsNotKept) {
  Process process(options(4 * kSegment));
  const Record put = put_of(7);
  for (uint32_t n = 0; n < 36'000; ++n) process.writer->condemn_extent(put);  // stale records
  for (int i = 0; i < 4; ++i) fill_a_segment(*process.writer);
  // The compaction falls between the choice of the id and the finished spare.
  const uint64_t before = process.writer->writer_id();
  const auto raced = process.writer->prepare_spare([&](uint32_t) -> Status {
    process.writer->compact_journal();
    return {};
  });
  ASSERT_NE(process.writer->writer_id(), before);
  EXPECT_FALSE(raced);
  EXPECT_FALSE(files("journals").contains(journal_name(before)));
  for (const std::string& name : files("segments")) {
    const auto id = segment_of_name(name);
    ASSERT_TRUE(id);
    const auto slot = process.segments.find(*id);
    EXPECT_TRUE(slot && process.segments.get(*slot).roots[0].sealed) << name << " would never be tended";
  }
  EXPECT_TRUE(process.writer->prepare_spare(nullptr));
  fill_a_segment(*process.writer);
}

TEST_F(RootWriterTest, AnUnsealedCopyWithoutAJournalOfItsOwnIsSealed) {
  const SegmentId id{0x1234, 5};
  {
    Process process(options());
    auto copy = process.writer->open_copy(id, kSegment, nullptr);
    ASSERT_TRUE(copy) << copy.error().message;
    ASSERT_TRUE(process.writer->publish_copy(id, *copy, 4096));
    // The crash came within the journal's write: the seal is missing.
    const std::string journal = root() + "/journals/" + journal_name(process.writer->writer_id());
    process.writer.reset();
    std::filesystem::resize_file(journal, std::filesystem::file_size(journal) - kRecordBytes);
  }
  Process survivor(options());
  EXPECT_FALSE(survivor.segments.get(*survivor.segments.find(id)).roots[0].sealed);
  survivor.writer->tend_dead_writers();
  EXPECT_TRUE(survivor.segments.get(*survivor.segments.find(id)).roots[0].sealed) << "else it stays for ever";
}

TEST_F(RootWriterTest, TwoCopiesOfOneSegmentDoNotMeet) {
  Process a(options(8 * kSegment));
  Process b(options(8 * kSegment));
  const SegmentId id{0x77, 1};
  auto first = a.writer->open_copy(id, kSegment, nullptr);
  ASSERT_TRUE(first);
  const auto second = b.writer->open_copy(id, kSegment, nullptr);
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().kind, ErrorKind::busy);
  b.writer->remove_orphans();
  EXPECT_EQ(files("segments").count(".tmp-" + segment_name(id)), 1u) << "a copy in the making is no orphan";
  first = File();  // the copier died
  EXPECT_TRUE(b.writer->open_copy(id, kSegment, nullptr)) << "and a dead one is replaced";
}

TEST_F(RootWriterTest, ACopyThatIsThereIsNotReplacedByAnother) {
  Process first(options(8 * kSegment));
  Process second(options(8 * kSegment));
  const SegmentId id{0x77, 1};
  // Both mean to copy a segment; the first is done, and its source evicted, before the second begins to.
  auto copy = first.writer->open_copy(id, kSegment, nullptr);
  ASSERT_TRUE(copy) << copy.error().message;
  ASSERT_TRUE(first.writer->publish_copy(id, *copy, 4096));
  const auto late = second.writer->open_copy(id, kSegment, nullptr);
  ASSERT_FALSE(late);
  EXPECT_EQ(late.error().kind, ErrorKind::busy);
  const std::string published = root() + "/segments/" + segment_name(id);
  EXPECT_TRUE(std::filesystem::equivalent(published, "/proc/self/fd/" + std::to_string(copy->fd())))
      << "the first copy, still under its name";
}

TEST_F(RootWriterTest, ACopyThatWasFirstIsNotReplacedByOneInTheMaking) {
  Process first(options(8 * kSegment));
  Process second(options(8 * kSegment));
  const SegmentId id{0x77, 1};
  auto late = second.writer->open_copy(id, kSegment, nullptr);
  ASSERT_TRUE(late) << late.error().message;
  const std::string made = late->path();
  std::filesystem::rename(made, made + ".kept");  // passed over as keeper, its copy was begun anew
  auto copy = first.writer->open_copy(id, kSegment, nullptr);
  ASSERT_TRUE(copy) << copy.error().message;
  ASSERT_TRUE(first.writer->publish_copy(id, *copy, 4096));
  std::filesystem::rename(made + ".kept", made);
  const auto published = second.writer->publish_copy(id, *late, 4096);
  ASSERT_FALSE(published);
  EXPECT_EQ(published.error().kind, ErrorKind::busy);
}

TEST_F(RootWriterTest, AJournalThatCannotBeReadToItsEndIsNotCutOff) {
  Process process(options());
  EXPECT_FALSE(process.replay->catch_up(0xdead)) << "unknown";
}

TEST_F(RootWriterTest, ADirectRefusalOnAReadOnlyRootFallsBackToThePageCache) {
  {
    Process process(options());
    fill_a_segment(*process.writer);
  }
  EXPECT_EQ(exit_code_of_child([&] {
              if (!forbid_open_flag(O_DIRECT, EINVAL)) return 1;
              SegmentFiles files(root() + "/segments", false, true, 4);
              int opened = 0;
              for (const auto& entry : std::filesystem::directory_iterator(root() + "/segments")) {
                const auto id = segment_of_name(entry.path().filename());
                if (!id) return 2;
                if (!files.open(*id)) return 3;
                ++opened;
              }
              return opened > 0 ? 0 : 4;
            }),
            0);
}

TEST_F(RootWriterTest, EightProcessesMakeOneRootInTheSameInstant) {
  for (int round = 0; round < 10; ++round) {
    const std::string path = directory_.path() + "/race" + std::to_string(round);
    int gate[2];
    ASSERT_EQ(pipe(gate), 0);
    std::vector<pid_t> children;
    for (int i = 0; i < 8; ++i) {
      const pid_t child = fork();
      if (child == 0) {
        close(gate[1]);
        char none = 0;
        (void)!read(gate[0], &none, 1);
        Options mine = options(64 * kSegment);
        mine.roots[0].path = path;
        const auto opened = Root::open(mine.roots[0], 0, mine);
        _exit(opened ? 0 : 1);
      }
      children.push_back(child);
    }
    close(gate[0]);
    close(gate[1]);
    for (const pid_t child : children) {
      int status = 0;
      waitpid(child, &status, 0);
      EXPECT_EQ(status, 0) << "round " << round;
    }
  }
}

TEST_F(RootWriterTest, WithoutPermissionToWriteTheRootIsServedReadOnly) {
  SegmentId id;
  {
    Process process(options());
    id = fill_a_segment(*process.writer);
  }
  std::filesystem::permissions(directory_.path(), std::filesystem::perms(0755));
  for (const char* name : {"", "/segments", "/journals", "/manifests"})
    std::filesystem::permissions(root() + name, std::filesystem::perms(0555));
  for (const auto& entry : std::filesystem::recursive_directory_iterator(root())) {
    if (entry.is_regular_file()) std::filesystem::permissions(entry.path(), std::filesystem::perms(0444));
  }
  const Options mine = options();
  EXPECT_EQ(exit_code_of_child([&] {
              if (getuid() == 0 && setuid(65534) != 0) return 9;
              auto opened = Root::open(mine.roots[0], 0, mine);
              if (!opened) return 1;
              if ((*opened)->writable()) return 2;
              SegmentTable segments;
              Replay replay(**opened, segments, nullptr);
              if (!replay.first()) return 3;
              return (*opened)->files().open(id) ? 0 : 4;
            }),
            0);
  for (const char* name : {"", "/segments", "/journals", "/manifests"})
    std::filesystem::permissions(root() + name, std::filesystem::perms(0755));
}

/// A small file system of its own, where the test may mount.
class FullDisk : public RootWriterTest {
 protected:
  bool mount(const char* size) { return directory_.mount_tmpfs(size); }
  void fill_up() {
    std::ofstream other(directory_.path() + "/another-tenant", std::ios::binary | std::ios::app);
    const std::vector<char> block(4096, 'x');
    while (other.write(block.data(), 4096).flush()) {
    }
  }
};

TEST_F(FullDisk, TheCapacityIsRefusedOrHonoured) {
  if (!mount("size=8m")) GTEST_SKIP() << "may not mount";
  Process refused(options(64 * kSegment));
  EXPECT_FALSE(refused.writer);
  EXPECT_EQ(refused.error.kind, ErrorKind::invalid_argument);
  Process process(options(8 * kSegment));
  ASSERT_TRUE(process.writer) << process.error.message;
  uint32_t stored = 0;
  for (int i = 0; i < 20; ++i) {
    if (process.writer->wants_spare()) (void)process.writer->prepare_spare(nullptr);
    auto place = process.writer->reserve(kSegment);
    if (!place) continue;
    std::memset(place->segment->mapping.data() + place->where.offset, 1, kSegment);  // no SIGBUS: allocated
    stored += process.writer->acknowledge(*place, put_of(static_cast<uint32_t>(i))) ? 1 : 0;
  }
  EXPECT_GE(stored, 16u) << "the medium holds fewer segments than the capacity, so the coldest go earlier";
}

TEST_F(FullDisk, WhenAnotherTenantFillsTheDiskOldSegmentsMakeRoom) {
  if (!mount("size=8m")) GTEST_SKIP() << "may not mount";
  Process process(options(6 * kSegment));
  ASSERT_TRUE(process.writer);
  for (int i = 0; i < 4; ++i) fill_a_segment(*process.writer);
  fill_up();
  // Not one more record may fit now; still the next segments must come.
  uint32_t stored = 0;
  for (uint32_t i = 0; i < 200; ++i) {
    if (process.writer->wants_spare()) (void)process.writer->prepare_spare(nullptr);
    auto place = process.writer->reserve(kSegment / 16);
    if (place && process.writer->acknowledge(*place, put_of(100 + i))) ++stored;
  }
  EXPECT_GT(stored, 64u) << "more than the records that the journal's last page still had room for";
  const uint32_t while_full = stored;
  std::filesystem::remove(directory_.path() + "/another-tenant");
  for (uint32_t i = 0; i < 32; ++i) {
    if (process.writer->wants_spare()) (void)process.writer->prepare_spare(nullptr);
    auto place = process.writer->reserve(kSegment / 16);
    if (place && process.writer->acknowledge(*place, put_of(1000 + i))) ++stored;
  }
  EXPECT_GE(stored - while_full, 30u) << "recovers without a restart";
}

TEST_F(FullDisk, OneSegmentGoesWhileItsSpaceIsNotFreeYet) {
  if (!mount("size=8m")) GTEST_SKIP() << "may not mount";
  {
    Process process(options(6 * kSegment));
    ASSERT_TRUE(process.writer);
    for (int i = 0; i < 4; ++i) fill_a_segment(*process.writer);
  }
  std::vector<File> held;
  for (const std::string& name : files("segments")) {
    auto file = File::open(root() + "/segments/" + name, {});
    ASSERT_TRUE(file);
    held.push_back(std::move(*file));
  }
  fill_up();
  Options larger = options(6 * kSegment);
  larger.roots[0].segment_bytes = 2 * kSegment;  // no file can become one of these
  Process process(larger);
  ASSERT_TRUE(process.writer) << process.error.message;
  const size_t before = files("segments").size();
  const auto refused = process.writer->prepare_spare(nullptr);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().kind, ErrorKind::busy) << refused.error().message;
  EXPECT_EQ(files("segments").size(), before - 1);
  held.clear();
  EXPECT_TRUE(process.writer->prepare_spare(nullptr));
}

TEST_F(FullDisk, AFileThatDoesNotBecomeASegmentIsNotLeftBehind) {
  if (!mount("size=8m")) GTEST_SKIP() << "may not mount";
  Process process(options(6 * kSegment));
  ASSERT_TRUE(process.writer);
  fill_up();
  for (int i = 0; i < 5; ++i) EXPECT_FALSE(process.writer->prepare_spare(nullptr));
  EXPECT_TRUE(files("segments").empty());
}

}  // namespace
}  // namespace tokendepot::testing
