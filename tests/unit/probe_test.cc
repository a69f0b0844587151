#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "forked_child.h"
#include "io/engine.h"
#include "io/file.h"
#include "io/scratch_file.h"
#include "temporary_directory.h"

namespace tokendepot {
namespace {

TEST(DirectProbe, FindsAnAlignmentThatReallyWritesAndReads) {
  for (const char* parent : {"/tmp", "/dev/shm"}) {
    const TemporaryDirectory directory(parent);
    const auto alignment = probe_direct_alignment(directory.path());
    EXPECT_EQ(directory.entries(), 0u);
    if (!alignment) {
      EXPECT_EQ(alignment.error().kind, ErrorKind::unsupported) << alignment.error().message;
      continue;
    }
    const uint32_t bytes = *alignment;
    const auto file = File::open(directory / "a", {.write = true, .create = true, .direct = true});
    ASSERT_TRUE(file) << file.error().message;
    std::byte* const memory = static_cast<std::byte*>(std::aligned_alloc(bytes, 2 * size_t{bytes}));
    std::fill(memory, memory + bytes, std::byte{7});
    EXPECT_TRUE(file->write_at({memory, bytes}, 3 * bytes));
    EXPECT_TRUE(file->read_at({memory + bytes, bytes}, 3 * bytes));
    EXPECT_TRUE(std::equal(memory, memory + bytes, memory + bytes));
    std::free(memory);
  }
}

TEST(DirectProbe, SaysWhyWhenTheDirectoryCannotBeWritten) {
  EXPECT_EQ(probe_direct_alignment("/nowhere/at/all").error().kind, ErrorKind::not_found);
  TemporaryDirectory directory;
  if (!directory.mount_tmpfs("size=1m", MS_RDONLY)) GTEST_SKIP() << "cannot mount";
  EXPECT_EQ(probe_direct_alignment(directory.path()).error().kind, ErrorKind::permission);
}

TEST(DirectProbe, OnAFullFileSystemIsNoSpaceNotUnsupported) {
  TemporaryDirectory directory;
  if (!directory.mount_tmpfs("size=64k")) GTEST_SKIP() << "cannot mount";
  {
    const auto file = File::open(directory / "a", {.write = true, .create = true});
    EXPECT_FALSE(file->write_at(std::vector<std::byte>(1 << 20), 0));
    const auto alignment = probe_direct_alignment(directory.path());
    ASSERT_FALSE(alignment);
    EXPECT_EQ(alignment.error().kind, ErrorKind::no_space) << alignment.error().message;
  }
}

// A disk with sectors of 4 KiB accepts the open and refuses smaller transfers.
TEST(DirectProbe, FindsTheSectorsOfADiskThatRefusesSmallerTransfers) {
  const TemporaryDirectory directory;
  const auto shell = [&](const std::string& command) {
    return std::system(("cd " + directory.path() + " && (" + command + ") >/dev/null 2>&1").c_str()) == 0;
  };
  if (!shell("truncate -s 64M image && mkfs.ext4 -q -b 4096 image && mkdir disk &&"
             " losetup -b 4096 -f --show image > loop")) {
    GTEST_SKIP() << "no loop device here";
  }
  if (shell("mount $(cat loop) disk")) {
    EXPECT_EQ(probe_direct_alignment(directory / "disk").value_or(0), 4096u);
    EXPECT_TRUE(shell("umount disk"));
  } else {
    ADD_FAILURE() << "the loop device cannot be mounted";
  }
  EXPECT_TRUE(shell("losetup -d $(cat loop)"));
}

TEST(DirectProbe, IsUnsupportedWhereTheOpenIsRefused) {
  const TemporaryDirectory directory;
  EXPECT_EQ(exit_code_of_child([&] {
              if (!forbid_open_flag(O_DIRECT, EINVAL)) return 1;
              const auto alignment = probe_direct_alignment(directory.path());
              if (alignment || alignment.error().kind != ErrorKind::unsupported) return 2;
              const auto file = File::open(directory / "a", {.write = true, .create = true, .direct = true});
              return !file && file.error().kind == ErrorKind::unsupported ? 0 : 3;
            }),
            0);
  EXPECT_EQ(directory.entries(), 0u);
}

TEST(ScratchFile, HasNoNameAlsoWhereOnlyNamedFilesCanBeMade) {
  constexpr uint32_t kUnnamed = O_TMPFILE & ~O_DIRECTORY;
  for (const int refusal : {0, EOPNOTSUPP, EISDIR}) {
    const TemporaryDirectory directory;
    EXPECT_EQ(exit_code_of_child([&] {
                if (refusal != 0 && !forbid_open_flag(kUnnamed, refusal)) return 1;
                const auto file = ScratchFile::create(directory.path(), false);
                if (!file) return 2;
                struct stat info;
                if (::fstat(file->fd(), &info) != 0 || !S_ISREG(info.st_mode)) return 3;
                return info.st_nlink == 0 && directory.entries() == 0 ? 0 : 4;
              }),
              0);
  }
}

// O_TMPFILE spares the instant with a name in which a kill would leave a file.
TEST(ScratchFile, NeedsNoNameWhereTheFileSystemCanDoWithout) {
  const TemporaryDirectory directory("/dev/shm");
  EXPECT_EQ(exit_code_of_child([&] {
              if (!forbid_open_flag(O_CREAT, EACCES)) return 1;
              return ScratchFile::create(directory.path(), false) ? 0 : 2;
            }),
            0);
}

TEST(ChooseEngine, MeasuresBothAndLeavesNothingBehind) {
  for (const char* parent : {"/tmp", "/dev/shm"}) {
    for (const bool direct : {false, true}) {
      const TemporaryDirectory directory(parent);
      const EngineChoice choice = choose_engine(directory.path(), direct, 8, false).value();
      ASSERT_NE(choice.engine, nullptr);
      EXPECT_EQ(directory.entries(), 0u);
      const bool measured = choice.reason.starts_with("threads ");
      const bool refused =
          choice.reason.starts_with("io_uring: ") || choice.reason.starts_with("not measured: ");
      EXPECT_TRUE(measured || refused) << choice.reason;
    }
  }
}

TEST(ChooseEngine, TellsHowFewReadsAreEnoughWhereItMeasuredThat) {
  constexpr uint64_t kMiB = 1 << 20;
  for (const uint32_t depth : {16u, 8u, 4u, 32u}) {
    const TemporaryDirectory directory;
    const EngineChoice choice = choose_engine(directory.path(), true, depth, true).value();
    const bool measured = choice.reason.ends_with(" MiB of reads at once are enough");
    if (depth == 4 || depth == 32) {
      EXPECT_FALSE(measured) << "there is nothing below 4, and 32 MiB do not keep 32 slots busy";
    }
    if (measured) {
      const uint64_t reads = choice.enough_bytes / kMiB;
      EXPECT_TRUE(reads == depth || reads == depth / 2 || (depth == 16 && reads == 4)) << choice.reason;
    } else {
      EXPECT_EQ(choice.enough_bytes, 0u) << choice.reason;
    }
    EXPECT_EQ(directory.entries(), 0u);
  }
  const TemporaryDirectory directory;
  const EngineChoice uncounted = choose_engine(directory.path(), true, 16, false).value();
  EXPECT_EQ(uncounted.enough_bytes, 0u);
  EXPECT_EQ(uncounted.reason.find("enough"), std::string::npos) << uncounted.reason;
}

TEST(FewestReads, AreThoseThatComeNearTheFastest) {
  const auto fewest = [](std::vector<ReadRate> rates) { return fewest_reads(rates); };
  EXPECT_EQ(fewest({{16, 5.0}, {8, 4.9}, {4, 4.8}}), 4u);
  EXPECT_EQ(fewest({{16, 5.0}, {8, 4.9}, {4, 4.7}}), 8u);
  EXPECT_EQ(fewest({{16, 5.0}, {8, 4.7}, {4, 4.0}}), 16u);
  EXPECT_EQ(fewest({{16, 4.0}, {8, 5.0}, {4, 4.9}}), 4u);
  EXPECT_EQ(fewest({{16, 4.8}, {8, 5.0}, {4, 4.0}}), 8u);
}

/// Ends operations in a thread of its own, the oldest first, and only when as many wait as it was told;
/// counts how many ever waited.
class WaitingEngine final : public IoEngine {
 public:
  WaitingEngine(size_t wanted, size_t total, size_t failing)
      : wanted_(wanted), left_(total), failing_(failing) {
    thread_ = std::thread([this] { run(); });
  }
  ~WaitingEngine() override { thread_.join(); }
  void submit(IoOperation* operation) override {
    const std::lock_guard lock(mutex_);
    waiting_.push_back(operation);
    most_ = std::max(most_, waiting_.size());
    changed_.notify_all();
  }
  const char* name() const override { return "waiting"; }
  uint32_t depth() const override { return 128; }
  bool completes_in_parallel() const override { return false; }
  size_t most() const { return most_; }
  size_t ended() const { return ended_; }

 private:
  void run() {
    std::unique_lock lock(mutex_);
    while (left_ > 0) {
      const size_t wanted = std::min(wanted_, left_);
      // Nobody submits more, or this is where it shows.
      if (!changed_.wait_for(lock, std::chrono::seconds(20), [&] { return waiting_.size() >= wanted; }))
        return;
      IoOperation* const oldest = waiting_.front();
      waiting_.pop_front();
      left_ = ended_ + 1 == failing_ ? waiting_.size() : left_ - 1;
      const int error = ++ended_ == failing_ ? EIO : 0;
      lock.unlock();
      oldest->done(oldest, error);
      lock.lock();
    }
  }

  const size_t wanted_;
  size_t left_;
  const size_t failing_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<IoOperation*> waiting_;
  size_t most_ = 0;
  size_t ended_ = 0;
  std::thread thread_;
};

TEST(MoveAndWait, HasAsManyUnderWayAsAskedForAndNoMore) {
  std::vector<std::byte> memory(24 << 20);
  for (const size_t at_once : {1u, 3u, 24u, 100u}) {
    WaitingEngine engine(at_once, 24, 0);
    EXPECT_EQ(move_and_wait(engine, {}, memory.data(), 0, memory.size(), at_once), 0);
    EXPECT_EQ(engine.most(), std::min<size_t>(at_once, 24));
    EXPECT_EQ(engine.ended(), 24u);
  }
}

TEST(MoveAndWait, BeginsNothingBehindAnError) {
  std::vector<std::byte> memory(24 << 20);
  WaitingEngine engine(4, 24, 7);
  EXPECT_EQ(move_and_wait(engine, {}, memory.data(), 0, memory.size(), 4), EIO);
  EXPECT_EQ(engine.ended(), 7u + 3u) << "those that were under way";
}

TEST(ChooseEngine, TakesThreadsWithTheReasonWhenTheProbeCannotBeWritten) {
  const EngineChoice missing = choose_engine("/nowhere/at/all", false, 2, false).value();
  EXPECT_STREQ(missing.engine->name(), "threads");
  EXPECT_FALSE(missing.reason.empty());

  TemporaryDirectory directory;
  if (!directory.mount_tmpfs("size=1m")) GTEST_SKIP() << "cannot mount";
  const EngineChoice full = choose_engine(directory.path(), false, 2, false).value();
  EXPECT_STREQ(full.engine->name(), "threads");
  if (!full.reason.starts_with("io_uring: ")) {
    EXPECT_NE(full.reason.find("No space left"), std::string::npos) << full.reason;
  }
  EXPECT_EQ(directory.entries(), 0u);
  EXPECT_EQ(file_system_of(directory.path())->available_bytes, 1u << 20);
}

TEST(ChooseEngine, StartsWithoutMemoryToLock) {
  const TemporaryDirectory directory;
  ASSERT_EQ(::chmod(directory.path().c_str(), 0777), 0);
  EXPECT_EQ(exit_code_of_child([&] {
              const rlimit none{};
              if (::setrlimit(RLIMIT_MEMLOCK, &none) != 0) return 1;
              if (::getuid() == 0 && ::setuid(65534) != 0) return 2;
              const EngineChoice choice = choose_engine(directory.path(), false, 128, false).value();
              return choice.engine != nullptr && !choice.reason.empty() ? 0 : 3;
            }),
            0);
}

TEST(ChooseEngine, StartsOnThreadsWhereIoUringIsBlocked) {
  for (const int refusal : {EPERM, ENOSYS}) {
    const TemporaryDirectory directory;
    EXPECT_EQ(exit_code_of_child([&] {
                if (!forbid_calls({SYS_io_uring_setup, SYS_io_uring_enter, SYS_io_uring_register}, refusal))
                  return 1;
                const EngineChoice choice = choose_engine(directory.path(), false, 4, false).value();
                if (std::string_view(choice.engine->name()) != "threads") return 2;
                return choice.reason.starts_with("io_uring: ") ? 0 : 3;
              }),
              0);
  }
}

}  // namespace
}  // namespace tokendepot
