#include "io/mapping.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "forked_child.h"
#include "temporary_directory.h"

namespace tokendepot {
namespace {

constexpr uint64_t kBytes = 1 << 20;

struct MappedFile {
  explicit MappedFile(const std::string& path, uint64_t size = kBytes)
      : file(std::move(*File::open(path, {.write = true, .create = true}))) {
    EXPECT_TRUE(file.preallocate(size));
    mapping = std::move(*Mapping::map(file, size, true));
  }
  std::span<const std::byte> bytes() const { return {mapping.data(), mapping.size()}; }
  File file;
  Mapping mapping;
};

unsigned touch(const std::byte* at) {
  return static_cast<unsigned>(*const_cast<const volatile std::byte*>(at));
}

bool readable(std::span<const std::byte> bytes) {
  unsigned sum = 0;
  auto body = [&] {
    for (size_t i = 0; i < bytes.size(); i += 4096) sum += touch(bytes.data() + i);
  };
  return guard_mapping(bytes, body);
}

TEST(Mapping, SharesBytesWithTheFile) {
  for (const char* parent : {"/tmp", "/dev/shm"}) {
    const TemporaryDirectory directory(parent);
    const MappedFile mapped(directory / "a");
    std::memcpy(mapped.mapping.data() + 5000, "hello", 5);
    std::byte in[5];
    ASSERT_TRUE(mapped.file.read_at(in, 5000));
    EXPECT_EQ(std::memcmp(in, "hello", 5), 0);
  }
}

TEST(Mapping, RefusesMoreThanTheFileHasAndNothingAtAll) {
  const TemporaryDirectory directory;
  const auto file = File::open(directory / "a", {.write = true, .create = true});
  ASSERT_TRUE(file->truncate(4096));
  for (const uint64_t bytes : {uint64_t{0}, uint64_t{4097}, uint64_t{1} << 40}) {
    const auto mapping = Mapping::map(*file, bytes, false);
    ASSERT_FALSE(mapping);
    EXPECT_EQ(mapping.error().kind, ErrorKind::invalid_argument);
  }
  const auto read_only = File::open(directory / "a", {});
  EXPECT_TRUE(Mapping::map(*read_only, 4096, false));
  EXPECT_EQ(Mapping::map(*read_only, 4096, true).error().kind, ErrorKind::permission);
}

TEST(Mapping, MovesItsOwnership) {
  const TemporaryDirectory directory;
  MappedFile mapped(directory / "a");
  std::byte* const address = mapped.mapping.data();
  Mapping moved(std::move(mapped.mapping));
  EXPECT_FALSE(mapped.mapping.is_mapped());
  EXPECT_EQ(moved.data(), address);
  EXPECT_EQ(moved.size(), kBytes);
  moved = Mapping();
  EXPECT_FALSE(moved.is_mapped());
}

int64_t faults_of_this_thread() {
  rusage usage{};
  EXPECT_EQ(getrusage(RUSAGE_THREAD, &usage), 0);
  return usage.ru_minflt;
}

/// While the first byte of each page is written.
int64_t faults_of_writing(std::span<std::byte> bytes) {
  const int64_t before = faults_of_this_thread();
  for (uint64_t at = 0; at < bytes.size(); at += 4096) bytes[at] = std::byte{1};
  return faults_of_this_thread() - before;
}

class PopulatedMapping : public ::testing::Test {
 protected:
  static constexpr uint64_t kMany = (3 << 20) + 4096;  // slices, and a piece of one
  static constexpr int64_t kPages = kMany / 4096;
  static constexpr int64_t kFew = kPages / 2;  // a sanitizer has pages of its own

  void SetUp() override {
    MappedFile probe(directory_.path() + "/probe", kMany);
#ifdef MADV_POPULATE_WRITE
    if (::madvise(probe.mapping.data(), 4096, MADV_POPULATE_WRITE) != 0)
      GTEST_SKIP() << "this kernel populates nothing";
#else
    GTEST_SKIP() << "this system populates nothing";
#endif
    const int64_t faults = faults_of_writing({probe.mapping.data() + 4096, kMany - 4096});
    if (faults < kPages - 1) GTEST_SKIP() << "this machine maps pages ahead: " << faults << " faults";
  }
  const TemporaryDirectory directory_{"/dev/shm"};
};

// Fresh segments: what they are written with afterwards, and what a driver pins, must be there.
TEST_F(PopulatedMapping, OfAFreshFileIsWrittenWithoutAFaultForEachPage) {
  MappedFile mapped(directory_.path() + "/file", kMany);
  mapped.mapping.populate();
  EXPECT_LT(faults_of_writing({mapped.mapping.data(), kMany}), kFew);
}

TEST_F(PopulatedMapping, OfATruncatedFileIsPopulatedAsFarAsItGoes) {
  constexpr uint64_t kLeft = 2 << 20;
  MappedFile mapped(directory_.path() + "/file", kMany);
  ASSERT_EQ(truncate((directory_.path() + "/file").c_str(), kLeft), 0);
  mapped.mapping.populate();
  EXPECT_LT(faults_of_writing({mapped.mapping.data(), kLeft}), kFew / 2);
  EXPECT_FALSE(readable(mapped.bytes()));
}

TEST(Guard, RunsTheBodyOnce) {
  const TemporaryDirectory directory;
  const MappedFile mapped(directory / "a");
  int runs = 0;
  auto body = [&] { ++runs; };
  EXPECT_TRUE(guard_mapping(mapped.bytes(), body));
  EXPECT_EQ(runs, 1);
}

TEST(Guard, ATruncatedFileIsAnErrorAgainAndAgain) {
  for (const char* parent : {"/tmp", "/dev/shm"}) {
    const TemporaryDirectory directory(parent);
    const MappedFile mapped(directory / "a");
    EXPECT_TRUE(readable(mapped.bytes()));
    ASSERT_TRUE(mapped.file.truncate(kBytes / 2));
    for (int i = 0; i < 100; ++i) EXPECT_FALSE(readable(mapped.bytes()));
    EXPECT_TRUE(readable(mapped.bytes().first(kBytes / 2)));
    ASSERT_TRUE(mapped.file.truncate(kBytes));
    EXPECT_TRUE(readable(mapped.bytes()));
  }
}

TEST(Guard, CatchesWritesAndBlockCopies) {
  const TemporaryDirectory directory;
  const MappedFile mapped(directory / "a");
  ASSERT_TRUE(mapped.file.truncate(0));
  std::vector<std::byte> memory(kBytes, std::byte{1});
  auto write = [&] { std::memcpy(mapped.mapping.data(), memory.data(), kBytes); };
  auto read = [&] { std::memcpy(memory.data(), mapped.mapping.data(), kBytes); };
  EXPECT_FALSE(guard_mapping(mapped.bytes(), write));
  EXPECT_FALSE(guard_mapping(mapped.bytes(), read));
}

TEST(Guard, CoversWholePagesOfAnUnalignedRange) {
  const TemporaryDirectory directory;
  const MappedFile mapped(directory / "a");
  ASSERT_TRUE(mapped.file.truncate(0));
  EXPECT_FALSE(readable(mapped.bytes().subspan(5000, 10)));
}

TEST(Guard, WorksOnManyThreadsAtOnce) {
  const TemporaryDirectory directory;
  const MappedFile good(directory / "good");
  const MappedFile bad(directory / "bad");
  ASSERT_TRUE(bad.file.truncate(4096));
  std::atomic<int> wrong = 0;
  {
    std::vector<std::jthread> threads;
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&, t] {
        for (int i = 0; i < 500; ++i) {
          const bool expect_good = (i + t) % 2 == 0;
          if (readable(expect_good ? good.bytes() : bad.bytes()) != expect_good) ++wrong;
        }
      });
    }
  }
  EXPECT_EQ(wrong, 0);
}

TEST(Guard, WorksOnAThreadThatBlocksTheSignal) {
  const TemporaryDirectory directory;
  const MappedFile mapped(directory / "a");
  ASSERT_TRUE(mapped.file.truncate(0));
  std::jthread([&] {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, nullptr);
    EXPECT_FALSE(readable(mapped.bytes()));
  });
}

TEST(Guard, NestsAndLeavesExactlyTheRangeThatFailed) {
  const TemporaryDirectory directory;
  const MappedFile files[4] = {MappedFile(directory / "0"), MappedFile(directory / "1"),
                               MappedFile(directory / "2"), MappedFile(directory / "3")};
  for (int failing = 0; failing < 4; ++failing) {
    ASSERT_TRUE(files[failing].file.truncate(0));
    int deepest = 0;
    bool inner_ended[4] = {};
    bool result[4] = {};
    auto at3 = [&] {
      deepest = 3;
      touch(files[failing].mapping.data());
    };
    auto at2 = [&] {
      result[3] = guard_mapping(files[3].bytes(), at3);
      inner_ended[3] = true;
    };
    auto at1 = [&] {
      result[2] = guard_mapping(files[2].bytes(), at2);
      inner_ended[2] = true;
    };
    auto at0 = [&] {
      result[1] = guard_mapping(files[1].bytes(), at1);
      inner_ended[1] = true;
    };
    result[0] = guard_mapping(files[0].bytes(), at0);
    inner_ended[0] = true;
    EXPECT_EQ(deepest, 3);
    for (int i = 0; i < 4; ++i) {
      EXPECT_EQ(inner_ended[i], i <= failing) << i << " while " << failing << " fails";
      EXPECT_EQ(result[i], i < failing) << i << " while " << failing << " fails";
    }
    // After the jump the outer guards are still in place.
    EXPECT_FALSE(readable(files[failing].bytes()));
    ASSERT_TRUE(files[failing].file.truncate(kBytes));
  }
}

TEST(GuardDeathTest, AnUnguardedFaultStillEndsTheProcess) {
  const TemporaryDirectory directory;
  const MappedFile guarded(directory / "guarded");
  const MappedFile other(directory / "other");
  ASSERT_TRUE(guarded.file.truncate(0));
  ASSERT_TRUE(other.file.truncate(0));
  const auto standard = [] {
    struct sigaction action{};
    action.sa_handler = SIG_DFL;
    ::sigaction(SIGBUS, &action, nullptr);
  };
  EXPECT_EQ(exit_code_of_child([&] {
              standard();
              if (readable(guarded.bytes())) return 1;
              touch(other.mapping.data());
              return 2;
            }),
            1000 + SIGBUS);
  // A guard that has caught a fault guards no longer.
  EXPECT_EQ(exit_code_of_child([&] {
              standard();
              if (readable(guarded.bytes())) return 1;
              touch(guarded.mapping.data());
              return 2;
            }),
            1000 + SIGBUS);
  EXPECT_EQ(exit_code_of_child([&] {
              standard();
              auto body = [&] { touch(other.mapping.data()); };
              guard_mapping(guarded.bytes(), body);
              return 2;
            }),
            1000 + SIGBUS);
  EXPECT_EQ(exit_code_of_child([&] {
              standard();
              if (readable(guarded.bytes())) return 1;
              ::raise(SIGBUS);
              return 2;
            }),
            1000 + SIGBUS);
}

// What a crash reporter does: report, put back whoever was there before, raise again.
struct sigaction before_reporter;
std::atomic<int> reports = 0;
void reporter(int signal) {
  if (++reports > 1) ::_exit(99);
  ::sigaction(SIGBUS, &before_reporter, nullptr);
  ::raise(signal);
}
void install_reporter() {
  struct sigaction action{};
  action.sa_handler = reporter;
  action.sa_flags = SA_NODEFER;
  ::sigaction(SIGBUS, &action, &before_reporter);
}

TEST(GuardDeathTest, GetsAlongWithACrashReporterInstalledEarlierOrLater) {
  const TemporaryDirectory directory;
  const MappedFile guarded(directory / "guarded");
  const MappedFile other(directory / "other");
  ASSERT_TRUE(guarded.file.truncate(0));
  ASSERT_TRUE(other.file.truncate(0));
  for (const bool later : {false, true}) {
    for (const bool crash : {false, true}) {
      EXPECT_EQ(exit_code_of_child([&] {
                  struct sigaction action{};
                  action.sa_handler = SIG_DFL;
                  ::sigaction(SIGBUS, &action, nullptr);
                  if (later && readable(guarded.bytes())) return 1;
                  install_reporter();
                  for (int i = 0; i < 3; ++i) {
                    if (readable(guarded.bytes())) return 2;
                  }
                  if (reports != 0) return 3;
                  if (crash) touch(other.mapping.data());
                  return 0;
                }),
                crash ? 1000 + SIGBUS : 0)
          << (later ? "later" : "earlier");
    }
  }
}

std::atomic<const std::byte*> expected_address = nullptr;
void exit_with_5_at_the_expected_address(int, siginfo_t* info, void*) {
  ::_exit(info->si_addr == expected_address ? 5 : 6);
}

TEST(GuardDeathTest, HandsOtherFaultsToTheHandlerInstalledBefore) {
  const TemporaryDirectory directory;
  const MappedFile guarded(directory / "guarded");
  const MappedFile other(directory / "other");
  ASSERT_TRUE(other.file.truncate(0));
  EXPECT_EQ(exit_code_of_child([&] {
              struct sigaction action{};
              action.sa_sigaction = exit_with_5_at_the_expected_address;
              action.sa_flags = SA_SIGINFO;
              ::sigaction(SIGBUS, &action, nullptr);
              if (!readable(guarded.bytes())) return 1;
              expected_address = other.mapping.data() + 4096;
              touch(expected_address);
              return 2;
            }),
            5);
}

}  // namespace
}  // namespace tokendepot
