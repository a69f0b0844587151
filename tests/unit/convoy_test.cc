// Which loads share a copy to a CUDA device, and which stores one from it.
#include "device/cuda/convoy.h"

#include <gtest/gtest.h>

#include <vector>

namespace tokendepot::testing {
namespace {

using cuda::convoy_length;
using cuda::kMostConvoy;
using cuda::kMostGap;

constexpr uint64_t kExtent = 64 << 10;
constexpr uint64_t kAll = 1ull << 40;

/// Works on payloads in one stretch of memory.
class ConvoyTest : public ::testing::Test {
 protected:
  void add(uint64_t at, uint64_t bytes = kExtent, bool on_device = false) {
    ScatterWork work;
    work.payload = {memory_ + at, bytes};
    work.on_device = on_device;
    works_.push_back(work);
  }
  size_t length(size_t most = 100, uint64_t most_bytes = kAll) {
    std::deque<ScatterWork*> queue;
    for (ScatterWork& work : works_) queue.push_back(&work);
    return convoy_length(queue, most, most_bytes);
  }
  // Never read: only where payloads lie is asked.
  std::byte* const memory_ = reinterpret_cast<std::byte*>(uint64_t{1} << 40);
  std::vector<ScatterWork> works_;
};

TEST_F(ConvoyTest, NeighboursShareACopyAcrossTheHeadersBetweenThem) {
  for (uint64_t i = 0; i < 5; ++i) add(i * (kExtent + 4096));
  EXPECT_EQ(length(), 5u);
}

TEST_F(ConvoyTest, AGapOrAStepBackEndsIt) {
  add(0);
  add(kExtent + kMostGap);
  add(2 * kExtent + 2 * kMostGap + 1);
  EXPECT_EQ(length(), 2u);
  works_.resize(1);
  add(0);
  EXPECT_EQ(length(), 1u);
  works_.resize(1);
  add(kExtent - 1);
  EXPECT_EQ(length(), 1u) << "overlapping";
}

TEST_F(ConvoyTest, ItsBoundsAreWorksBytesAndFreeFlights) {
  for (uint64_t i = 0; i < 2 * kMostConvoy; ++i) add(i * kExtent);
  EXPECT_EQ(length(), kMostConvoy);
  EXPECT_EQ(length(3), 3u);
  EXPECT_EQ(length(100, 4 * kExtent), 4u);
  EXPECT_EQ(length(100, 4 * kExtent - 1), 3u);
  EXPECT_EQ(length(100, 1), 1u) << "a large extent goes alone";
}

TEST_F(ConvoyTest, WhatIsOnTheDeviceAlreadyGoesAlone) {
  add(0, kExtent, true);
  add(kExtent);
  EXPECT_EQ(length(), 1u);
  works_.erase(works_.begin());
  add(2 * kExtent, kExtent, true);
  EXPECT_EQ(length(), 1u);
}

/// Stores into one stretch of memory; caches of two sizes.
class StoreConvoyTest : public ::testing::Test {
 protected:
  StoreConvoyTest() {
    large_.shape.part = {0, 1, 0, 1};
    large_.shape.tokens = 256;
    large_.shape.block_tokens = 16;
    large_.shape.row_bytes = 256;
    small_ = large_;
    small_.shape.tokens = 128;
  }
  uint64_t bytes() const { return large_.shape.payload_bytes(); }
  void add(uint64_t at, bool on_device = false, bool small = false) {
    GatherWork work;
    work.cache = small ? &small_ : &large_;
    work.payload = {memory_ + at, work.cache->shape.payload_bytes()};
    work.on_device = on_device;
    works_.push_back(work);
  }
  size_t length(size_t most = 100, uint64_t most_bytes = kAll) {
    std::deque<GatherWork*> queue;
    for (GatherWork& work : works_) queue.push_back(&work);
    return convoy_length(queue, most, most_bytes);
  }
  std::byte* const memory_ = reinterpret_cast<std::byte*>(uint64_t{1} << 40);  // never read, as above
  PagedCache large_, small_;
  std::vector<GatherWork> works_;
};

TEST_F(StoreConvoyTest, RowsOfOnePitchShareACopy) {
  for (uint64_t i = 0; i < 5; ++i) add(i * (bytes() + 4096));
  EXPECT_EQ(length(), 5u);
}

TEST_F(StoreConvoyTest, AnotherGapAStepBackOrAnotherSizeEndsIt) {
  add(0);
  add(bytes() + 4096);
  add(2 * bytes() + 3 * 4096);
  EXPECT_EQ(length(), 2u) << "a wider gap";
  works_.pop_back();
  add(4096);
  EXPECT_EQ(length(), 2u) << "a step back";
  works_.pop_back();
  add(2 * (bytes() + 4096), false, true);
  EXPECT_EQ(length(), 2u) << "a smaller extent";
  works_.resize(1);
  add(bytes() - 4096);
  EXPECT_EQ(length(), 1u) << "overlapping";
  works_.resize(1);
  add(bytes() + kMostGap + 4096);
  EXPECT_EQ(length(), 1u) << "too far away";
}

TEST_F(StoreConvoyTest, ItsBoundsAreWorksBytesAndFreeFlights) {
  for (uint64_t i = 0; i < 2 * kMostConvoy; ++i) add(i * bytes());
  EXPECT_EQ(length(), kMostConvoy);
  EXPECT_EQ(length(3), 3u);
  EXPECT_EQ(length(1), 1u);
  EXPECT_EQ(length(100, 4 * bytes()), 4u);
  EXPECT_EQ(length(100, 4 * bytes() - 1), 3u);
  EXPECT_EQ(length(100, 1), 1u) << "a large extent goes alone";
}

TEST_F(StoreConvoyTest, WhatStaysOnTheDeviceGoesAlone) {
  add(0, true);
  add(bytes());
  EXPECT_EQ(length(), 1u);
  works_.erase(works_.begin());
  add(2 * bytes(), true);
  EXPECT_EQ(length(), 1u);
}

}  // namespace
}  // namespace tokendepot::testing
