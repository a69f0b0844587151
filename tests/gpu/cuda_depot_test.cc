// A whole depot whose paged cache is in GPU memory: cells survive a restart, marks order, segments are
// registered while they are read.
#include <fcntl.h>
#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <thread>

#include "base/log.h"
#include "cuda_depot_fixture.h"

namespace tokendepot::testing {
namespace {

/// Keeps a stream busy until it is opened, at the latest when it ends.
class Gate {
 public:
  ~Gate() {
    open();
    while (closed_ && !passed_) std::this_thread::sleep_for(1ms);
  }
  void close(cudaStream_t stream) {
    closed_ = true;
    must(cudaLaunchHostFunc(
        stream,
        [](void* self) {
          Gate& gate = *static_cast<Gate*>(self);
          while (!gate.open_) std::this_thread::sleep_for(1ms);
          gate.passed_ = true;
        },
        this));
  }
  void open() { open_ = true; }

 private:
  bool closed_ = false;
  std::atomic<bool> open_ = false;
  std::atomic<bool> passed_ = false;
};

class Stream {
 public:
  Stream() { must(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Stream() {
    cudaStreamSynchronize(stream_);
    cudaStreamDestroy(stream_);
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

class CudaDepotInMemory : public CudaDepot {
 protected:
  void SetUp() override { prepare("/dev/shm", TransportChoice::automatic); }
};

TEST_F(CudaDepotInMemory, ObjectsAreRefusedInWords) {
  const auto depot = open(options());
  ASSERT_NE(depot, nullptr);
  std::vector<std::byte> memory(64);
  const Depot::Object object{ns_, keys_.front(), memory};
  for (const Status& refused : {depot->submit_store_objects(++job_, {&object, 1}),
                                depot->submit_load_objects(++job_, {&object, 1}, 1s)}) {
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().kind, ErrorKind::unsupported);
    EXPECT_NE(refused.error().message.find("device=cuda:0"), std::string::npos) << refused.error().message;
  }
  EXPECT_TRUE(depot->poll().empty());
}

TEST_F(CudaDepotInMemory, WhatItTakesOfGpuAndHostIsToldWhenItIsOpenedAndFollowsTheOptions) {
  std::mutex mutex;
  std::vector<std::string> lines;
  set_log_sink([&](LogLevel, std::string_view line) {
    const std::lock_guard lock(mutex);
    lines.emplace_back(line);
  });
  std::vector<DeviceUse> taken;
  for (const uint32_t threads : {1u, 4u}) {
    Options with = options();
    with.device_threads = threads;
    if (const auto depot = open(with)) taken.push_back(depot->stats().device);
  }
  set_log_sink(nullptr);
  ASSERT_EQ(taken.size(), 2u);
  for (const DeviceUse& use : taken) {
    EXPECT_EQ(use.slab_bytes, options().device_slab_bytes);
    EXPECT_GE(use.pinned_bytes, options().slab_bytes);
    const std::string told =
        fmt::format("device cuda:0: slab of 64 MiB there, {} MiB of host memory pinned, {} threads",
                    use.pinned_bytes >> 20, use.threads);
    EXPECT_EQ(std::ranges::count_if(lines, [&](const std::string& line) { return line.contains(told); }), 1)
        << told;
  }
  const auto roots = std::ranges::count_if(lines, [](const std::string& line) {
    return line.contains(" MiB, all of which may be page-locked for the device, segments of ");
  });
  EXPECT_EQ(roots, 2) << "one root in memory, opened twice";
  EXPECT_EQ(taken[1].threads, taken[0].threads + 3);
  EXPECT_GT(taken[1].pinned_bytes, taken[0].pinned_bytes) << "each thread has memory to copy through";
  EXPECT_LE(taken[1].pinned_bytes, options().slab_bytes + (64ull << 20));
}

class CudaDepotOn : public CudaDepot, public ::testing::WithParamInterface<std::string> {
 protected:
  void SetUp() override {
    if (GetParam() == "cufile") return prepare_cufile();
    prepare(GetParam() == "tmpfs" ? "/dev/shm" : disk(), TransportChoice::automatic);
  }
};

TEST_P(CudaDepotOn, CellsOfAGpuSurviveARestart) {
  {
    const auto depot = open(options());
    ASSERT_NE(depot, nullptr);
    store(*depot);
    EXPECT_EQ(depot->stats().device.name, "cuda:0");
    EXPECT_EQ(depot->stats().device.slab_bytes, options().device_slab_bytes);
    EXPECT_GE(depot->stats().device.pinned_bytes, options().slab_bytes);
  }
  clear();
  const auto depot = open(options());
  ASSERT_NE(depot, nullptr);
  ASSERT_EQ(depot->longest_prefix(keys_, std::span(&want_, 1)), kChunks);
  EXPECT_EQ(load(*depot, 0, kChunks).items_ok, kChunks);
  expect_loaded(0, kChunks);
  const auto now = memory_->download();
  for (uint64_t block = 0; block < kChunks * kBlocksPerChunk; ++block) {
    ASSERT_EQ(block_of(now, block),
              std::vector<uint8_t>(form_.page_bytes() * form_.shape.part.layers(), 0xEE))
        << "block " << block << " was written and not asked for";
  }
}

// A thread that calls the driver without having been bound to its device would make a context of half a
// gigabyte.
TEST_P(CudaDepotOn, ManyThreadsThatHaveMovedBytesTakeNoMemoryOfTheGpu) {
  Options with = options();
  with.io_depth = 64;
  with.device_threads = 16;
  with.roots[0].io = IoChoice::threads;
  size_t before = 0, after = 0, total = 0;
  must(cudaMemGetInfo(&before, &total));
  const auto depot = open(with);
  ASSERT_NE(depot, nullptr);
  store(*depot);
  clear();
  EXPECT_EQ(load(*depot, 0, kChunks).items_ok, kChunks);
  expect_loaded(0, kChunks);
  must(cudaMemGetInfo(&after, &total));
  EXPECT_LT(before - std::min(before, after), with.device_slab_bytes + (50ull << 20));
}

TEST_P(CudaDepotOn, LoadsAreRightBeforeDuringAndAfterRegistration) {
  {
    const auto depot = open(options());
    ASSERT_NE(depot, nullptr);
    store(*depot);
  }
  const auto depot = open(options());
  ASSERT_NE(depot, nullptr);
  bool settled = false;
  for (int round = 0; round < 200 && !settled; ++round) {
    const DeviceUse before = depot->stats().device;
    settled = round >= 3 && before.registered_bytes >= before.mapped_bytes;
    clear();
    ASSERT_EQ(load(*depot, 0, kChunks).items_ok, kChunks) << "round " << round;
    expect_loaded(0, kChunks);
  }
  EXPECT_TRUE(settled) << "mapped segments are registered in the end";
  const DeviceUse use = depot->stats().device;
  if (GetParam() == "tmpfs") {
    EXPECT_GT(use.registered_bytes, 0u);
  } else {
    EXPECT_EQ(use.mapped_bytes, 0u);
  }
}

TEST_P(CudaDepotOn, ABadExtentIsFoundAmongItsNeighboursWhichAreWritten) {
  const auto depot = open(options());
  ASSERT_NE(depot, nullptr);
  store(*depot);
  clear();
  ASSERT_EQ(load(*depot, 0, kChunks).items_ok, kChunks);  // segments are mapped, and registered from now on
  const auto settled = [&] {
    const DeviceUse use = depot->stats().device;
    return use.registered_bytes >= use.mapped_bytes;
  };
  for (int i = 0; i < 5000 && !settled(); ++i) usleep(1000);
  const std::vector<size_t> bad{3, 20, 21, kChunks - 1};
  for (const size_t chunk : bad) {
    const auto plan = plan_chunks(*depot, ns_, keys_, want_, chunk, chunk + 1, 0);
    ASSERT_TRUE(plan);
    const ExtentRef where = plan->items.at(0).where;
    const std::string file = directory_->path() + fmt::format("/root/segments/{:016x}-{:08x}.seg",
                                                              where.segment.writer, where.segment.sequence);
    const int fd = ::open(file.c_str(), O_RDWR | O_CLOEXEC);
    ASSERT_GE(fd, 0) << file;
    const auto at = static_cast<off_t>(where.offset + 4096 + chunk * 512);
    uint8_t byte = 0;
    ASSERT_EQ(pread(fd, &byte, 1, at), 1);
    byte ^= 0x10;
    ASSERT_EQ(pwrite(fd, &byte, 1, at), 1);
    close(fd);
  }
  clear();
  const Completion ended = load(*depot, 0, kChunks);
  std::vector<size_t> failed;
  for (const ItemFailure& failure : ended.failures) {
    EXPECT_EQ(failure.reason, ItemFailure::Reason::corrupt);
    failed.push_back(failure.chunk);
  }
  std::ranges::sort(failed);
  EXPECT_EQ(failed, bad);
  const auto now = memory_->download();
  const std::vector<uint8_t> untouched(form_.page_bytes() * form_.shape.part.layers(), 0xEE);
  for (uint64_t block = 0; block < kChunks * kBlocksPerChunk; ++block) {
    const bool is_bad = std::ranges::find(bad, block / kBlocksPerChunk) != bad.end();
    ASSERT_EQ(block_of(now, kChunks * kBlocksPerChunk + block), is_bad ? untouched : block_of(cells_, block))
        << block;
  }
}

TEST_P(CudaDepotOn, AStoreTakesWhatTheMarkedWorkWrites) {
  const auto depot = open(options());
  ASSERT_NE(depot, nullptr);
  const auto later = random_bytes(form_.bytes(), 2);
  const DeviceMemory source(form_.bytes());
  must(cudaMemcpy(source.data(), later.data(), later.size(), cudaMemcpyHostToDevice));
  const Stream engine;
  Gate gate;
  gate.close(engine.get());
  must(
      cudaMemcpyAsync(memory_->data(), source.data(), source.size(), cudaMemcpyDeviceToDevice, engine.get()));
  ASSERT_TRUE(depot->mark_stream(engine.get()));
  StorePlan plan;
  plan.ns = ns_;
  for (uint32_t i = 0; i < 4; ++i)
    plan.items.push_back(
        {keys_[i], i, 0, iota_blocks(static_cast<int32_t>(i * kBlocksPerChunk), kBlocksPerChunk)});
  ASSERT_TRUE(depot->submit_store(7, plan));
  std::this_thread::sleep_for(200ms);
  EXPECT_TRUE(depot->poll().empty()) << "the cache was read before the engine had written it";
  gate.open();
  EXPECT_TRUE(depot->wait_gathered(10s));
  ASSERT_EQ(wait_for(*depot, 7).items_ok, 4u);
  cells_ = later;
  clear();
  ASSERT_EQ(load(*depot, 0, 4).items_ok, 4u);
  expect_loaded(0, 4);
}

TEST_P(CudaDepotOn, ALoadWritesOnlyWhenTheMarkedWorkHasReadItsBlocks) {
  const auto depot = open(options());
  ASSERT_NE(depot, nullptr);
  store(*depot);
  const DeviceMemory copy(form_.bytes());
  const Stream engine;
  Gate gate;
  gate.close(engine.get());
  must(cudaMemcpyAsync(copy.data(), memory_->data(), copy.size(), cudaMemcpyDeviceToDevice, engine.get()));
  ASSERT_TRUE(depot->mark_stream(engine.get()));
  auto plan = plan_chunks(*depot, ns_, keys_, want_, 0, kChunks, kChunks * kBlocksPerChunk);
  ASSERT_TRUE(plan);
  ASSERT_TRUE(depot->submit_load(500'000, std::move(*plan)));
  std::this_thread::sleep_for(200ms);
  EXPECT_TRUE(depot->poll().empty());
  gate.open();
  EXPECT_EQ(wait_for(*depot, 500'000).items_ok, kChunks);
  must(cudaStreamSynchronize(engine.get()));
  EXPECT_TRUE(copy.download() == cells_) << "the engine read what the load had written";
  expect_loaded(0, kChunks);
}

TEST_P(CudaDepotOn, WorkOfBeforeAMarkDoesNotWaitForIt) {
  const auto depot = open(options());
  ASSERT_NE(depot, nullptr);
  store(*depot);
  const Stream engine;
  Gate gate;
  auto plan = plan_chunks(*depot, ns_, keys_, want_, 0, kChunks, kChunks * kBlocksPerChunk);
  ASSERT_TRUE(plan);
  ASSERT_TRUE(depot->submit_load(500'000, std::move(*plan)));
  gate.close(engine.get());
  ASSERT_TRUE(depot->mark_stream(engine.get()));
  EXPECT_EQ(wait_for(*depot, 500'000).items_ok, kChunks);
  gate.open();
  expect_loaded(0, kChunks);
}

TEST_P(CudaDepotOn, WhatIsHeldIsPlacedIntoAGpu) {
  const auto depot = open(options());
  ASSERT_NE(depot, nullptr);
  store(*depot);
  clear();
  auto plan = plan_chunks(*depot, ns_, keys_, want_, 0, 4, 0);
  ASSERT_TRUE(plan);
  ASSERT_TRUE(depot->submit_hold(500'000, std::move(*plan)));
  ASSERT_EQ(wait_for(*depot, 500'000).items_ok, 4u);
  std::vector<Depot::HeldBlocks> blocks;
  for (uint32_t i = 0; i < 4; ++i)
    blocks.push_back(
        {i, 0, iota_blocks(static_cast<int32_t>((kChunks + i) * kBlocksPerChunk), kBlocksPerChunk)});
  ASSERT_TRUE(depot->place(500'001, 500'000, blocks));
  EXPECT_EQ(wait_for(*depot, 500'001).items_ok, 4u);
  expect_loaded(0, 4);
}

TEST_P(CudaDepotOn, ADeviceSlabThatDoesNotFitIsRefusedByName) {
  Options large = options();
  large.device_slab_bytes = 1ull << 50;
  const auto refused = Depot::open(large);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().kind, ErrorKind::no_space);
  EXPECT_NE(refused.error().message.find("device_slab=1125899906842624"), std::string::npos)
      << refused.error().message;
}

TEST_P(CudaDepotOn, CachesThatTheDeviceCannotServeAreRefusedWhenTheyAreAttached) {
  Options small = options();
  small.device_slab_bytes = 1 << 20;
  const auto depot = Depot::open(small);
  ASSERT_TRUE(depot) << depot.error().message;
  const auto too_large = (*depot)->attach(form_.at(memory_->data()));
  ASSERT_FALSE(too_large);
  EXPECT_NE(too_large.error().message.find("device_slab="), std::string::npos) << too_large.error().message;

  const auto other = Depot::open(options());
  ASSERT_TRUE(other) << other.error().message;
  std::vector<std::byte> host(form_.bytes());
  const auto on_host = (*other)->attach(form_.at(host.data()));
  ASSERT_FALSE(on_host);
  EXPECT_NE(on_host.error().message.find("host memory"), std::string::npos) << on_host.error().message;
}

TEST_P(CudaDepotOn, AStreamUnderCaptureCannotBeMarked) {
  const auto depot = open(options());
  ASSERT_NE(depot, nullptr);
  const Stream engine;
  must(cudaStreamBeginCapture(engine.get(), cudaStreamCaptureModeRelaxed));
  const auto refused = depot->mark_stream(engine.get());
  cudaGraph_t graph = nullptr;
  must(cudaStreamEndCapture(engine.get(), &graph));
  cudaGraphDestroy(graph);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().kind, ErrorKind::busy);
  EXPECT_TRUE(depot->mark_stream(engine.get()));
  EXPECT_TRUE(depot->mark_stream(nullptr));
}

INSTANTIATE_TEST_SUITE_P(Roots, CudaDepotOn, ::testing::Values("tmpfs", "disk", "cufile"),
                         [](const auto& tested) { return tested.param; });

}  // namespace
}  // namespace tokendepot::testing
