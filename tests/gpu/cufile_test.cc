// NVIDIA's cuFile itself between a disk and a GPU, point to point or in compatibility mode, as the machine
// has it.
#include "device/gds/cufile.h"

#include <cstring>
#include <thread>

#include "cuda_depot_fixture.h"
#include "device/cuda/cuda_device.h"

namespace tokendepot::testing {
namespace {

/// Bytes that cuFile carried.
uint64_t carried(const TransferStats& stats) {
  return stats.by_path.gds_p2p + stats.by_path.gds_compat;
}

class CuFileOnAGpu : public CudaDepot {
 protected:
  void SetUp() override { prepare_cufile(); }
};

TEST_F(CuFileOnAGpu, PayloadsGoThroughItByteForByteAndAreCountedByTheWayTheyWent) {
  const auto depot = open(options());
  ASSERT_NE(depot, nullptr);
  store(*depot);
  clear();
  ASSERT_EQ(load(*depot, 0, kChunks).items_ok, kChunks);
  expect_loaded(0, kChunks);
  const DepotStats stats = depot->stats();
  const uint64_t payload = form_.shape.payload_bytes();
  EXPECT_EQ(carried(stats.load), kChunks * payload);
  EXPECT_EQ(carried(stats.store), stats.store.extents * payload);
  EXPECT_EQ(stats.load.by_path.direct, stats.load.bytes - kChunks * payload) << "headers";
  const bool point_to_point = stats.roots[0].transport == "gds-p2p";
  EXPECT_EQ(point_to_point ? stats.load.by_path.gds_compat : stats.load.by_path.gds_p2p, 0u);
  EXPECT_EQ(stats.roots[0].gds_errors, 0u);
  RecordProperty("transport", stats.roots[0].transport);
  RecordProperty("reason", stats.roots[0].reason);
}

TEST_F(CuFileOnAGpu, WhatOneWayStoredTheOtherLoads) {
  for (const TransportChoice first : {TransportChoice::gds, TransportChoice::direct}) {
    directory_ = std::make_unique<TemporaryDirectory>(disk());
    memory_->upload(cells_);
    transport_ = first;
    {
      const auto depot = open(options());
      ASSERT_NE(depot, nullptr);
      store(*depot);
    }
    clear();
    transport_ = first == TransportChoice::gds ? TransportChoice::direct : TransportChoice::gds;
    const auto depot = open(options());
    ASSERT_NE(depot, nullptr);
    ASSERT_EQ(load(*depot, 0, kChunks).items_ok, kChunks);
    expect_loaded(0, kChunks);
    EXPECT_EQ(carried(depot->stats().load) > 0, transport_ == TransportChoice::gds);
  }
}

TEST_F(CuFileOnAGpu, SegmentsAreRecycledUnderIt) {
  Options small = options();
  small.roots[0].capacity_bytes = 128ull << 20;
  const auto depot = open(small);
  ASSERT_NE(depot, nullptr);
  for (uint64_t prompt = 1; prompt <= 3; ++prompt) {
    keys_ = prompt_keys(ns_, prompt, kChunks);
    store(*depot);
  }
  EXPECT_GT(depot->stats().roots[0].evicted_segments, 0u);
  clear();
  ASSERT_EQ(load(*depot, kChunks / 2, kChunks).items_ok, kChunks / 2);
  expect_loaded(kChunks / 2, kChunks);
  EXPECT_EQ(depot->stats().roots[0].gds_errors, 0u);
}

TEST_F(CuFileOnAGpu, RequireGdsOpensPointToPointOrNotAtAll) {
  Options strict = options();
  strict.roots[0].require_gds = true;
  const auto depot = Depot::open(strict);
  if (depot) {
    EXPECT_EQ((*depot)->stats().roots[0].transport, "gds-p2p");
  } else {
    EXPECT_NE(depot.error().message.find("require_gds"), std::string::npos) << depot.error().message;
  }
}

TEST_F(CuFileOnAGpu, TheCallersThreadKeepsTheDeviceThatItHas) {
  int devices = 0;
  must(cudaGetDeviceCount(&devices));
  if (devices < 2) GTEST_SKIP() << "one GPU only";
  must(cudaSetDevice(1));
  int after = -1;
  {
    const auto depot = Depot::open(options());
    EXPECT_TRUE(depot) << depot.error().message;
  }
  must(cudaGetDevice(&after));
  must(cudaSetDevice(0));
  EXPECT_EQ(after, 1);
}

TEST_F(CuFileOnAGpu, ItsSlabIsHalfOfTheDevicesAndComesBack) {
  auto device = make_cuda_device(0, 64ull << 20, 16ull << 20, 1);
  ASSERT_TRUE(device) << device.error().message;
  for (int round = 0; round < 2; ++round) {
    const auto cufile = CuFile::open(**device, CuFile::Compat::allowed);
    ASSERT_TRUE(cufile) << cufile.error().message;
    EXPECT_EQ((*cufile)->slab().size(), 32ull << 20);
    EXPECT_EQ((*cufile)->summary().find("not registered"), std::string::npos) << (*cufile)->summary();
  }
}

// What a write that cuFile failed needs.
TEST(FileSlab, IsCopiedToTheHostByAThreadThatHasNoDevice) {
  SKIP_WITHOUT_GPU();
  constexpr uint64_t kBytes = 3 << 20;
  auto device = make_cuda_device(0, 64ull << 20, 16ull << 20, 1);
  ASSERT_TRUE(device) << device.error().message;
  Slab* const file_slab = (*device)->make_file_slab();
  ASSERT_NE(file_slab, nullptr);
  std::byte* const from = file_slab->allocate(kBytes);
  std::byte* const to = (*device)->slab().allocate(kBytes);
  const auto sent = random_bytes(kBytes, 7);
  must(cudaMemcpy(from, sent.data(), kBytes, cudaMemcpyHostToDevice));
  bool copied = false;
  std::thread([&] { copied = (*device)->copy_from_file_slab(to, from, kBytes); }).join();
  EXPECT_TRUE(copied);
  EXPECT_EQ(std::memcmp(to, sent.data(), kBytes), 0);
  (*device)->slab().release(to);
  file_slab->release(from);
  (*device)->drop_file_slab();
}

class CuFileThatMayRefuse : public CudaDepot {
 protected:
  void SetUp() override { prepare(disk(), TransportChoice::gds); }
};

// As in a container: no library, or no database of disks, without which it registers no file of an ext4.
TEST_F(CuFileThatMayRefuse, WhateverItTakesTheBytesAreTheSameAndTheWayIsTold) {
  const auto depot = open(options());
  ASSERT_NE(depot, nullptr);
  const std::string transport = depot->stats().roots.at(0).transport;
  if (!transport.starts_with("gds") && !transport.starts_with("direct")) GTEST_SKIP() << transport;
  store(*depot);
  clear();
  ASSERT_EQ(load(*depot, 0, kChunks).items_ok, kChunks);
  expect_loaded(0, kChunks);
  const DepotStats stats = depot->stats();
  const RootStats& root = stats.roots.at(0);
  const uint64_t by_cufile = carried(stats.load);
  const uint64_t payloads = kChunks * form_.shape.payload_bytes();
  EXPECT_EQ(by_cufile, root.transport.starts_with("gds") ? payloads : 0);
  EXPECT_EQ(by_cufile + stats.load.by_path.direct, stats.load.bytes);
  EXPECT_FALSE(root.reason.empty());
  std::printf("%s: %s, %llu of %llu bytes by cuFile\n", root.transport.c_str(), root.reason.c_str(),
              static_cast<unsigned long long>(by_cufile), static_cast<unsigned long long>(payloads));
}

}  // namespace
}  // namespace tokendepot::testing
