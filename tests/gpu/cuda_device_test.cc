// The CUDA kernels against their host twins, bit for bit.
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <deque>
#include <thread>

#include "device/cuda/cuda_device.h"
#include "device/host_kernels.h"
#include "device_memory.h"
#include "format/digest.h"

namespace tokendepot::testing {
namespace {

struct Outcome {
  std::atomic<bool> done = false;
  ScatterOutcome scatter = ScatterOutcome::gone;
  bool gathered = false;
  void wait() const {
    while (!done) std::this_thread::yield();
  }
};

void run(Device& device, ScatterWork work, Outcome& outcome) {
  work.owner = &outcome;
  work.done = [](ScatterWork* self, ScatterOutcome how) {
    auto* at = static_cast<Outcome*>(self->owner);
    at->scatter = how;
    at->done = true;
  };
  device.submit(&work);
  outcome.wait();
}

void run(Device& device, GatherWork work, Outcome& outcome) {
  work.owner = &outcome;
  work.done = [](GatherWork* self, bool ok) {
    auto* at = static_cast<Outcome*>(self->owner);
    at->gathered = ok;
    at->done = true;
  };
  device.submit(&work);
  outcome.wait();
}

GatherWork store_of(const PagedCache& cache, std::span<const int32_t> blocks, std::span<std::byte> payload,
                    std::span<uint64_t> digests) {
  GatherWork work;
  work.cache = &cache;
  work.blocks = blocks;
  work.payload = payload;
  work.digests = digests;
  return work;
}

/// Of the whole extent.
ScatterWork load_of(const PagedCache& cache, const ExtentHeader& header, std::span<const std::byte> payload,
                    std::span<const int32_t> blocks) {
  ScatterWork work;
  work.cache = &cache;
  work.header = &header;
  work.shards = cache.shape.shards();
  work.payload = payload;
  work.blocks = blocks;
  return work;
}

bool gathers(Device& device, const GatherWork& work) {
  Outcome outcome;
  run(device, work, outcome);
  return outcome.gathered;
}

ScatterOutcome scattered(Device& device, const ScatterWork& work) {
  Outcome outcome;
  run(device, work, outcome);
  return outcome.scatter;
}

CacheForm random_form(std::mt19937_64& random) {
  CacheForm form;
  GroupShape& shape = form.shape;
  const bool opaque = random() % 3 == 0;
  const bool odd = random() % 4 == 0;  // rows that are no multiple of 16 bytes
  const auto layers = static_cast<uint16_t>(1 + random() % 5);
  const auto heads = static_cast<uint16_t>(opaque ? 1 : 1 + random() % 6);
  const uint32_t sizes[] = {1, 4, 16, 32};
  shape.block_tokens = sizes[random() % 4];
  shape.tokens = shape.block_tokens * static_cast<uint32_t>(1 + random() % 9);
  shape.part = {2, static_cast<uint16_t>(2 + layers), 3, static_cast<uint16_t>(3 + heads)};
  if (opaque) {
    shape.kind = LayoutKind::opaque;
    shape.planes = 0;
    shape.page_bytes = static_cast<uint32_t>(odd ? 2 * (1 + random() % 3000) : 16 * (1 + random() % 600));
  } else {
    shape.planes = static_cast<uint16_t>(1 + random() % 2);
    shape.row_bytes = static_cast<uint32_t>(odd ? 2 * (1 + random() % 100) : 16 * (1 + random() % 20));
  }
  // As engines have it (NHD, HND), or in any order: K and V outermost or row by row, layers inside blocks;
  // with gaps.
  using enum CacheForm::Dimension;
  if (random() % 2 == 0) form.nesting = {layer, block, plane, head, token};
  if (random() % 2 == 0) {
    std::ranges::shuffle(form.nesting, random);
    for (uint32_t& gap : form.gaps)
      gap = random() % 2 == 0 ? 0 : static_cast<uint32_t>((odd ? 2 : 16) * (1 + random() % 9));
  }
  if (opaque) form.split_layers = static_cast<uint32_t>(random() % 3 == 0 ? 0x1F : random() % 0x20);
  form.blocks = shape.blocks() * 2 + static_cast<uint32_t>(random() % 20);
  return form;
}

ExtentHeader header_of(const GroupShape& shape, const std::vector<uint64_t>& digests) {
  ExtentHeader header;
  header.set_shape(shape);
  header.shard_digests = digests;
  return header;
}

class CudaDeviceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    SKIP_WITHOUT_GPU();
    auto made = make_cuda_device(0, 512ull << 20, 128ull << 20, 2);
    ASSERT_TRUE(made) << made.error().message;
    device_ = std::move(*made);
  }
  std::unique_ptr<Device> device_;
};

TEST_F(CudaDeviceTest, GatherAndScatterEqualTheirHostTwinsOnRandomShapes) {
  const char* const asked =
      std::getenv("TOKENDEPOT_TEST_SHAPES");  // a sanitizer takes a hundred times as long
  const uint64_t shapes = asked != nullptr ? std::strtoull(asked, nullptr, 10) : 400;
  ASSERT_GT(shapes, 0u);
  for (uint64_t seed = 0; seed < shapes; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937_64 random(seed);
    const CacheForm form = random_form(random);
    const GroupShape& shape = form.shape;
    auto host_bytes = random_bytes(form.bytes(), seed);
    DeviceMemory memory(form.bytes());
    memory.upload(host_bytes);
    const auto host = form.at(reinterpret_cast<std::byte*>(host_bytes.data()));
    // The device keeps what it learns of a cache by its address, as Depot's caches live as long as it does.
    static std::vector<std::unique_ptr<PagedCache>> attached;
    attached.push_back(std::make_unique<PagedCache>(form.at(memory.data())));
    ASSERT_TRUE(validate(host));

    std::vector<int32_t> order(form.blocks);
    for (uint32_t i = 0; i < form.blocks; ++i) order[i] = static_cast<int32_t>(i);
    std::ranges::shuffle(order, random);
    const std::vector<int32_t> from(order.begin(), order.begin() + shape.blocks());
    const uint64_t payload = shape.payload_bytes();
    std::vector<std::byte> expected(payload, std::byte{0xAA});
    std::byte* const actual = device_->slab().allocate(payload);
    ASSERT_NE(actual, nullptr);
    std::memset(actual, 0x55, payload);
    std::vector<uint64_t> expected_digests(shape.shards()), digests(shape.shards());
    gather_and_digest(store_of(host, from, expected, expected_digests));
    ASSERT_TRUE(gathers(*device_, store_of(*attached.back(), from, {actual, payload}, digests)));
    ASSERT_EQ(std::memcmp(expected.data(), actual, payload), 0);
    ASSERT_EQ(expected_digests, digests);

    const ExtentHeader header = header_of(shape, digests);
    std::vector<int32_t> to(shape.blocks());
    for (uint32_t i = 0; i < shape.blocks(); ++i)
      to[i] = random() % 5 == 0 ? kSkipBlock : order[form.blocks - 1 - i];
    if (random() % 3 == 0) {
      const uint64_t at = random() % payload;
      expected[at] ^= std::byte{4};
      actual[at] ^= std::byte{4};
    }
    ScatterWork scatter = load_of(host, header, {}, to);
    scatter.first_shard = static_cast<uint32_t>(random() % shape.shards());
    scatter.shards = 1 + static_cast<uint32_t>(random() % (shape.shards() - scatter.first_shard));
    const uint64_t begin = scatter.first_shard * shape.shard_stride();
    scatter.payload = {expected.data() + begin, scatter.shards * shape.shard_stride()};
    const ScatterOutcome twin = verify_and_scatter(scatter);
    scatter.cache = attached.back().get();
    scatter.payload = {actual + begin, scatter.payload.size()};
    ASSERT_EQ(scattered(*device_, scatter), twin);
    ASSERT_TRUE(memory.download() == host_bytes)
        << "cells differ, or cells were touched that nobody asked for";
    device_->slab().release(actual);
  }
}

TEST_F(CudaDeviceTest, StoresThatShareACopyWriteNothingBetweenThem) {
  constexpr size_t kStores = 48;  // the first ones start alone, the others gather behind them
  constexpr uint64_t kGap = 4096;
  CacheForm form;
  form.shape.part = {0, 4, 0, 2};
  form.shape.tokens = 256;
  form.shape.block_tokens = 16;
  form.shape.row_bytes = 256;
  const GroupShape& shape = form.shape;
  form.blocks = shape.blocks() * 3;
  auto host_bytes = random_bytes(form.bytes(), 11);
  DeviceMemory memory(form.bytes());
  memory.upload(host_bytes);
  const PagedCache host = form.at(reinterpret_cast<std::byte*>(host_bytes.data())),
                   cache = form.at(memory.data());
  const uint64_t payload = shape.payload_bytes(), pitch = payload + kGap;
  std::byte* const staging = device_->slab().allocate(kStores * pitch);
  ASSERT_NE(staging, nullptr);
  const std::byte poison{0x5A};
  std::memset(staging, static_cast<int>(poison), kStores * pitch);
  std::vector<std::vector<int32_t>> blocks(kStores, std::vector<int32_t>(shape.blocks()));
  std::vector<std::vector<uint64_t>> digests(kStores, std::vector<uint64_t>(shape.shards()));
  std::vector<Outcome> outcomes(kStores);
  std::vector<GatherWork> works(kStores);
  for (size_t i = 0; i < kStores; ++i) {
    for (size_t b = 0; b < blocks[i].size(); ++b)
      blocks[i][b] = static_cast<int32_t>((i * 7 + b * 5) % form.blocks);
    works[i].cache = &cache;
    works[i].blocks = blocks[i];
    works[i].payload = {staging + i * pitch, payload};
    works[i].digests = digests[i];
    works[i].owner = &outcomes[i];
    works[i].done = [](GatherWork* self, bool ok) {
      auto* at = static_cast<Outcome*>(self->owner);
      at->gathered = ok;
      at->done = true;
    };
  }
  for (GatherWork& work : works) device_->submit(&work);
  for (const Outcome& outcome : outcomes) outcome.wait();
  std::vector<std::byte> expected(payload);
  std::vector<uint64_t> expected_digests(shape.shards());
  for (size_t i = 0; i < kStores; ++i) {
    SCOPED_TRACE(i);
    ASSERT_TRUE(outcomes[i].gathered);
    GatherWork twin = works[i];
    twin.cache = &host;
    twin.payload = expected;
    twin.digests = expected_digests;
    gather_and_digest(twin);
    ASSERT_EQ(std::memcmp(expected.data(), works[i].payload.data(), payload), 0);
    ASSERT_EQ(expected_digests, digests[i]);
    const std::byte* const gap = staging + i * pitch + payload;
    ASSERT_TRUE(std::all_of(gap, gap + kGap, [&](std::byte at) { return at == poison; }));
  }
  device_->slab().release(staging);
}

// A shard's digest is made of its pages' digests: by one thread up to 30 of them, by a warp in groups of 512.
// Of large extents a warp takes two to six pages in a row, which also lie on both sides of a shard's border,
// or are two shards and more.
TEST_F(CudaDeviceTest, DigestsOfLongShardsAndOfManyEqualTheirHostTwins) {
  struct Shards {
    uint16_t number;
    uint32_t pages;
  };
  std::deque<PagedCache> attached;  // the device knows a cache by its address
  for (const auto [number, pages] : {Shards{3, 29},
                                     {3, 30},
                                     {3, 31},
                                     {3, 33},
                                     {3, 128},
                                     {3, 129},
                                     {3, 136},
                                     {3, 137},
                                     {3, 511},
                                     {3, 512},
                                     {3, 513},
                                     {3, 520},
                                     {3, 521},
                                     {3, 1025},
                                     {3, 4099},
                                     {4000, 1},
                                     {3000, 2}}) {
    SCOPED_TRACE(fmt::format("{} shards of {} pages", number, pages));
    CacheForm form;
    form.shape.kind = LayoutKind::opaque;
    form.shape.planes = 0;
    form.shape.part = {0, number, 0, 1};
    form.shape.tokens = form.shape.block_tokens = 16;
    form.shape.page_bytes = pages * static_cast<uint32_t>(kPageBytes) - 48;
    form.blocks = 2;
    const GroupShape& shape = form.shape;
    ASSERT_EQ(shape.shard_stride(), pages * kPageBytes);
    auto host_bytes = random_bytes(form.bytes(), pages);
    DeviceMemory memory(form.bytes());
    memory.upload(host_bytes);
    const PagedCache host = form.at(reinterpret_cast<std::byte*>(host_bytes.data()));
    const PagedCache& cache = attached.emplace_back(form.at(memory.data()));
    const std::vector<int32_t> from{1}, to{0};
    std::byte* const payload = device_->slab().allocate(shape.payload_bytes());
    ASSERT_NE(payload, nullptr);
    std::vector<std::byte> expected(shape.payload_bytes());
    std::vector<uint64_t> expected_digests(shape.shards()), digests(shape.shards());
    gather_and_digest(store_of(host, from, expected, expected_digests));
    ASSERT_TRUE(gathers(*device_, store_of(cache, from, {payload, shape.payload_bytes()}, digests)));
    ASSERT_EQ(std::memcmp(expected.data(), payload, shape.payload_bytes()), 0);
    ASSERT_EQ(expected_digests, digests);
    for (const bool spoilt : {true, false}) {
      // In the last shard's last page, whose digest is the last word of what is digested.
      payload[shape.payload_bytes() - 100] ^= std::byte{1};
      const ExtentHeader header = header_of(shape, digests);
      ASSERT_EQ(scattered(*device_, load_of(cache, header, {payload, shape.payload_bytes()}, to)),
                spoilt ? ScatterOutcome::corrupt : ScatterOutcome::ok);
      if (spoilt) {
        ASSERT_TRUE(memory.download() == host_bytes);
      }
    }
    device_->slab().release(payload);
  }
}

TEST_F(CudaDeviceTest, BlocksOnBothSidesOfTwoAndFourGiBAreExact) {
  CacheForm form;
  form.shape.kind = LayoutKind::opaque;
  form.shape.planes = 0;
  form.shape.part = {0, 1, 0, 1};
  form.shape.block_tokens = 16;
  form.shape.tokens = 16 * 5;
  form.shape.page_bytes = 1'002'240;
  form.blocks = 4'400;
  DeviceMemory memory(form.bytes());
  memory.fill(0, memory.size(), 0xEE);
  const PagedCache cache = form.at(memory.data());
  const std::vector<int32_t> blocks{0, 2142, 2143, 4285, 4286};
  std::vector<std::vector<uint8_t>> pages;
  for (const int32_t block : blocks) {
    pages.push_back(random_bytes(form.shape.page_bytes, static_cast<uint64_t>(block)));
    must(cudaMemcpy(memory.data() + int64_t{block} * form.shape.page_bytes, pages.back().data(),
                    pages.back().size(), cudaMemcpyHostToDevice));
  }
  const uint64_t payload = form.shape.payload_bytes();
  std::byte* const staging = device_->slab().allocate(payload);
  std::vector<uint64_t> digests(1);
  ASSERT_TRUE(gathers(*device_, store_of(cache, blocks, {staging, payload}, digests)));
  for (size_t i = 0; i < blocks.size(); ++i) {
    ASSERT_EQ(std::memcmp(staging + i * form.shape.page_bytes, pages[i].data(), pages[i].size()), 0)
        << blocks[i];
  }
  const std::vector<int32_t> to{1, 2141, 2144, 4284, 4287};
  const ExtentHeader header = header_of(form.shape, digests);
  ASSERT_EQ(scattered(*device_, load_of(cache, header, {staging, payload}, to)), ScatterOutcome::ok);
  std::vector<uint8_t> page(form.shape.page_bytes);
  for (size_t i = 0; i < to.size(); ++i) {
    must(cudaMemcpy(page.data(), memory.data() + int64_t{to[i]} * form.shape.page_bytes, page.size(),
                    cudaMemcpyDeviceToHost));
    ASSERT_EQ(page, pages[i]) << to[i];
  }
}

TEST_F(CudaDeviceTest, EightyLayersInOneTensorOfFourGiBAreExact) {
  constexpr uint32_t kLayers = 80, kBlocks = 4'400, kAtOnce = 40, kPage = 12'528;
  CacheForm form;
  form.shape.kind = LayoutKind::opaque;
  form.shape.planes = 0;
  form.shape.part = {0, kLayers, 0, 1};
  form.shape.block_tokens = 16;
  form.shape.tokens = 16 * kAtOnce;
  form.shape.page_bytes = kPage;
  form.blocks = kBlocks;
  DeviceMemory memory(form.bytes());
  memory.fill(0, memory.size(), 0xEE);
  std::vector<uint64_t> stamps(uint64_t{kLayers} * kBlocks);  // one at each page's begin
  for (uint64_t i = 0; i < stamps.size(); ++i) stamps[i] = i * 0x9E3779B97F4A7C15ull;
  must(cudaMemcpy2D(memory.data(), kPage, stamps.data(), 8, 8, stamps.size(), cudaMemcpyHostToDevice));
  PagedCache cache;
  cache.shape = form.shape;
  cache.block_count = kBlocks;
  for (uint32_t layer = 0; layer < kLayers; ++layer)
    cache.layers.push_back(
        {{memory.data() + uint64_t{layer} * kPage, int64_t{kLayers} * kPage, 0, 0, kPage}});
  ASSERT_TRUE(validate(cache));
  const uint64_t bytes = form.shape.payload_bytes();
  std::byte* const payload = device_->slab().allocate(bytes);
  std::byte* const again = device_->slab().allocate(bytes);
  ASSERT_NE(payload, nullptr);
  ASSERT_NE(again, nullptr);
  std::vector<uint64_t> digests(kLayers), digests_again(kLayers);
  std::vector<int32_t> blocks(kAtOnce);
  for (uint32_t first = 0; first < kBlocks; first += kAtOnce) {
    for (uint32_t i = 0; i < kAtOnce; ++i) blocks[i] = static_cast<int32_t>(first + i);
    ASSERT_TRUE(gathers(*device_, store_of(cache, blocks, {payload, bytes}, digests)));
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      const std::byte* const shard = payload + layer * form.shape.shard_stride();
      ASSERT_EQ(digests[layer], shard_digest({shard, form.shape.shard_stride()})) << first << ' ' << layer;
      for (uint32_t i = 0; i < kAtOnce; ++i) {
        const std::byte* const page = shard + uint64_t{i} * kPage;
        uint64_t stamp = 0;
        std::memcpy(&stamp, page, 8);
        ASSERT_EQ(stamp, stamps[uint64_t{first + i} * kLayers + layer]) << first + i << ' ' << layer;
        ASSERT_TRUE(std::all_of(page + 8, page + kPage, [](std::byte at) { return at == std::byte{0xEE}; }));
      }
    }
    memory.fill(uint64_t{first} * kLayers * kPage, kAtOnce * kLayers * kPage, 0);
    const ExtentHeader header = header_of(form.shape, digests);
    ASSERT_EQ(scattered(*device_, load_of(cache, header, {payload, bytes}, blocks)), ScatterOutcome::ok);
    ASSERT_TRUE(gathers(*device_, store_of(cache, blocks, {again, bytes}, digests_again)));
    ASSERT_EQ(std::memcmp(payload, again, bytes), 0) << first;
    ASSERT_EQ(digests, digests_again);
  }
  device_->slab().release(payload);
  device_->slab().release(again);
}

TEST_F(CudaDeviceTest, AForkedChildDoesNotGetTheSlab) {
  std::byte* const range = device_->slab().allocate(kPageBytes);
  ASSERT_NE(range, nullptr);
  *range = std::byte{1};
  const pid_t child = fork();
  if (child == 0) {
    unsigned char present = 0;
    _exit(mincore(range, kPageBytes, &present) == -1 && errno == ENOMEM ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0) << "a write after a fork would leave the device with a page of its own";
  device_->slab().release(range);
}

TEST_F(CudaDeviceTest, ADeviceSlabThatHoldsNoWholePageIsRefused) {
  const auto refused = make_cuda_device(0, 4095, 1 << 20, 2);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().kind, ErrorKind::no_space);
}

TEST_F(CudaDeviceTest, ADeviceSlabLargerThanTheFreeMemoryIsRefusedByName) {
  const auto refused = make_cuda_device(0, 1ull << 50, 1 << 20, 2);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().kind, ErrorKind::no_space);
  EXPECT_NE(refused.error().message.find("device_slab"), std::string::npos);
}

TEST_F(CudaDeviceTest, TheDevicesThreadMakesNoSecondContext) {
  size_t before = 0, after = 0, total = 0;
  must(cudaMemGetInfo(&before, &total));
  auto second = make_cuda_device(0, 64ull << 20, 16ull << 20, 2);
  ASSERT_TRUE(second);
  must(cudaMemGetInfo(&after, &total));
  EXPECT_LT(before - after, (64ull << 20) + (50ull << 20));
}

// Also of a stream that belongs to whatever device is current on the calling thread.
TEST_F(CudaDeviceTest, OnAnotherGpuItTakesNothingOfTheCallersOneAndLeavesItCurrent) {
  int devices = 0;
  must(cudaGetDeviceCount(&devices));
  if (devices < 2) GTEST_SKIP() << "one GPU only";
  must(cudaSetDevice(0));
  must(cudaDeviceSynchronize());
  size_t before = 0, after = 0, total = 0;
  must(cudaMemGetInfo(&before, &total));
  auto other = make_cuda_device(1, 64ull << 20, 16ull << 20, 64);
  ASSERT_TRUE(other) << other.error().message;
  const auto marked = (*other)->mark(nullptr);
  EXPECT_TRUE(marked) << marked.error().message;
  int current = -1;
  must(cudaGetDevice(&current));
  EXPECT_EQ(current, 0);
  must(cudaMemGetInfo(&after, &total));
  EXPECT_EQ(before, after);
}

}  // namespace
}  // namespace tokendepot::testing
