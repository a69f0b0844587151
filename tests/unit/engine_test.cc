#include "io/engine.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "forked_child.h"
#include "io/file.h"
#include "temporary_directory.h"

namespace tokendepot {
namespace {

constexpr File::Flags kNew{.write = true, .create = true, .exclusive = true};

std::vector<std::byte> pattern(size_t bytes, uint32_t seed = 1) {
  std::vector<std::byte> content(bytes);
  uint32_t state = seed;
  for (std::byte& byte : content) {
    state = state * 1664525 + 1013904223;
    byte = static_cast<std::byte>(state >> 24);
  }
  return content;
}

// Waits for operations and keeps their errors, one each.
class Batch {
 public:
  explicit Batch(size_t operations) : operations_(operations), errors_(operations, -1), left_(operations) {}

  IoOperation& prepare(size_t index, int fd, bool write, std::byte* buffer, uint64_t offset, uint32_t bytes) {
    operations_[index] = {.fd = fd,
                          .write = write,
                          .buffer = buffer,
                          .offset = offset,
                          .bytes = bytes,
                          .done = &Batch::on_done,
                          .owner = this};
    return operations_[index];
  }
  void wait() {
    std::unique_lock lock(mutex_);
    ended_.wait(lock, [this] { return left_ == 0; });
  }
  int error(size_t index) const { return errors_[index]; }
  size_t left() {
    const std::lock_guard lock(mutex_);
    return left_;
  }

 private:
  static void on_done(IoOperation* self, int error) {
    Batch& batch = *static_cast<Batch*>(self->owner);
    const std::lock_guard lock(batch.mutex_);
    int& kept = batch.errors_[static_cast<size_t>(self - batch.operations_.data())];
    EXPECT_EQ(kept, -1) << "reported twice";
    kept = error;
    if (--batch.left_ == 0) batch.ended_.notify_one();
  }

  std::vector<IoOperation> operations_;
  std::vector<int> errors_;
  std::mutex mutex_;
  std::condition_variable ended_;
  size_t left_;
};

int run_one(IoEngine& engine, int fd, bool write, std::byte* buffer, uint64_t offset, uint32_t bytes) {
  Batch batch(1);
  engine.submit(&batch.prepare(0, fd, write, buffer, offset, bytes));
  batch.wait();
  return batch.error(0);
}

struct Free {
  void operator()(std::byte* memory) const { std::free(memory); }
};
std::unique_ptr<std::byte, Free> aligned(size_t bytes) {
  return std::unique_ptr<std::byte, Free>(static_cast<std::byte*>(std::aligned_alloc(65536, bytes)));
}

std::unique_ptr<IoEngine> make(const std::string& kind, uint32_t depth) {
  auto engine = kind == "threads" ? make_thread_engine(depth) : make_uring_engine(depth);
  return engine ? std::move(*engine) : nullptr;
}

class Engine : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    if (make(GetParam(), 1) == nullptr) GTEST_SKIP() << make_uring_engine(1).error().message;
  }
  std::unique_ptr<IoEngine> engine(uint32_t depth) const { return make(GetParam(), depth); }
};
INSTANTIATE_TEST_SUITE_P(Both, Engine, ::testing::Values("threads", "uring"),
                         [](const auto& instance) { return std::string(instance.param); });

TEST_P(Engine, MovesEveryPieceExactlyAtAnyDepthAndAlignment) {
  for (const char* parent : {"/tmp", "/dev/shm"}) {
    const TemporaryDirectory directory(parent);
    for (const uint32_t depth : {1u, 3u, 32u, 128u}) {
      const auto file = File::open(directory / std::to_string(depth), kNew);
      const auto io = engine(depth);
      EXPECT_STREQ(io->name(), GetParam());
      constexpr size_t kPieces = 200;
      constexpr uint32_t kBytes = 20'011;
      std::vector<std::byte> out = pattern(kPieces * kBytes, depth);
      std::vector<std::byte> in(out.size());
      Batch writes(kPieces);
      for (size_t i = 0; i < kPieces; ++i) {
        io->submit(&writes.prepare(i, file->fd(), true, out.data() + i * kBytes, i * kBytes, kBytes));
      }
      writes.wait();
      Batch reads(kPieces);
      for (size_t i = kPieces; i-- > 0;) {
        io->submit(&reads.prepare(i, file->fd(), false, in.data() + i * kBytes, i * kBytes, kBytes));
      }
      reads.wait();
      for (size_t i = 0; i < kPieces; ++i) {
        EXPECT_EQ(writes.error(i), 0);
        EXPECT_EQ(reads.error(i), 0);
      }
      EXPECT_EQ(in, out);
    }
  }
}

TEST_P(Engine, MovesDirectPiecesExactly) {
  const TemporaryDirectory directory("/tmp");
  File::Flags flags = kNew;
  flags.direct = true;
  const auto file = File::open(directory / "a", flags);
  if (!file) GTEST_SKIP() << file.error().message;
  const auto io = engine(8);
  constexpr uint32_t kBytes = 1 << 20;
  constexpr size_t kPieces = 16;
  const auto memory = aligned(2 * kPieces * kBytes);
  const auto content = pattern(kPieces * kBytes);
  std::memcpy(memory.get(), content.data(), content.size());
  std::byte* const in = memory.get() + kPieces * kBytes;
  for (const bool write : {true, false}) {
    Batch batch(kPieces);
    for (size_t i = 0; i < kPieces; ++i) {
      io->submit(
          &batch.prepare(i, file->fd(), write, (write ? memory.get() : in) + i * kBytes, i * kBytes, kBytes));
    }
    batch.wait();
    for (size_t i = 0; i < kPieces; ++i) EXPECT_EQ(batch.error(i), 0);
  }
  EXPECT_EQ(std::memcmp(in, content.data(), content.size()), 0);
}

TEST_P(Engine, ReportsUnalignedDirectTransfersAsEinval) {
  const TemporaryDirectory directory("/tmp");
  File::Flags flags = kNew;
  flags.direct = true;
  const auto file = File::open(directory / "a", flags);
  if (!file || file->write_at(pattern(1000), 0)) GTEST_SKIP() << "this file system takes any length";
  const auto io = engine(2);
  const auto memory = aligned(65536);
  EXPECT_EQ(run_one(*io, file->fd(), true, memory.get(), 0, 1000), EINVAL);
  EXPECT_EQ(run_one(*io, file->fd(), true, memory.get(), 100, 4096), EINVAL);
  EXPECT_EQ(*file->size(), 0u);
}

TEST_P(Engine, ReportsTheEndOfTheFileAndOtherErrorsPerOperation) {
  const TemporaryDirectory directory;
  const auto file = File::open(directory / "a", kNew);
  ASSERT_TRUE(file->write_at(pattern(10'000), 0));
  const auto read_only = File::open(directory / "a", {});
  const auto io = engine(4);
  std::vector<std::byte> in(8 * 2500);
  Batch batch(8);
  for (size_t i = 0; i < 8; ++i) {
    io->submit(&batch.prepare(i, i == 1 ? -1 : file->fd(), false, in.data() + i * 2500,
                              i * 2500 + (i == 3 ? 1 : 0), 2500));
  }
  batch.wait();
  const int expected[] = {0, EBADF, 0, ENODATA, ENODATA, ENODATA, ENODATA, ENODATA};
  for (size_t i = 0; i < 8; ++i) EXPECT_EQ(batch.error(i), expected[i]) << i;
  EXPECT_EQ(run_one(*io, read_only->fd(), true, in.data(), 0, 100), EBADF);
  EXPECT_EQ(run_one(*io, file->fd(), false, nullptr, 0, 100), EFAULT);
  // A failed batch leaves nothing behind for the next one.
  EXPECT_EQ(run_one(*io, file->fd(), false, in.data(), 0, 10'000), 0);
  in.resize(10'000);
  EXPECT_EQ(in, pattern(10'000));
}

TEST_P(Engine, CompletesAnEmptyOperation) {
  const TemporaryDirectory directory;
  const auto file = File::open(directory / "a", kNew);
  const auto io = engine(1);
  EXPECT_EQ(run_one(*io, file->fd(), false, nullptr, 0, 0), 0);
}

TEST_P(Engine, ReportsAFullFileSystemAndNeverAShortWriteAsSuccess) {
  TemporaryDirectory directory;
  if (!directory.mount_tmpfs("size=16m")) GTEST_SKIP() << "cannot mount";
  {
    const auto io = engine(8);
    constexpr uint32_t kBytes = (4 << 20) + 100;
    std::vector<std::vector<std::byte>> contents;
    std::vector<File> files;
    Batch batch(8);
    for (size_t i = 0; i < 8; ++i) {
      contents.push_back(pattern(kBytes, static_cast<uint32_t>(i)));
      files.push_back(std::move(*File::open(directory / std::to_string(i), kNew)));
      io->submit(&batch.prepare(i, files[i].fd(), true, contents[i].data(), 0, kBytes));
    }
    batch.wait();
    size_t failed = 0;
    for (size_t i = 0; i < 8; ++i) {
      if (batch.error(i) == 0) {
        EXPECT_EQ(*read_file(directory / std::to_string(i), kBytes), contents[i]);
      } else {
        EXPECT_EQ(batch.error(i), ENOSPC);
        ++failed;
      }
    }
    EXPECT_GE(failed, 4u);
  }
}

TEST_P(Engine, OutlivesTheFileSizeLimit) {
  const TemporaryDirectory directory;
  const std::string kind = GetParam();
  EXPECT_EQ(exit_code_of_child([&] {
              const rlimit limit{8 << 20, 8 << 20};
              ::setrlimit(RLIMIT_FSIZE, &limit);
              const auto io = make(kind, 4);
              auto content = pattern(12 << 20);
              const auto big = File::open(directory / "big", kNew);
              if (run_one(*io, big->fd(), true, content.data(), 0, 12 << 20) != EFBIG) return 1;
              if (run_one(*io, big->fd(), true, content.data(), 8 << 20, 1) != EFBIG) return 2;
              for (int i = 0; i < 10; ++i) {
                const auto small = File::open(directory / std::to_string(i), kNew);
                if (run_one(*io, small->fd(), true, content.data(), 0, 1 << 20) != 0) return 3;
              }
              return 0;
            }),
            0);
}

TEST_P(Engine, CrossesTheTwoAndFourGigabyteEdges) {
  const TemporaryDirectory directory("/tmp");
  const auto file = File::open(directory / "a", kNew);
  const auto io = engine(2);
  std::vector<std::byte> out = pattern(8192);
  for (const uint64_t edge : {uint64_t{1} << 31, uint64_t{1} << 32}) {
    std::vector<std::byte> in(8192);
    EXPECT_EQ(run_one(*io, file->fd(), true, out.data(), edge - 4096, 8192), 0);
    EXPECT_EQ(run_one(*io, file->fd(), false, in.data(), edge - 4096, 8192), 0);
    EXPECT_EQ(in, out);
  }
  EXPECT_EQ(*file->size(), (uint64_t{1} << 32) + 4096);
}

TEST_P(Engine, CallsDoneForEverythingBeforeItsDestructorReturns) {
  const TemporaryDirectory directory;
  const auto file = File::open(directory / "a", kNew);
  ASSERT_TRUE(file->write_at(pattern(1 << 20), 0));
  for (int round = 0; round < 20; ++round) {
    Batch batch(64);
    std::vector<std::byte> in(1 << 20);
    {
      const auto io = engine(3);
      for (size_t i = 0; i < 64; ++i) {
        io->submit(&batch.prepare(i, file->fd(), false, in.data() + i * 16384, i * 16384, 16384));
      }
    }
    ASSERT_EQ(batch.left(), 0u);
    ASSERT_EQ(in, pattern(1 << 20));
  }
}

TEST_P(Engine, TakesOperationsFromItsOwnCallbackAlsoWhileClosing) {
  const TemporaryDirectory directory;
  const auto file = File::open(directory / "a", kNew);
  ASSERT_TRUE(file->write_at(pattern(4096), 0));
  struct Chain {
    std::unique_ptr<IoEngine> io;
    IoEngine* engine;
    std::atomic<int> calls = 0;
  } chain;
  chain.io = engine(1);
  chain.engine = chain.io.get();
  std::vector<std::byte> in(4096);
  IoOperation operation{.fd = file->fd(),
                        .buffer = in.data(),
                        .bytes = 4096,
                        .done =
                            [](IoOperation* self, int error) {
                              auto& owner = *static_cast<Chain*>(self->owner);
                              EXPECT_EQ(error, 0);
                              // Every other link is empty: those never enter the kernel.
                              self->bytes = self->bytes == 0 ? 4096 : 0;
                              if (++owner.calls < 100) owner.engine->submit(self);
                            },
                        .owner = &chain};
  chain.io->submit(&operation);
  chain.io.reset();
  EXPECT_EQ(chain.calls, 100);
}

TEST_P(Engine, TakesOperationsFromManyThreadsAtOnce) {
  const TemporaryDirectory directory;
  const auto file = File::open(directory / "a", kNew);
  constexpr size_t kThreads = 4;
  constexpr size_t kEach = 300;
  const auto content = pattern(kThreads * kEach * 512);
  ASSERT_TRUE(file->write_at(content, 0));
  const auto io = engine(5);
  std::vector<std::byte> in(content.size());
  {
    std::vector<std::jthread> threads;
    for (size_t t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        // One at a time, so that the engine falls asleep and must be woken again and again.
        for (size_t i = t * kEach; i < (t + 1) * kEach; ++i) {
          EXPECT_EQ(run_one(*io, file->fd(), false, in.data() + i * 512, i * 512, 512), 0);
        }
      });
    }
  }
  EXPECT_EQ(in, content);
}

TEST_P(Engine, KeepsSignalsOfTheProcessAwayFromItsThreads) {
  const TemporaryDirectory directory;
  const auto file = File::open(directory / "a", kNew);
  struct Seen {
    sigset_t blocked;
    char thread[16];
    std::mutex mutex;
    std::condition_variable ended;
    bool done = false;
  } seen;
  const auto io = engine(1);
  IoOperation operation{.fd = file->fd(),
                        .done =
                            [](IoOperation* self, int) {
                              auto& out = *static_cast<Seen*>(self->owner);
                              pthread_sigmask(SIG_SETMASK, nullptr, &out.blocked);
                              pthread_getname_np(pthread_self(), out.thread, sizeof(out.thread));
                              const std::lock_guard lock(out.mutex);
                              out.done = true;
                              out.ended.notify_one();
                            },
                        .owner = &seen};
  io->submit(&operation);
  std::unique_lock lock(seen.mutex);
  seen.ended.wait(lock, [&] { return seen.done; });
  EXPECT_STREQ(seen.thread, "td-io");
  for (const int signal : {SIGINT, SIGTERM, SIGCHLD, SIGXFSZ, SIGPROF, SIGUSR1, SIGALRM}) {
    EXPECT_EQ(sigismember(&seen.blocked, signal), 1) << signal;
  }
  EXPECT_EQ(sigismember(&seen.blocked, SIGBUS), 0);
  sigset_t ours;
  pthread_sigmask(SIG_SETMASK, nullptr, &ours);
  EXPECT_EQ(sigismember(&ours, SIGTERM), 0);
}

// Newer kernels count the rings as locked memory: an engine then works or says so, and enough memory is
// enough.
TEST_P(Engine, WorksOrNamesTheLimitWithLittleMemoryToLock) {
  const TemporaryDirectory directory;
  const std::string kind = GetParam();
  ASSERT_EQ(::chmod(directory.path().c_str(), 0777), 0);
  for (const rlim_t bytes : {rlim_t{0}, rlim_t{65536}, rlim_t{8 << 20}}) {
    EXPECT_EQ(exit_code_of_child([&] {
                const rlimit limit{bytes, bytes};
                if (::setrlimit(RLIMIT_MEMLOCK, &limit) != 0) return 1;
                if (::getuid() == 0 && ::setuid(65534) != 0) return 2;  // the limit does not bind root
                const auto file = File::open(directory / std::to_string(bytes), kNew);
                auto content = pattern(65536);
                std::vector<std::unique_ptr<IoEngine>> engines;
                for (int i = 0; i < 64; ++i) {
                  auto made = kind == "threads" ? make_thread_engine(1) : make_uring_engine(1);
                  if (!made) {
                    if (made.error().kind != ErrorKind::unsupported || made.error().os_errno != ENOMEM)
                      return 3;
                    if (made.error().message.find("memlock limit of " + std::to_string(bytes)) ==
                        std::string::npos) {
                      return 4;
                    }
                    if (bytes == 8 << 20) return 5;
                    continue;
                  }
                  engines.push_back(std::move(*made));
                  if (run_one(*engines.back(), file->fd(), true, content.data(), 0, 65536) != 0) return 6;
                  std::vector<std::byte> in(65536);
                  if (run_one(*engines.back(), file->fd(), false, in.data(), 0, 65536) != 0) return 7;
                  if (in != content) return 8;
                }
                return 0;
              }),
              0);
  }
}

TEST(UringEngine, SaysWhatBlocksIt) {
  for (const int refusal : {EPERM, ENOSYS}) {
    for (const long call : {SYS_io_uring_setup, SYS_io_uring_enter}) {
      EXPECT_EQ(exit_code_of_child([&] {
                  if (!forbid_calls({call}, refusal)) return 1;
                  const auto engine = make_uring_engine(8);
                  if (engine) return 2;
                  if (engine.error().os_errno != refusal) return 3;
                  const ErrorKind kind = refusal == EPERM ? ErrorKind::permission : ErrorKind::unsupported;
                  if (engine.error().kind != kind) return 4;
                  const std::string& message = engine.error().message;
                  if (message.find(std::strerror(refusal)) == std::string::npos) return 5;
                  const bool setting = ::access("/proc/sys/kernel/io_uring_disabled", R_OK) == 0;
                  return setting == (message.find("kernel.io_uring_disabled=") != std::string::npos) ? 0 : 6;
                }),
                0);
    }
  }
}

TEST(UringEngine, DoesNotNeedToRegisterAnything) {
  if (make("uring", 1) == nullptr) GTEST_SKIP() << make_uring_engine(1).error().message;
  const TemporaryDirectory directory;
  EXPECT_EQ(exit_code_of_child([&] {
              if (!forbid_calls({SYS_io_uring_register}, EPERM)) return 1;
              const auto engine = make_uring_engine(8);
              if (!engine) return 2;
              const auto file = File::open(directory / "a", kNew);
              auto content = pattern(5000);
              return run_one(**engine, file->fd(), true, content.data(), 0, 5000);
            }),
            0);
}

}  // namespace
}  // namespace tokendepot
