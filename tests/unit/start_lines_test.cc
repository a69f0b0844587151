// What a depot says when it opens is what it takes.
#include <filesystem>
#include <fstream>
#include <regex>
#include <thread>

#include "base/log.h"
#include "depot_fixture.h"

namespace tokendepot::testing {
namespace {

/// Of this process, by their names; those that have been joined may be listed for a moment yet.
uint32_t depot_threads_now() {
  uint32_t found = 0;
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
    std::string name;
    std::getline(std::ifstream(task.path() / "comm"), name);
    found += name.starts_with("td-") ? 1 : 0;
  }
  return found;
}

uint32_t depot_threads(uint32_t expected) {
  for (int i = 0; i < 100 && depot_threads_now() != expected; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  return depot_threads_now();
}

uint32_t threads_told(const Options& options, std::unique_ptr<Depot>& depot) {
  std::string ready;
  set_log_sink([&](LogLevel, std::string_view line) {
    if (line.starts_with("ready after ")) ready = line;
  });
  auto opened = Depot::open(options);
  set_log_sink(nullptr);
  EXPECT_TRUE(opened) << opened.error().message;
  if (opened) depot = std::move(*opened);
  std::smatch told;
  EXPECT_TRUE(std::regex_search(ready, told, std::regex(", ([0-9]+) depot threads in this process$")))
      << ready;
  return told.empty() ? 0 : static_cast<uint32_t>(std::stoul(told[1]));
}

TEST(StartLines, TellOfAllThreadsThatDepotsHaveInThisProcess) {
  const TemporaryDirectory directory;
  Options options;
  options.roots = {{.path = directory.path() + "/root", .capacity_bytes = 16 << 20}};
  options.slab_bytes = 4 << 20;
  options.free_space_reserve = 0;
  std::unique_ptr<Depot> one;
  std::unique_ptr<Depot> two;
  const uint32_t alone = threads_told(options, one);
  EXPECT_EQ(alone, depot_threads(alone));
  options.device_threads = 7;
  const uint32_t both = threads_told(options, two);
  EXPECT_EQ(both, depot_threads(both));
  EXPECT_GE(both, alone + 7);
  one.reset();
  two.reset();
  std::unique_ptr<Depot> again;
  const uint32_t after = threads_told(options, again);
  EXPECT_EQ(after, depot_threads(after));
}

}  // namespace
}  // namespace tokendepot::testing
