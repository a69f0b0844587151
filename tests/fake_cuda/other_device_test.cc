// Threads of an engine on which another GPU is current than the depot's.
#include <gtest/gtest.h>

#include <thread>

#include "device/cuda/cuda_device.h"
#include "fake_cuda/faults.h"
#include "gpu/device_memory.h"
#include "unit/depot_fixture.h"

namespace tokendepot::testing {
namespace {

class OtherDevice : public ::testing::Test {
 protected:
  void SetUp() override {
    auto made = make_cuda_device(1, 32ull << 20, 64ull << 20, 2);
    ASSERT_TRUE(made) << made.error().message;
    device_ = std::move(*made);
    std::thread([this] {  // as the engine's thread that owns the cache
      cudaSetDevice(1);
      memory_ = std::make_unique<DeviceMemory>(form_.bytes());
    })
        .join();
    cache_ = form_.at(memory_->data());
  }
  void TearDown() override { fake_cuda::stop_failing(); }

  CacheForm form_{.shape = small_shape({0, 4, 0, 2}), .blocks = 64};
  std::unique_ptr<Device> device_;
  std::unique_ptr<DeviceMemory> memory_;
  PagedCache cache_;
};

TEST_F(OtherDevice, NoneBecomesCurrentOnAThreadThatMarksAStreamOrBringsACache) {
  std::thread([&] {
    EXPECT_TRUE(device_->accept(cache_));
    const auto first = device_->mark(nullptr), second = device_->mark(nullptr);
    ASSERT_TRUE(first && second);
    EXPECT_LT(*first, *second);
    int current = -1;
    cudaGetDevice(&current);
    EXPECT_EQ(current, 0);
    EXPECT_EQ(fake_cuda::devices_set(), 0u);
  }).join();
}

TEST_F(OtherDevice, TheThreadsOwnDefaultStreamIsRefusedForItIsNotOneOfTheDevices) {
  std::thread([&] {
    const auto refused = device_->mark(cudaStreamPerThread);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().kind, ErrorKind::invalid_argument);
    EXPECT_NE(refused.error().message.find("cuda:1"), std::string::npos);
  }).join();
}

TEST_F(OtherDevice, ADriverThatDoesNotLetTheDeviceBeEnteredIsTold) {
  std::thread([&] {
    fake_cuda::fail("cudaSetDevice", 1, cudaErrorDevicesUnavailable,
                    1000);  // the device's threads call it, too
    EXPECT_FALSE(device_->accept(cache_));
    const auto refused = device_->mark(nullptr);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().kind, ErrorKind::io);
    fake_cuda::stop_failing();
    EXPECT_TRUE(device_->mark(nullptr)) << "the next one";
  }).join();
}

}  // namespace
}  // namespace tokendepot::testing
