// What one rank of all heads stored is read by two ranks of half the heads each, and back, cell by cell: the
// ranks are on two GPUs where there are two, else both on one.
#include "device_memory.h"
#include "unit/depot_fixture.h"

namespace tokendepot::testing {
namespace {

constexpr uint32_t kChunks = 24;
constexpr uint32_t kStoredBlocks = kChunks * kBlocksPerChunk;
constexpr uint32_t kLayers = 8;
constexpr uint32_t kHeads = 8;
constexpr uint8_t kPoison = 0xEE;

CacheForm form_of_heads(uint32_t begin, uint32_t end) {
  CacheForm form;
  form.shape = small_shape({0, kLayers, static_cast<uint16_t>(begin), static_cast<uint16_t>(end)});
  form.shape.row_bytes = 256;
  form.blocks = 2 * kStoredBlocks;  // the first half to store from, the second to load into
  return form;
}

/// The cells of some heads out of a cache of all heads.
std::vector<uint8_t> slice(const std::vector<uint8_t>& all, const CacheForm& part) {
  const uint64_t row = part.shape.row_bytes;
  const uint64_t lines = all.size() / (kHeads * row);  // [layer][block][plane][token]
  std::vector<uint8_t> cells;
  cells.reserve(part.bytes());
  for (uint64_t line = 0; line < lines; ++line) {
    const uint8_t* const heads = all.data() + line * kHeads * row;
    cells.insert(cells.end(), heads + part.shape.part.head_begin * row,
                 heads + part.shape.part.head_end * row);
  }
  return cells;
}

/// A worker of an engine: a depot with a cache of its heads on its GPU.
class Rank {
 public:
  Rank(const std::string& root, uint32_t ordinal, uint32_t head_begin, uint32_t head_end)
      : form(form_of_heads(head_begin, head_end)), want(want_of(form.shape)) {
    must(cudaSetDevice(static_cast<int>(ordinal)));
    memory = std::make_unique<DeviceMemory>(form.bytes());
    must(cudaSetDevice(0));
    Options options;
    options.roots = {{.path = root, .capacity_bytes = 256ull << 20, .segment_bytes = 16ull << 20}};
    options.device = "cuda:" + std::to_string(ordinal);
    options.device_slab_bytes = 64ull << 20;
    options.slab_bytes = 64ull << 20;
    options.free_space_reserve = 0;
    options.poll_ms = 20;
    auto opened = Depot::open(options);
    if (!opened) {
      ADD_FAILURE() << opened.error().message;
      return;
    }
    depot = std::move(*opened);
    ns = *depot->register_namespace(R"({"model":"m"})");
    keys = prompt_keys(ns, 1, kChunks);
    EXPECT_TRUE(depot->attach(form.at(memory->data())));
  }

  void fill(const std::vector<uint8_t>& all) { memory->upload(slice(all, form)); }

  void store() {
    for (size_t chunk = 0; chunk < kChunks; ++chunk) {
      int attempt = 0;
      while (store_chunks(*depot, ++job_, ns, keys, chunk, chunk + 1).items_ok != 1) {
        ASSERT_LT(++attempt, 100) << "never stored";
        usleep(20'000);
      }
    }
    ASSERT_TRUE(depot->flush(10s));
  }

  void load(size_t extents_of_a_chunk) {
    for (int i = 0; i < 250 && depot->longest_prefix(keys, std::span(&want, 1)) != kChunks; ++i)
      usleep(20'000);
    ASSERT_EQ(depot->longest_prefix(keys, std::span(&want, 1)), kChunks);
    auto plan = plan_chunks(*depot, ns, keys, want, 0, kChunks, kStoredBlocks);
    ASSERT_TRUE(plan) << plan.error().message;
    ASSERT_TRUE(depot->submit_load(++job_, std::move(*plan)));
    EXPECT_EQ(wait_for(*depot, job_, 30s).items_ok, kChunks * extents_of_a_chunk);
  }

  /// The second half of the cache holds what the first half of `all` holds of these heads; the first is as it
  /// was.
  void expect_loaded(const std::vector<uint8_t>& all) const {
    const auto now = memory->download();
    const auto expected = slice(all, form);
    const uint64_t half = form.page_bytes() * kStoredBlocks;
    for (uint64_t layer = 0; layer < kLayers; ++layer) {
      const uint64_t begin = layer * 2 * half;
      ASSERT_EQ(std::vector<uint8_t>(now.begin() + static_cast<std::ptrdiff_t>(begin + half),
                                     now.begin() + static_cast<std::ptrdiff_t>(begin + 2 * half)),
                std::vector<uint8_t>(expected.begin() + static_cast<std::ptrdiff_t>(begin),
                                     expected.begin() + static_cast<std::ptrdiff_t>(begin + half)))
          << "layer " << layer;
      ASSERT_TRUE(std::all_of(now.begin() + static_cast<std::ptrdiff_t>(begin),
                              now.begin() + static_cast<std::ptrdiff_t>(begin + half),
                              [](uint8_t byte) { return byte == kPoison; }))
          << "layer " << layer << ": a block was written that nobody asked for";
    }
  }
  void poison() { memory->upload(std::vector<uint8_t>(memory->size(), kPoison)); }

  CacheForm form;
  GroupWant want;
  std::unique_ptr<DeviceMemory> memory;
  std::unique_ptr<Depot> depot;
  NamespaceDigest ns;
  std::vector<Key> keys;

 private:
  uint64_t job_ = 0;
};

class CrossTp : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    SKIP_WITHOUT_GPU();
    int count = 0;
    must(cudaGetDeviceCount(&count));
    second_ = count > 1 ? 1 : 0;
    directory_ = std::make_unique<TemporaryDirectory>(GetParam() == "tmpfs" ? "/dev/shm" : "/var/tmp");
    all_ = random_bytes(form_of_heads(0, kHeads).bytes(), 1);
    RecordProperty("gpus", count);
  }
  std::string root() const { return directory_->path() + "/root"; }

  uint32_t second_ = 0;
  std::unique_ptr<TemporaryDirectory> directory_;
  std::vector<uint8_t> all_;
};

TEST_P(CrossTp, WhatOneRankStoredIsReadByTwo) {
  {
    Rank whole(root(), 0, 0, kHeads);
    ASSERT_NE(whole.depot, nullptr);
    whole.fill(all_);
    whole.store();
  }
  for (const bool upper : {false, true}) {
    Rank half(root(), upper ? second_ : 0, upper ? kHeads / 2 : 0, upper ? kHeads : kHeads / 2);
    ASSERT_NE(half.depot, nullptr);
    half.poison();
    half.load(1);
    half.expect_loaded(all_);
  }
}

TEST_P(CrossTp, WhatTwoRanksStoredIsReadByOne) {
  {
    Rank lower(root(), 0, 0, kHeads / 2);
    Rank upper(root(), second_, kHeads / 2, kHeads);
    ASSERT_TRUE(lower.depot != nullptr && upper.depot != nullptr);
    lower.fill(all_);
    upper.fill(all_);
    lower.store();
    Rank whole(root(), second_, 0, kHeads);
    ASSERT_NE(whole.depot, nullptr);
    EXPECT_EQ(whole.depot->longest_prefix(whole.keys, std::span(&whole.want, 1)), 0u)
        << "half of the heads is no chunk";
    upper.store();
  }
  Rank whole(root(), second_, 0, kHeads);
  ASSERT_NE(whole.depot, nullptr);
  whole.poison();
  whole.load(2);
  whole.expect_loaded(all_);
}

INSTANTIATE_TEST_SUITE_P(Roots, CrossTp, ::testing::Values("tmpfs", "disk"),
                         [](const auto& one) { return one.param; });

}  // namespace
}  // namespace tokendepot::testing
