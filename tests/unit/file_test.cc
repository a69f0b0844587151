#include "io/file.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <thread>
#include <vector>

#include "forked_child.h"
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

void limit_file_size(uint64_t bytes) {
  const rlimit limit{bytes, bytes};
  ::setrlimit(RLIMIT_FSIZE, &limit);
}

TEST(FileOpen, CreatesPrivateCloseOnExecFiles) {
  const TemporaryDirectory directory;
  const auto file = File::open(directory / "a", kNew);
  ASSERT_TRUE(file) << file.error().message;
  struct stat info;
  ASSERT_EQ(::fstat(file->fd(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
  EXPECT_EQ(::fcntl(file->fd(), F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
  EXPECT_EQ(::fcntl(file->fd(), F_GETFL) & O_NONBLOCK, 0);
}

TEST(FileOpen, RefusesWhatIsNotARegularFileWithoutHanging) {
  const TemporaryDirectory directory;
  ASSERT_TRUE(File::open(directory / "target", kNew));
  ASSERT_EQ(::symlink("target", (directory / "link").c_str()), 0);
  ASSERT_EQ(::symlink("nowhere", (directory / "dangling").c_str()), 0);
  ASSERT_EQ(::mkfifo((directory / "pipe").c_str(), 0600), 0);
  ASSERT_EQ(::mkdir((directory / "directory").c_str(), 0700), 0);
  const int listener = ::socket(AF_UNIX, SOCK_STREAM, 0);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, (directory / "socket").c_str(), sizeof(address.sun_path) - 1);
  ASSERT_EQ(::bind(listener, reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
  for (const char* name : {"link", "dangling", "pipe", "directory", "socket"}) {
    for (const bool write : {false, true}) {
      const auto file = File::open(directory / name, {.write = write, .create = write});
      ASSERT_FALSE(file) << name;
      EXPECT_EQ(file.error().kind, ErrorKind::invalid_argument) << file.error().message;
      EXPECT_NE(file.error().message.find(directory / name), std::string::npos) << file.error().message;
    }
  }
  ::close(listener);
  EXPECT_FALSE(std::filesystem::exists(directory / "nowhere"));
}

TEST(FileOpen, NamesPathAndCauseOfAnError) {
  const TemporaryDirectory directory;
  const auto missing = File::open(directory / "missing", {});
  ASSERT_FALSE(missing);
  EXPECT_EQ(missing.error().kind, ErrorKind::not_found);
  EXPECT_EQ(missing.error().os_errno, ENOENT);
  EXPECT_NE(missing.error().message.find(directory / "missing"), std::string::npos);
  ASSERT_TRUE(File::open(directory / "there", kNew));
  const auto again = File::open(directory / "there", kNew);
  ASSERT_FALSE(again);
  EXPECT_EQ(again.error().os_errno, EEXIST);
}

TEST(FileTransfer, IsExactForEveryBufferAddressAndLength) {
  for (const char* parent : {"/tmp", "/dev/shm"}) {
    const TemporaryDirectory directory(parent);
    const auto file = File::open(directory / "a", kNew);
    ASSERT_TRUE(file) << file.error().message;
    const size_t lengths[] = {0, 1, 1000, 4095, 4096, 4097, 65536, 65537, 116992, 3098112};
    for (const size_t shift : {0, 1, 64, 512, 4095}) {
      for (const size_t length : lengths) {
        std::vector<std::byte> out = pattern(shift + length, static_cast<uint32_t>(shift + length));
        std::vector<std::byte> in(shift + length + 1);
        ASSERT_TRUE(file->write_at(std::span(out).subspan(shift), 4097 + shift));
        ASSERT_TRUE(file->read_at(std::span(in).subspan(shift, length), 4097 + shift));
        ASSERT_TRUE(std::ranges::equal(std::span(out).subspan(shift), std::span(in).subspan(shift, length)))
            << length;
        ASSERT_EQ(in.back(), std::byte{0});
      }
    }
    EXPECT_EQ(*file->size(), 4097 + 4095 + 3098112u);
  }
}

TEST(FileTransfer, ReadsPastTheEndAreNotFound) {
  const TemporaryDirectory directory;
  const auto file = File::open(directory / "a", kNew);
  ASSERT_TRUE(file->write_at(pattern(1000), 0));
  std::vector<std::byte> in(1001);
  const Status status = file->read_at(in, 0);
  ASSERT_FALSE(status);
  EXPECT_EQ(status.error().kind, ErrorKind::not_found);
}

TEST(FileTransfer, UnalignedDirectWritesAreErrorsNotShortFiles) {
  const TemporaryDirectory directory("/tmp");
  File::Flags flags = kNew;
  flags.direct = true;
  const auto file = File::open(directory / "a", flags);
  if (!file) GTEST_SKIP() << file.error().message;
  const Status status = file->write_at(pattern(1000), 0);
  if (status) GTEST_SKIP() << "this file system takes any length";
  EXPECT_EQ(status.error().os_errno, EINVAL);
  EXPECT_EQ(*file->size(), 0u);
}

TEST(FileTransfer, CrossesTheTwoAndFourGigabyteEdges) {
  // The edges of 2^31 and 2^32 and the most that one call of the kernel moves, in sparse files.
  const TemporaryDirectory directory("/tmp");
  const auto file = File::open(directory / "a", kNew);
  const std::vector<std::byte> out = pattern(8192);
  for (const uint64_t edge : {uint64_t{0x7ffff000}, uint64_t{1} << 31, uint64_t{1} << 32}) {
    ASSERT_TRUE(file->write_at(out, edge - 4096));
  }
  EXPECT_EQ(*file->size(), (uint64_t{1} << 32) + 4096);
  for (const uint64_t edge : {uint64_t{1} << 31, uint64_t{1} << 32}) {
    std::vector<std::byte> in(8192);
    ASSERT_TRUE(file->read_at(in, edge - 4096));
    EXPECT_EQ(in, out);
  }
}

TEST(FileTransfer, MovesMoreThanOneCallOfTheKernelDoes) {
  // The span of 2 GiB + 2 MiB is one window of 2 MiB of memory over and over, so that the test is cheap in
  // memory; the last bytes that arrive in the window are the last ones of the file.
  constexpr uint64_t kWindow = 2 << 20;
  constexpr uint64_t kBytes = (uint64_t{1} << 31) + kWindow;
  const TemporaryDirectory directory("/dev/shm");
  const auto window = File::open(directory / "window", kNew);
  ASSERT_TRUE(window->truncate(kWindow));
  void* const address =
      ::mmap(nullptr, kBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(address, MAP_FAILED);
  const std::span<std::byte> all(static_cast<std::byte*>(address), kBytes);
  for (uint64_t at = 0; at < kBytes; at += kWindow) {
    ASSERT_NE(::mmap(&all[at], kWindow, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, window->fd(), 0),
              MAP_FAILED);
  }
  const auto file = File::open(directory / "a", kNew);
  ASSERT_TRUE(file->truncate(kBytes));
  const auto content = pattern(kWindow);
  ASSERT_TRUE(file->write_at(content, kBytes - kWindow));
  const Status status = file->read_at(all, 0);
  EXPECT_TRUE(status) << status.error().message;
  EXPECT_TRUE(std::ranges::equal(all.first(kWindow), content));
  ::munmap(address, kBytes);
}

TEST(FileSizeLimit, IsAnErrorAndNotTheEndOfTheProcess) {
  const TemporaryDirectory directory;
  EXPECT_EQ(exit_code_of_child([&] {
              constexpr uint64_t kLimit = 8 << 20;
              limit_file_size(kLimit);
              const auto file = File::open(directory / "a", kNew);
              const auto content = pattern(12 << 20);
              const Status big = file->write_at(content, 0);
              if (big || big.error().os_errno != EFBIG) return 1;
              const Status allocated = file->preallocate(12 << 20);
              if (allocated || allocated.error().os_errno != EFBIG) return 2;
              const Status grown = file->truncate(12 << 20);
              if (grown || grown.error().os_errno != EFBIG) return 3;
              if (!file->write_at(std::span(content).first(1 << 20), 0)) return 4;
              sigset_t pending;
              sigpending(&pending);
              return sigismember(&pending, SIGXFSZ) == 0 ? 0 : 5;
            }),
            0);
}

TEST(FileSizeLimit, LeavesAnAtomicFileAsItWas) {
  const TemporaryDirectory directory;
  ASSERT_TRUE(write_file_atomically(directory / "a", pattern(100)));
  EXPECT_EQ(exit_code_of_child([&] {
              limit_file_size(4096);
              return write_file_atomically(directory / "a", pattern(5000)) ? 1 : 0;
            }),
            0);
  EXPECT_EQ(*read_file(directory / "a", 1000), pattern(100));
  EXPECT_EQ(directory.entries(), 1u);
}

TEST(Preallocate, TakesTheSpaceAndKeepsContentAndSize) {
  const TemporaryDirectory directory("/tmp");
  const auto file = File::open(directory / "a", kNew);
  ASSERT_TRUE(file->write_at(pattern(5000), 0));
  ASSERT_TRUE(file->preallocate(1 << 20));
  EXPECT_EQ(*file->size(), 1u << 20);
  struct stat info;
  ASSERT_EQ(::fstat(file->fd(), &info), 0);
  EXPECT_GE(info.st_blocks * 512, 1 << 20);
  ASSERT_TRUE(file->preallocate(4096));
  EXPECT_EQ(*file->size(), 1u << 20);
  std::vector<std::byte> in(5000);
  ASSERT_TRUE(file->read_at(in, 0));
  EXPECT_EQ(in, pattern(5000));
}

TEST(Preallocate, WritesZerosWhereTheFileSystemCannotAllocate) {
  for (const int refusal : {EOPNOTSUPP, EINVAL}) {
    for (const bool direct : {false, true}) {
      const TemporaryDirectory directory("/tmp");
      EXPECT_EQ(exit_code_of_child([&] {
                  if (!forbid_calls({SYS_fallocate}, refusal)) return 1;
                  File::Flags flags = kNew;
                  const auto plain = File::open(directory / "a", flags);
                  if (!plain->write_at(pattern(5001), 0)) return 2;
                  const auto file = File::open(directory / "a", {.write = true, .direct = direct});
                  if (!file) return 0;  // no direct I/O here
                  const int before = ::fcntl(file->fd(), F_GETFL);
                  if (!file->preallocate(3'000'001)) return 3;
                  if (::fcntl(file->fd(), F_GETFL) != before) return 4;
                  struct stat info;
                  ::fstat(file->fd(), &info);
                  if (info.st_size != 3'000'001 || info.st_blocks * 512 < 3'000'001) return 5;
                  const auto content = read_file(directory / "a", 3'000'001);
                  if (!content || !std::ranges::equal(std::span(*content).first(5001), pattern(5001)))
                    return 6;
                  return std::ranges::all_of(std::span(*content).subspan(5001),
                                             [](std::byte b) { return b == std::byte{0}; })
                             ? 0
                             : 7;
                }),
                0);
    }
  }
}

TEST(Preallocate, OnAFullFileSystemIsNoSpaceAndGivesBackWhatItTook) {
  TemporaryDirectory directory;
  if (!directory.mount_tmpfs("size=4m")) GTEST_SKIP() << "cannot mount";
  {
    const auto file = File::open(directory / "a", kNew);
    ASSERT_TRUE(file->write_at(pattern(5000), 0));
    for (const bool allocate : {true, false}) {
      EXPECT_EQ(exit_code_of_child([&] {
                  if (!allocate && !forbid_calls({SYS_fallocate}, EOPNOTSUPP)) return 1;
                  const Status status = file->preallocate(64 << 20);
                  return !status && status.error().kind == ErrorKind::no_space ? 0 : 2;
                }),
                0);
      EXPECT_EQ(*file->size(), 5000u);
    }
    const Status status = file->write_at(pattern(8 << 20), 0);
    ASSERT_FALSE(status);
    EXPECT_EQ(status.error().kind, ErrorKind::no_space);
  }
}

TEST(FileLock, ExcludesOtherOpensAndOtherProcessesUntilClosed) {
  const TemporaryDirectory directory;
  {
    const auto first = File::open(directory / "lock", kNew);
    const auto second = File::open(directory / "lock", {.write = true});
    EXPECT_TRUE(*first->try_lock_exclusive());
    EXPECT_TRUE(*first->try_lock_exclusive());
    EXPECT_FALSE(*second->try_lock_exclusive());
    EXPECT_EQ(exit_code_of_child([&] {
                const auto other = File::open(directory / "lock", {.write = true});
                return *other->try_lock_exclusive() ? 1 : 0;
              }),
              0);
  }
  const auto third = File::open(directory / "lock", {.write = true});
  EXPECT_TRUE(*third->try_lock_exclusive());
}

TEST(FileLock, IsFreedByKill) {
  const TemporaryDirectory directory;
  EXPECT_EQ(exit_code_of_child([&] {
              const auto file = File::open(directory / "lock", kNew);
              if (!*file->try_lock_exclusive()) return 1;
              return ::raise(SIGKILL);
            }),
            1000 + SIGKILL);
  const auto file = File::open(directory / "lock", {.write = true});
  EXPECT_TRUE(*file->try_lock_exclusive());
}

TEST(Directories, TheParentOfAPathIsToldByItsText) {
  const std::pair<const char*, const char*> known[] = {{"/a/b", "/a"}, {"/a/b/", "/a"}, {"/a", "/"},
                                                       {"/a/", "/"},   {"/", "/"},      {"a", "."},
                                                       {"a/b", "a"},   {"", "."}};
  for (const auto& [path, parent] : known) EXPECT_EQ(parent_of(path), parent) << path;
}

TEST(Directory, ListsFilesAndDoesNotFollowLinks) {
  const TemporaryDirectory directory;
  ASSERT_TRUE(write_file_atomically(directory / "file", pattern(123)));
  ASSERT_TRUE(make_directory(directory / "sub"));
  ASSERT_EQ(::symlink("file", (directory / "link").c_str()), 0);
  auto entries = list_directory(directory.path());
  ASSERT_TRUE(entries) << entries.error().message;
  std::ranges::sort(*entries, {}, &DirectoryEntry::name);
  ASSERT_EQ(entries->size(), 3u);
  EXPECT_EQ((*entries)[0].name, "file");
  EXPECT_EQ((*entries)[0].bytes, 123u);
  EXPECT_TRUE((*entries)[0].regular);
  EXPECT_FALSE((*entries)[1].regular);
  EXPECT_FALSE((*entries)[2].regular);
  EXPECT_EQ(list_directory(directory / "none").error().kind, ErrorKind::not_found);
}

TEST(Directory, IsMadePrivateAndRefusesLinksAndFiles) {
  const TemporaryDirectory directory;
  ASSERT_TRUE(make_directory(directory / "sub"));
  EXPECT_TRUE(make_directory(directory / "sub"));
  struct stat info;
  ASSERT_EQ(::stat((directory / "sub").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0700u);
  ASSERT_EQ(::symlink("sub", (directory / "link").c_str()), 0);
  ASSERT_TRUE(File::open(directory / "file", kNew));
  for (const char* name : {"link", "file"}) {
    const Status status = make_directory(directory / name);
    ASSERT_FALSE(status) << name;
    EXPECT_EQ(status.error().kind, ErrorKind::invalid_argument);
  }
  EXPECT_EQ(make_directory(directory / "no/parent").error().kind, ErrorKind::not_found);
}

TEST(AtomicFile, ReplacesWholeContentAndDoesNotFollowALink) {
  const TemporaryDirectory directory;
  ASSERT_TRUE(write_file_atomically(directory / "victim", pattern(10, 1)));
  ASSERT_EQ(::symlink("victim", (directory / "a").c_str()), 0);
  ASSERT_TRUE(write_file_atomically(directory / "a", pattern(5000, 2)));
  ASSERT_TRUE(write_file_atomically(directory / "a", pattern(3, 3)));
  EXPECT_EQ(*read_file(directory / "a", 100), pattern(3, 3));
  EXPECT_EQ(*read_file(directory / "victim", 100), pattern(10, 1));
  EXPECT_EQ(directory.entries(), 2u);
}

TEST(AtomicFile, OfSeveralMakersOfANewFileOneWinsAndItsContentStays) {
  const TemporaryDirectory directory;
  std::atomic<int> winners = 0;
  std::vector<std::thread> makers;
  for (int maker = 0; maker < 8; ++maker) {
    makers.emplace_back([&, maker] {
      const auto made = write_new_file_atomically(directory / "a", pattern(64, maker));
      ASSERT_TRUE(made) << made.error().message;
      const auto seen = read_file(directory / "a", 64);
      ASSERT_TRUE(seen);
      if (*made) {
        ++winners;
        EXPECT_EQ(*seen, pattern(64, maker));
      }
    });
  }
  for (std::thread& maker : makers) maker.join();
  EXPECT_EQ(winners, 1);
  EXPECT_EQ(directory.entries(), 1u) << "a temporary file was left";
}

TEST(AtomicFile, LeavesNothingBehindOnFailure) {
  const TemporaryDirectory directory;
  ASSERT_TRUE(make_directory(directory / "a"));
  EXPECT_FALSE(write_file_atomically(directory / "a", pattern(10)));
  EXPECT_EQ(directory.entries(), 1u);
}

TEST(ReadFile, RefusesMoreThanTheLimit) {
  const TemporaryDirectory directory;
  ASSERT_TRUE(write_file_atomically(directory / "a", pattern(101)));
  EXPECT_TRUE(read_file(directory / "a", 101));
  const auto content = read_file(directory / "a", 100);
  ASSERT_FALSE(content);
  EXPECT_EQ(content.error().kind, ErrorKind::io);
  EXPECT_NE(content.error().message.find("101"), std::string::npos);
}

TEST(FileSystem, TellsMemoryFromDisk) {
  const auto memory = file_system_of("/dev/shm");
  ASSERT_TRUE(memory);
  EXPECT_EQ(memory->type, "tmpfs");
  EXPECT_TRUE(memory->memory);
  EXPECT_FALSE(memory->read_only);
  EXPECT_GE(memory->total_bytes, memory->available_bytes);
  const auto kernel = file_system_of("/proc");
  ASSERT_TRUE(kernel);
  EXPECT_FALSE(kernel->memory);
  EXPECT_EQ(kernel->type, "proc") << "whose number is not in the list";
  EXPECT_FALSE(kernel->network);
  EXPECT_EQ(file_system_of("/nowhere/at/all").error().kind, ErrorKind::not_found);
}

TEST(FileSystem, TellsAReadOnlyMount) {
  TemporaryDirectory directory;
  if (!directory.mount_tmpfs("size=1m", MS_RDONLY)) GTEST_SKIP() << "cannot mount";
  EXPECT_TRUE(file_system_of(directory.path())->read_only);
  EXPECT_EQ(File::open(directory / "a", kNew).error().kind, ErrorKind::permission);
  EXPECT_EQ(make_directory(directory / "b").error().kind, ErrorKind::permission);
}

}  // namespace
}  // namespace tokendepot
