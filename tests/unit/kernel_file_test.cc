#include "io/kernel_file.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

namespace tokendepot {
namespace {

TEST(KernelFile, OfProcIsReadToItsEndThoughItHasNoSize) {
  const std::string text = kernel_text("/proc/self/status");
  EXPECT_TRUE(text.starts_with("Name:"));
  EXPECT_TRUE(text.contains("\nPid:\t" + std::to_string(getpid()) + "\n"));
  EXPECT_TRUE(text.ends_with('\n'));
}

TEST(KernelFile, ThatIsLargerThanAnyIsCutAndOneThatIsNotThereIsEmpty) {
  std::string folder = ::testing::TempDir() + "tokendepot-kernel-XXXXXX";
  ASSERT_NE(::mkdtemp(folder.data()), nullptr);
  std::ofstream(folder + "/large") << std::string(20 << 20, 'x');
  EXPECT_GE(kernel_text(folder + "/large").size(), 16u << 20);
  EXPECT_LT(kernel_text(folder + "/large").size(), 17u << 20);
  EXPECT_EQ(kernel_text(folder + "/missing"), "");
  EXPECT_EQ(kernel_text(folder), "") << "a directory";
  std::filesystem::remove_all(folder);
}

TEST(KernelFile, NumbersAreWholeTexts) {
  EXPECT_EQ(number_in("12\n"), 12);
  EXPECT_EQ(number_in("-1\n"), -1);
  EXPECT_EQ(number_in("9223372036854771712"), 9223372036854771712);
  for (const char* const none : {"", "\n", "max\n", "1 2", "12 ", "1\n\n", "9223372036854775808"})
    EXPECT_FALSE(number_in(none)) << none;
}

TEST(KernelFile, LinesAreCutAtTheFirstSeparator) {
  using Pair = std::pair<std::string_view, std::string_view>;
  EXPECT_EQ(cut_at("a b c", ' '), Pair("a", "b c"));
  EXPECT_EQ(cut_at("abc", ' '), Pair("abc", ""));
  EXPECT_EQ(cut_at("", ' '), Pair("", ""));
}

}  // namespace
}  // namespace tokendepot
