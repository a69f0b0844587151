// Payloads in memory that the device does not reach, and mappings that it gets to reach piece by piece.
#include <sys/mman.h>

#include <atomic>
#include <thread>

#include "device/cuda/cuda_device.h"
#include "device/host_kernels.h"
#include "device_memory.h"
#include "unit/depot_fixture.h"

namespace tokendepot::testing {
namespace {

/// One extent of 24 MiB: more than the pieces of a bounced copy, and than what lies before a border.
class PayloadTest : public ::testing::Test {
 protected:
  void SetUp() override {
    SKIP_WITHOUT_GPU();
    form_.shape = small_shape({0, 24, 0, 4});
    form_.shape.row_bytes = 2048;
    form_.blocks = 2 * form_.shape.blocks();
    auto made = make_cuda_device(0, 128ull << 20, 64ull << 20, 2);
    ASSERT_TRUE(made) << made.error().message;
    device_ = std::move(*made);
    memory_ = std::make_unique<DeviceMemory>(form_.bytes());
    cells_ = random_bytes(form_.bytes(), 3);
    memory_->upload(cells_);
    cache_ = form_.at(memory_->data());
    blocks_ = iota_blocks(0, form_.shape.blocks());
    to_ = iota_blocks(static_cast<int32_t>(form_.shape.blocks()), form_.shape.blocks());
    digests_.resize(form_.shape.shards());
  }

  bool gather(std::span<std::byte> payload, bool guarded) {
    std::atomic<int> ended = -1;
    GatherWork work;
    work.cache = &cache_;
    work.blocks = blocks_;
    work.payload = payload;
    work.digests = digests_;
    work.guarded = guarded;
    work.owner = &ended;
    work.done = [](GatherWork* self, bool ok) { *static_cast<std::atomic<int>*>(self->owner) = ok ? 1 : 0; };
    device_->submit(&work);
    while (ended < 0) std::this_thread::yield();
    return ended == 1;
  }
  ExtentHeader header_of_extent() const {
    ExtentHeader header;
    header.set_shape(form_.shape);
    header.shard_digests = digests_;
    return header;
  }
  ScatterWork scatter_of(std::span<const std::byte> payload, const ExtentHeader& header) const {
    ScatterWork work;
    work.cache = &cache_;
    work.header = &header;
    work.payload = payload;
    work.shards = form_.shape.shards();
    work.blocks = to_;
    return work;
  }
  ScatterOutcome scatter(std::span<const std::byte> payload, bool guarded) {
    const ExtentHeader header = header_of_extent();
    std::atomic<int> ended = -1;
    ScatterWork work = scatter_of(payload, header);
    work.guarded = guarded;
    work.owner = &ended;
    work.done = [](ScatterWork* self, ScatterOutcome how) {
      *static_cast<std::atomic<int>*>(self->owner) = static_cast<int>(how);
    };
    device_->submit(&work);
    while (ended < 0) std::this_thread::yield();
    return static_cast<ScatterOutcome>(ended.load());
  }
  void expect_twin(std::span<const std::byte> payload) {
    std::vector<std::byte> expected(payload.size());
    std::vector<uint64_t> digests(digests_.size());
    const PagedCache host = form_.at(reinterpret_cast<std::byte*>(cells_.data()));
    GatherWork twin;
    twin.cache = &host;
    twin.blocks = blocks_;
    twin.payload = expected;
    twin.digests = digests;
    gather_and_digest(twin);
    EXPECT_TRUE(std::ranges::equal(expected, payload));
    EXPECT_EQ(digests, digests_);
  }
  void expect_scattered() const {
    const auto now = memory_->download();
    const uint64_t page = form_.page_bytes();
    for (uint64_t layer = 0; layer < form_.shape.part.layers(); ++layer) {
      const uint64_t begin = layer * form_.blocks * page;
      const uint64_t half = form_.shape.blocks() * page;
      ASSERT_EQ(std::memcmp(now.data() + begin, cells_.data() + begin, half), 0);
      ASSERT_EQ(std::memcmp(now.data() + begin + half, cells_.data() + begin, half), 0) << "layer " << layer;
    }
  }
  Mapping map(const std::string& path, uint64_t bytes) {
    file_ = std::move(*File::open(path, {.write = true, .create = true}));
    EXPECT_TRUE(file_.truncate(bytes));
    return std::move(*Mapping::map(file_, bytes, true));
  }
  bool registered(uint64_t bytes) const {
    for (int i = 0; i < 5000; ++i, usleep(1000)) {
      if (device_->stats().registered_bytes == bytes) return true;
    }
    return false;
  }

  const TemporaryDirectory directory_{"/dev/shm"};
  CacheForm form_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<DeviceMemory> memory_;
  std::vector<uint8_t> cells_;
  PagedCache cache_;
  std::vector<int32_t> blocks_;  // gathered from
  std::vector<int32_t> to_;
  std::vector<uint64_t> digests_;
  File file_;
};

TEST_F(PayloadTest, OrdinaryMemoryServes) {
  std::vector<std::byte> payload(form_.shape.payload_bytes(), std::byte{0x77});
  ASSERT_TRUE(gather(payload, false));
  expect_twin(payload);
  ASSERT_EQ(scatter(payload, false), ScatterOutcome::ok);
  expect_scattered();
  payload.back() ^= std::byte{1};
  EXPECT_EQ(scatter(payload, false), ScatterOutcome::corrupt);
}

TEST_F(PayloadTest, AStoreDoesNotWaitForAllLoadsThatAreQueued) {
  constexpr size_t kLoads = 200;
  const uint64_t bytes = form_.shape.payload_bytes();
  std::byte* const pinned = device_->slab().allocate(2 * bytes);
  ASSERT_NE(pinned, nullptr);
  std::vector<std::byte> ordinary(2 * bytes);
  for (std::byte* const memory : {pinned, ordinary.data()}) {
    SCOPED_TRACE(memory == pinned ? "pinned" : "ordinary memory");
    ASSERT_TRUE(gather({memory, bytes}, false));
    const ExtentHeader header = header_of_extent();
    std::atomic<size_t> loads_ended = 0;
    std::vector<ScatterWork> loads(kLoads, scatter_of({memory, bytes}, header));
    for (ScatterWork& load : loads) {
      load.owner = &loads_ended;
      load.done = [](ScatterWork* self, ScatterOutcome) {
        ++*static_cast<std::atomic<size_t>*>(self->owner);
      };
      device_->submit(&load);
    }
    EXPECT_TRUE(gather({memory + bytes, bytes}, false));
    EXPECT_LT(loads_ended, kLoads / 2);
    while (loads_ended < kLoads) std::this_thread::yield();
    expect_scattered();
  }
  device_->slab().release(pinned);
}

TEST_F(PayloadTest, ARegisteredMappingServesAcrossTheBordersOfItsChunks) {
  const uint64_t bytes = form_.shape.payload_bytes();
  Mapping mapping = map(directory_.path() + "/segment", 4 * bytes);
  const std::span<std::byte> all(mapping.data(), mapping.size());
  device_->adopt(all, true, 1);
  ASSERT_TRUE(registered(all.size()));
  for (const uint64_t at : {uint64_t{0}, bytes, 2 * bytes, 3 * bytes, bytes / 2, bytes + 4096}) {
    SCOPED_TRACE(at);
    memory_->upload(cells_);
    const auto payload = all.subspan(at, bytes);
    ASSERT_TRUE(gather(payload, true));
    expect_twin(payload);
    ASSERT_EQ(scatter(payload, true), ScatterOutcome::ok);
    expect_scattered();
  }
  device_->release(std::move(mapping));
  EXPECT_TRUE(registered(0));
}

TEST_F(PayloadTest, AMappingIsUsedWhileItIsRegisteredAndReleasedInBetween) {
  const uint64_t bytes = form_.shape.payload_bytes();
  for (int round = 0; round < 3; ++round) {
    Mapping mapping = map(directory_.path() + "/segment", 6 * bytes);
    const std::span<std::byte> all(mapping.data(), mapping.size());
    device_->adopt(all, true, 1);
    for (uint64_t i = 0; i < 6; ++i) {
      ASSERT_TRUE(gather(all.subspan(i * bytes, bytes), true));
      expect_twin(all.subspan(i * bytes, bytes));
    }
    device_->release(std::move(mapping));
  }
  EXPECT_TRUE(registered(0));
}

TEST_F(PayloadTest, AMappingIsRegisteredAlthoughAStepOfTheEngineNeverEnds) {
  const uint64_t bytes = form_.shape.payload_bytes();
  Mapping mapping = map(directory_.path() + "/segment", 4 * bytes);
  const std::span<std::byte> all(mapping.data(), mapping.size());
  device_->engine_step(true);
  device_->adopt(all, true, 1);
  ASSERT_TRUE(gather(all.first(bytes), true));
  expect_twin(all.first(bytes));
  ASSERT_EQ(scatter(all.first(bytes), true), ScatterOutcome::ok);
  expect_scattered();
  EXPECT_TRUE(registered(all.size()));
  device_->release(std::move(mapping));
  EXPECT_TRUE(registered(0));
  device_->engine_step(false);
}

TEST_F(PayloadTest, AGraphThatTheEngineCapturesMeanwhileIsNotSpoilt) {
  const uint64_t bytes = form_.shape.payload_bytes();
  Mapping mapping = map(directory_.path() + "/segment", 2 * bytes);
  const std::span<std::byte> all(mapping.data(), mapping.size());
  std::vector<std::byte> payload(bytes);
  cudaStream_t engine = nullptr;
  must(cudaStreamCreateWithFlags(&engine, cudaStreamNonBlocking));
  must(cudaStreamBeginCapture(engine, cudaStreamCaptureModeGlobal));  // as torch.cuda.graph() does
  device_->adopt(all, true, 1);
  EXPECT_TRUE(registered(all.size()));
  EXPECT_TRUE(gather(all.first(bytes), true));
  EXPECT_EQ(scatter(all.first(bytes), true), ScatterOutcome::ok);
  EXPECT_TRUE(gather(payload, false));
  EXPECT_EQ(scatter(payload, false), ScatterOutcome::ok);
  device_->release(std::move(mapping));
  EXPECT_TRUE(registered(0));
  cudaGraph_t graph = nullptr;
  EXPECT_EQ(cudaStreamEndCapture(engine, &graph), cudaSuccess);
  EXPECT_NE(graph, nullptr);
  if (graph != nullptr) cudaGraphDestroy(graph);
  cudaStreamDestroy(engine);
  expect_twin(payload);
  expect_scattered();
}

TEST_F(PayloadTest, AFileCutShortUnderAnUnregisteredMappingIsGoneAndHarmsNobody) {
  const uint64_t bytes = form_.shape.payload_bytes();
  const Mapping mapping = map(directory_.path() + "/segment", bytes);
  const std::span<std::byte> payload(mapping.data(), bytes);
  ASSERT_TRUE(gather(payload, true));
  ASSERT_TRUE(file_.truncate(bytes / 2));
  EXPECT_EQ(scatter(payload, true), ScatterOutcome::gone);
  EXPECT_FALSE(gather(payload, true));
  ASSERT_TRUE(file_.truncate(bytes));
  ASSERT_TRUE(gather(payload, true));
  expect_twin(payload);
}

TEST_F(PayloadTest, AFileCutShortUnderARegisteredMappingGivesOldBytesOrNone) {
  const uint64_t bytes = form_.shape.payload_bytes();
  Mapping mapping = map(directory_.path() + "/segment", bytes);
  const std::span<std::byte> payload(mapping.data(), bytes);
  device_->adopt(payload, true, 1);
  ASSERT_TRUE(registered(bytes));
  ASSERT_TRUE(gather(payload, true));
  ASSERT_TRUE(file_.truncate(0));
  const ScatterOutcome outcome = scatter(payload, true);
  if (outcome == ScatterOutcome::ok) {
    expect_scattered();
  } else {
    EXPECT_TRUE(memory_->download() == cells_);
  }
  device_->release(std::move(mapping));
  EXPECT_TRUE(registered(0));
}

}  // namespace
}  // namespace tokendepot::testing
