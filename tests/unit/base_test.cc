#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/errors.h"
#include "base/log.h"
#include "base/sha256.h"
#include "tokendepot/key.h"

namespace tokendepot {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::internal::CaptureStderr;
using ::testing::internal::GetCapturedStderr;

class LogSinkTest : public ::testing::Test {
 protected:
  void TearDown() override { set_log_sink(nullptr); }
};

TEST_F(LogSinkTest, without_a_sink_a_message_is_one_line_on_stderr) {
  CaptureStderr();
  log(LogLevel::warning, "root {} is full", "/a");
  EXPECT_EQ(GetCapturedStderr(), "tokendepot: WARNING root /a is full\n");
}

TEST_F(LogSinkTest, control_characters_of_a_file_name_do_not_start_a_second_line) {
  CaptureStderr();
  log(LogLevel::error, "foreign file {}", "x\ntokendepot: INFO all is well\r\x1b[2J");
  EXPECT_EQ(GetCapturedStderr(), "tokendepot: ERROR foreign file x tokendepot: INFO all is well  [2J\n");
}

TEST_F(LogSinkTest, a_sink_gets_level_and_text_as_they_are) {
  std::vector<std::string> lines;
  set_log_sink([&](LogLevel level, std::string_view text) {
    lines.push_back(fmt::format("{}:{}", static_cast<int>(level), text));
  });
  log(LogLevel::debug, "a\nb");
  log(LogLevel::error, "{}", 7);
  EXPECT_THAT(lines, ElementsAre("0:a\nb", "3:7"));
}

TEST_F(LogSinkTest, a_sink_that_throws_costs_a_line_on_stderr_and_no_more) {
  set_log_sink([](LogLevel, std::string_view) { throw std::runtime_error("closed"); });
  CaptureStderr();
  log(LogLevel::info, "still here");
  EXPECT_THAT(GetCapturedStderr(), HasSubstr("tokendepot: INFO still here\n"));
}

TEST_F(LogSinkTest, a_sink_may_replace_itself) {
  int calls = 0;
  set_log_sink([&](LogLevel, std::string_view) {
    ++calls;
    set_log_sink([&](LogLevel, std::string_view) { calls += 10; });
  });
  log(LogLevel::info, "first");
  log(LogLevel::info, "second");
  EXPECT_EQ(calls, 11);
}

TEST_F(LogSinkTest, threads_that_log_while_the_sink_changes_lose_no_line) {
  std::atomic<int> lines = 0;
  const auto count = [&](LogLevel, std::string_view) { ++lines; };
  set_log_sink(count);
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([] {
      for (int k = 0; k < 500; ++k) log(LogLevel::info, "line {}", k);
    });
  }
  for (int k = 0; k < 500; ++k) set_log_sink(count);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(lines, 2000);
}

TEST(ErrorTest, every_kind_has_a_name_of_its_own) {
  std::set<std::string> names;
  for (int kind = 0; kind <= static_cast<int>(ErrorKind::closed); ++kind) {
    names.insert(name(static_cast<ErrorKind>(kind)));
  }
  EXPECT_EQ(names.size(), static_cast<size_t>(ErrorKind::closed) + 1);
  EXPECT_STREQ(name(ErrorKind::invalid_argument), "invalid_argument");
  EXPECT_STREQ(name(ErrorKind::timed_out), "timed_out");
}

TEST(ErrorTest, an_errno_gives_the_kind_that_callers_act_on) {
  EXPECT_EQ(kind_of_errno(ENOSPC), ErrorKind::no_space);
  EXPECT_EQ(kind_of_errno(EDQUOT), ErrorKind::no_space);
  EXPECT_EQ(kind_of_errno(EACCES), ErrorKind::permission);
  EXPECT_EQ(kind_of_errno(EPERM), ErrorKind::permission);
  EXPECT_EQ(kind_of_errno(EROFS), ErrorKind::permission);
  EXPECT_EQ(kind_of_errno(ENOENT), ErrorKind::not_found);
  EXPECT_EQ(kind_of_errno(EINVAL), ErrorKind::unsupported);
  EXPECT_EQ(kind_of_errno(ENOSYS), ErrorKind::unsupported);
  EXPECT_EQ(kind_of_errno(EOPNOTSUPP), ErrorKind::unsupported);
  EXPECT_EQ(kind_of_errno(EIO), ErrorKind::io);
  EXPECT_EQ(kind_of_errno(ESTALE), ErrorKind::io);
}

TEST(ErrorTest, a_failed_system_call_is_told_with_its_object_and_reason) {
  const Status status = fail_errno(ENOSPC, "cannot write {}", "/a/b");
  ASSERT_FALSE(status.has_value());
  EXPECT_EQ(status.error().kind, ErrorKind::no_space);
  EXPECT_EQ(status.error().os_errno, ENOSPC);
  EXPECT_EQ(status.error().message, "cannot write /a/b: No space left on device");
}

TEST(BytesTest, fields_are_little_endian_at_any_address) {
  std::array<std::byte, 9> bytes{};
  put_le<uint64_t>(bytes, 1, 0x0807060504030201);
  EXPECT_EQ(bytes[0], std::byte{0});
  EXPECT_EQ(bytes[1], std::byte{1});
  EXPECT_EQ(bytes[8], std::byte{8});
  EXPECT_EQ(get_le<uint32_t>(bytes, 3), 0x06050403u);
}

TEST(BytesDeathTest, a_field_beyond_the_end_stops_the_program) {
  std::array<std::byte, 8> bytes{};
  EXPECT_DEATH(put_le<uint32_t>(bytes, 5, 1), "check failed");
  EXPECT_DEATH(get_le<uint16_t>(std::span<const std::byte>(bytes), 7), "check failed");
}

TEST(ClockTest, steady_time_does_not_go_back_and_wall_time_is_of_this_century) {
  const uint64_t first = system_clock().steady_ns();
  EXPECT_GE(system_clock().steady_ns(), first);
  EXPECT_GT(system_clock().wall_ns(), 1'700'000'000ull * 1'000'000'000);
}

TEST(Sha256Test, the_published_example_comes_out_in_one_piece_and_in_three) {
  const std::string expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
  EXPECT_EQ(to_hex(sha256("abc")), expected);
  EXPECT_EQ(to_hex(Sha256().update("a").update("").update("bc").finish()), expected);
  EXPECT_EQ(to_hex(Sha256().update_le(0x636261, 3).finish()), expected);
}

TEST(Sha256Test, threads_hash_independently) {
  std::vector<std::thread> threads;
  std::array<std::string, 4> results;
  for (size_t i = 0; i < results.size(); ++i) {
    threads.emplace_back([&results, i] {
      for (int k = 0; k < 1000; ++k) results[i] = to_hex(sha256(std::string(i + 1, 'x')));
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (size_t i = 0; i < results.size(); ++i) EXPECT_EQ(results[i], to_hex(sha256(std::string(i + 1, 'x'))));
}

}  // namespace
}  // namespace tokendepot
