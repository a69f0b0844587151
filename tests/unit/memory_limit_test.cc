#include "io/memory_limit.h"

#include <gmock/gmock.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <string>

#include "temporary_directory.h"

namespace tokendepot {
namespace {

constexpr uint64_t kMiB = 1 << 20;

/// A "/" of files with these contents.
class MemoryLimitOf {
 public:
  explicit MemoryLimitOf(const std::map<std::string, std::string>& files) {
    for (const auto& [path, content] : files) {
      const std::filesystem::path file = directory_ / path;
      std::filesystem::create_directories(file.parent_path());
      std::ofstream(file) << content << '\n';
    }
  }
  std::optional<MemoryLimit> read() const { return memory_limit(directory_.path()); }

 private:
  TemporaryDirectory directory_;
};

std::string mib(uint64_t count) {
  return std::to_string(count * kMiB);
}

TEST(MemoryLimit, IsTheSmallestOnTheWayUp) {
  const auto limit = MemoryLimitOf({{"proc/self/cgroup", "0::/a/b"},
                                    {"sys/fs/cgroup/a/b/memory.max", "max"},
                                    {"sys/fs/cgroup/a/memory.max", mib(64)},
                                    {"sys/fs/cgroup/memory.max", mib(96)}})
                         .read();
  ASSERT_TRUE(limit);
  EXPECT_EQ(limit->bytes, 64 * kMiB);
  EXPECT_EQ(limit->file, "/sys/fs/cgroup/a/memory.max");
  EXPECT_EQ(limit->unused_bytes, 64 * kMiB);
}

TEST(MemoryLimit, OfAGroupThatTheContainerSeesAsTheTopIsFound) {
  const auto limit =
      MemoryLimitOf({{"proc/self/cgroup", "0::/kubepods/pod1/c2"}, {"sys/fs/cgroup/memory.max", mib(32)}})
          .read();
  ASSERT_TRUE(limit);
  EXPECT_EQ(limit->bytes, 32 * kMiB);
}

TEST(MemoryLimit, IsReadFromVersion1WhereThatHasTheController) {
  const auto limit = MemoryLimitOf({{"proc/self/cgroup", "5:cpu,cpuacct:/x\n4:hugetlb,memory:/x:y\n0::/"},
                                    {"sys/fs/cgroup/cpu/x/memory.limit_in_bytes", mib(1)},
                                    {"sys/fs/cgroup/memory/x:y/memory.limit_in_bytes", mib(48)},
                                    {"sys/fs/cgroup/memory/x:y/memory.usage_in_bytes", mib(40)},
                                    {"sys/fs/cgroup/memory/x:y/memory.stat",
                                     "active_file " + mib(1) + "\ntotal_active_file " + mib(10) +
                                         "\ntotal_inactive_file " + mib(20) + "\ntotal_shmem " + mib(5)},
                                    {"sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712"}})
                         .read();
  ASSERT_TRUE(limit);
  EXPECT_EQ(limit->bytes, 48 * kMiB);
  EXPECT_EQ(limit->unused_bytes, (48 - (40 - 30)) * kMiB);
}

TEST(MemoryLimit, LeavesWhatTheFullestGroupLeaves) {
  const auto limit = MemoryLimitOf({{"proc/self/cgroup", "0::/pod/engine"},
                                    {"sys/fs/cgroup/pod/engine/memory.max", mib(64)},
                                    {"sys/fs/cgroup/pod/engine/memory.current", mib(16)},
                                    {"sys/fs/cgroup/pod/memory.max", mib(96)},
                                    {"sys/fs/cgroup/pod/memory.current", mib(90)},
                                    {"sys/fs/cgroup/pod/memory.stat", "anon " + mib(70) + "\ninactive_file " +
                                                                          mib(7) + "\nslab_reclaimable " +
                                                                          mib(3) + "\nshmem " + mib(5)}})
                         .read();
  ASSERT_TRUE(limit);
  EXPECT_EQ(limit->bytes, 64 * kMiB) << "the smaller limit";
  EXPECT_EQ(limit->unused_bytes, (96 - 80) * kMiB) << "of the pod, in which another container is";
}

TEST(MemoryLimit, OfAGroupBeyondItsLimitLeavesNothing) {
  const auto limit = MemoryLimitOf({{"proc/self/cgroup", "0::/"},
                                    {"sys/fs/cgroup/memory.max", mib(8)},
                                    {"sys/fs/cgroup/memory.current", mib(9)}})
                         .read();
  ASSERT_TRUE(limit);
  EXPECT_EQ(limit->unused_bytes, 0u);
}

TEST(MemoryLimit, IsNoneWhereNoGroupSaysLessThanTheMachineHas) {
  for (const std::map<std::string, std::string>& files :
       {std::map<std::string, std::string>{},
        {{"proc/self/cgroup", ""}},
        {{"proc/self/cgroup", "no colon\n0:one\n"}},
        {{"proc/self/cgroup", "0::/a"}, {"sys/fs/cgroup/a/memory.max", "max"}},
        {{"proc/self/cgroup", "0::/a"}, {"sys/fs/cgroup/a/memory.max", "12 apples"}},
        {{"proc/self/cgroup", "4:memory:/x"},
         {"sys/fs/cgroup/memory/x/memory.limit_in_bytes", "9223372036854771712"}}}) {
    EXPECT_FALSE(MemoryLimitOf(files).read());
  }
}

TEST(MemoryLimit, OfAGroupOutsideTheNamespaceIsNotReadFromOthers) {
  const auto limit = MemoryLimitOf({{"proc/self/cgroup", "0::/../other"},
                                    {"sys/fs/cgroup/other/memory.max", mib(1)},
                                    {"sys/fs/other/memory.max", mib(2)},
                                    {"sys/fs/cgroup/memory.max", mib(32)}})
                         .read();
  ASSERT_TRUE(limit);
  EXPECT_EQ(limit->bytes, 32 * kMiB);
}

}  // namespace
}  // namespace tokendepot
