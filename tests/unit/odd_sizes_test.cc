// P1 and P2: objects of any size at any address of the engine's memory round-trip exactly on every way of
// I/O; padding stays on the medium.
#include <algorithm>
#include <random>

#include "transfers_fixture.h"

namespace tokendepot::testing {
namespace {

constexpr uint32_t kSizes[] = {1, 1000, 4095, 4096, 4097, 65'536, 65'537, 116'992, 3'098'112};
constexpr size_t kOffsetsInPage[] = {0, 1, 64, 512, 4095};
constexpr std::byte kUntouched{0x5A};

struct Way {
  const char* name;
  const char* directory;
  TransportChoice transport;
  IoChoice io;
};

/// Two pages of the engine, one directly behind the other, between guards; a group of its own.
class TwoPages {
 public:
  TwoPages(uint16_t group, uint32_t bytes, size_t offset_in_page) : bytes_(bytes) {
    shape_.group = group;
    shape_.kind = LayoutKind::opaque;
    shape_.part = {0, 1, 0, 1};
    shape_.tokens = shape_.block_tokens = 1;
    shape_.planes = 0;
    shape_.page_bytes = bytes;
    memory_.assign(3 * kPageBytes + 2 * size_t{bytes}, kUntouched);
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    first_ = align_up(address) - address + offset_in_page;
    if (first_ == 0) first_ = kPageBytes;
  }
  PagedCache paged() {
    PagedCache cache;
    cache.shape = shape_;
    cache.block_count = 2;
    cache.layers = {{{memory_.data() + first_, static_cast<int64_t>(bytes_), 0, 0, shape_.page_bytes}}};
    return cache;
  }
  std::span<std::byte> page(size_t block) {
    return std::span(memory_).subspan(first_ + block * bytes_, bytes_);
  }
  bool guards_are_untouched() const {
    const auto untouched = [](std::byte byte) { return byte == kUntouched; };
    return std::all_of(memory_.begin(), memory_.begin() + static_cast<int64_t>(first_), untouched) &&
           std::all_of(memory_.begin() + static_cast<int64_t>(first_ + 2 * bytes_), memory_.end(), untouched);
  }
  const GroupShape& shape() const { return shape_; }

 private:
  GroupShape shape_;
  size_t bytes_;
  std::vector<std::byte> memory_;
  size_t first_ = 0;
};

class OddSizes : public ::testing::TestWithParam<Way> {};

TEST_P(OddSizes, RoundTripExactlyAtEveryAddressAndSurviveARestart) {
  const TemporaryDirectory directory(GetParam().directory);
  Options options;
  options.roots = {{.path = directory / "root",
                    .capacity_bytes = 96 << 20,
                    .segment_bytes = 4 << 20,
                    .transport = GetParam().transport,
                    .io = GetParam().io}};
  options.slab_bytes = 16 << 20;
  options.free_space_reserve = 0;
  options.poll_ms = 20;
  std::vector<TwoPages> pages;
  std::mt19937 random(3);
  for (const uint32_t size : kSizes) {
    for (const size_t offset : kOffsetsInPage) {
      TwoPages& added = pages.emplace_back(static_cast<uint16_t>(pages.size()), size, offset);
      for (std::byte& byte : added.page(0)) byte = static_cast<std::byte>(random());
    }
  }
  for (int restarted = 0; restarted < 2; ++restarted) {
    const auto depot = Depot::open(options);
    ASSERT_TRUE(depot) << depot.error().message;
    const auto ns = (*depot)->register_namespace(R"({"model":"m"})");
    const auto keys = prompt_keys(*ns, 1, 1);
    uint64_t job = 0;
    for (TwoPages& one : pages) {
      SCOPED_TRACE(one.shape().page_bytes);
      ASSERT_TRUE((*depot)->attach(one.paged()));
      if (restarted == 0) {
        StorePlan plan;
        plan.ns = *ns;
        plan.items.push_back({keys[0], 0, one.shape().group, {0}});
        until_stored([&] {
          EXPECT_TRUE((*depot)->submit_store(++job, plan));
          return wait_for(**depot, job).items_ok == 1;
        });
      }
      std::ranges::fill(one.page(1), std::byte{0});
      const std::vector<int32_t> blocks{1};
      const Depot::LoadGroup group{want_of(one.shape()), 0, 1, blocks};
      const auto plan = (*depot)->plan_load(*ns, keys, std::span(&group, 1), 10s);
      ASSERT_TRUE(plan) << plan.error().message;
      ASSERT_TRUE((*depot)->submit_load(++job, *plan));
      ASSERT_EQ(wait_for(**depot, job).items_ok, 1u);
      EXPECT_TRUE(std::ranges::equal(one.page(0), one.page(1)));
      EXPECT_TRUE(one.guards_are_untouched());
    }
    EXPECT_EQ((*depot)->stats().entries, pages.size());
  }
}

INSTANTIATE_TEST_SUITE_P(
    Ways, OddSizes,
    ::testing::Values(Way{"mapped", "/dev/shm", TransportChoice::automatic, IoChoice::automatic},
                      Way{"disk_threads", "/var/tmp", TransportChoice::automatic, IoChoice::threads},
                      Way{"disk_uring", "/var/tmp", TransportChoice::automatic, IoChoice::uring},
                      Way{"page_cache", "/var/tmp", TransportChoice::buffered, IoChoice::threads},
                      Way{"page_cache_on_tmpfs", "/dev/shm", TransportChoice::buffered, IoChoice::uring}),
    [](const auto& way) { return std::string(way.param.name); });

}  // namespace
}  // namespace tokendepot::testing
