#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>

#include "io/huge_memory.h"
#include "tokendepot/layout.h"

namespace tokendepot {
namespace {

constexpr uint64_t kHugePageBytes = 2ull << 20;

/// "VmFlags" of the mapping that holds `address`; empty when there is none.
std::string flags_of_mapping(const void* address) {
  std::ifstream maps("/proc/self/smaps");
  const auto wanted = reinterpret_cast<uintptr_t>(address);
  bool inside = false;
  for (std::string line; std::getline(maps, line);) {
    char* end = nullptr;
    const uintptr_t begin = std::strtoull(line.c_str(), &end, 16);
    if (*end == '-') inside = begin <= wanted && wanted < std::strtoull(end + 1, nullptr, 16);
    if (inside && line.starts_with("VmFlags:")) return line + " ";
  }
  return {};
}

TEST(HugeMemory, IsAlignedToHugePagesAndWholeToItsLastByte) {
  for (const uint64_t bytes :
       {kPageBytes, kHugePageBytes - kPageBytes, kHugePageBytes, 3 * kHugePageBytes + kPageBytes}) {
    std::byte* const memory = map_huge_memory(bytes);
    ASSERT_NE(memory, nullptr);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(memory) % kHugePageBytes, 0u);
    std::memset(memory, 1, bytes);
    EXPECT_EQ(::munmap(memory, bytes), 0);
  }
}

TEST(HugeMemory, AsksForHugePagesWhereTheSystemHasThem) {
  if (::access("/sys/kernel/mm/transparent_hugepage/enabled", R_OK) != 0)
    GTEST_SKIP() << "no huge pages here";
  std::byte* const memory = map_huge_memory(2 * kHugePageBytes);
  ASSERT_NE(memory, nullptr);
  EXPECT_NE(flags_of_mapping(memory).find(" hg "), std::string::npos) << flags_of_mapping(memory);
  ::munmap(memory, 2 * kHugePageBytes);
}

TEST(HugeMemory, AnswersNullWithErrnoWhenThereIsNoSuchSpace) {
  errno = 0;
  EXPECT_EQ(map_huge_memory(UINT64_MAX - kPageBytes + 1), nullptr);
  EXPECT_EQ(errno, ENOMEM);
  errno = 0;
  EXPECT_EQ(map_huge_memory(1ull << 60), nullptr);
  EXPECT_EQ(errno, ENOMEM);
}

}  // namespace
}  // namespace tokendepot
