// Which mapping is registered next, and what that waits for.
#include "device/cuda/registry.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <thread>
#include <utility>
#include <vector>

#include "io/file.h"
#include "unit/temporary_directory.h"

namespace tokendepot::testing {
namespace {

constexpr uint64_t kBytes = 1 << 20;  // one registration
constexpr std::array<uint64_t, 4> kHeats{0, 1, 3, 2};

Mapping map_file(const std::string& path) {
  auto file = File::open(path, {.write = true, .create = true});
  EXPECT_TRUE(file) << file.error().message;
  EXPECT_EQ(::ftruncate(file->fd(), kBytes), 0);
  auto mapping = Mapping::map(*file, kBytes, true);
  EXPECT_TRUE(mapping) << mapping.error().message;
  return std::move(*mapping);
}

/// The order in which mappings of those heats were registered that were adopted one behind the other; empty
/// where this thread was stopped for so long that it cannot tell.
std::vector<size_t> order_seen(const std::string& directory) {
  std::array<Mapping, kHeats.size()> mappings;
  for (size_t i = 0; i < kHeats.size(); ++i) mappings[i] = map_file(directory + "/" + std::to_string(i));
  cuda::Busy busy;
  busy.loads = 1;  // each registration waits 50 ms for it
  std::vector<size_t> order;
  {
    cuda::Registry registry(0, busy);
    EXPECT_TRUE(registry.running());
    const auto began = std::chrono::steady_clock::now();
    for (size_t i = 0; i < kHeats.size(); ++i) registry.adopt({mappings[i].data(), kBytes}, true, kHeats[i]);
    bool sure = std::chrono::steady_clock::now() - began < std::chrono::milliseconds(20);
    std::vector<std::span<std::byte>> pieces;
    std::array<bool, kHeats.size()> seen{};
    while (order.size() < kHeats.size()) {
      size_t fresh = 0;
      for (size_t i = 0; i < kHeats.size(); ++i) {
        if (seen[i] || !registry.cut(mappings[i].data(), kBytes, pieces)) continue;
        seen[i] = true;
        order.push_back(i);
        ++fresh;
      }
      sure = sure && fresh <= 1;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    for (Mapping& mapping : mappings) registry.release(std::move(mapping));
    if (!sure) order.clear();
  }
  return order;
}

TEST(RegistryTest, OfMappingsThatWaitTheHottestIsRegisteredFirst) {
  const TemporaryDirectory directory("/dev/shm");
  std::vector<size_t> order;
  for (int attempt = 0; attempt < 100 && order.empty(); ++attempt) order = order_seen(directory.path());
  ASSERT_EQ(order.size(), kHeats.size());
  // The first may have been taken before the others were there.
  const auto hotter = [](size_t a, size_t b) { return kHeats[a] > kHeats[b]; };
  EXPECT_TRUE(std::is_sorted(order.begin() + 1, order.end(), hotter)) << ::testing::PrintToString(order);
}

TEST(RegistryTest, RegisteringWaitsForLoadsAndStepsButNotForever) {
  const TemporaryDirectory directory("/dev/shm");
  using Began = void (*)(cuda::Busy&);
  struct Kind {
    Began begin;
    std::chrono::milliseconds longest_wait;
  };
  constexpr std::array<Kind, 2> kKinds{
      Kind{[](cuda::Busy& busy) { busy.loads = 1; }, std::chrono::milliseconds(50)},
      Kind{[](cuda::Busy& busy) { busy.step_begins(); }, std::chrono::milliseconds(100)}};
  for (size_t kind = 0; kind < kKinds.size(); ++kind) {
    SCOPED_TRACE(kind);
    Mapping mapping = map_file(directory.path() + "/" + std::to_string(kind));
    cuda::Busy busy;
    kKinds[kind].begin(busy);
    cuda::Registry registry(0, busy);
    ASSERT_TRUE(registry.running());
    const auto began = std::chrono::steady_clock::now();
    registry.adopt({mapping.data(), kBytes}, true, 0);
    while (registry.registered_bytes() == 0) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      if (std::chrono::steady_clock::now() - began < std::chrono::seconds(30)) continue;
      ADD_FAILURE() << "never registered";
      break;
    }
    EXPECT_GE(std::chrono::steady_clock::now() - began, kKinds[kind].longest_wait);
    registry.release(std::move(mapping));
  }
}

TEST(RegistryTest, NothingIsRegisteredBetweenTwoStepsOfABusyEngine) {
  using std::chrono::milliseconds;
  cuda::Busy busy;
  const auto begun = std::chrono::steady_clock::now();
  EXPECT_FALSE(cuda::gives_way(busy, begun, begun)) << "an engine that has not begun";
  busy.step_begins();
  EXPECT_TRUE(cuda::gives_way(busy, begun, begun + milliseconds(99)));
  busy.step_ends();
  const auto ended = busy.step_ended.load();
  EXPECT_TRUE(cuda::gives_way(busy, ended, ended + milliseconds(4)));
  EXPECT_FALSE(cuda::gives_way(busy, ended, ended + milliseconds(5))) << "the engine is at rest";
  EXPECT_FALSE(cuda::gives_way(busy, ended - milliseconds(98), ended + milliseconds(2))) << "long enough";
  busy.step_ends();
  EXPECT_EQ(busy.step_ended.load(), ended) << "a step that queued nothing is none";
}

}  // namespace
}  // namespace tokendepot::testing
