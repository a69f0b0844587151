// A device that has memory of its own as far as files are concerned, and a fake cuFile to go with it.
#pragma once

#include <dlfcn.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "../fake_cufile/control.h"
#include "device/device.h"
#include "device/host_slab.h"

namespace tokendepot::testing {

/// The host device with a file slab. Payloads there must say so, and others must not.
class GpuLikeDevice final : public Device {
 public:
  explicit GpuLikeDevice(uint64_t file_slab_bytes, std::string name = "cuda:0")
      : name_(std::move(name)), host_(make_host_device(2, 8 << 20).value()), file_slab_(file_slab_bytes) {}

  DeviceUse stats() const override {
    DeviceUse stats = host_->stats();
    stats.name = name_;
    return stats;
  }
  Slab& slab() override { return host_->slab(); }
  void submit(ScatterWork* work) override {
    EXPECT_EQ(work->on_device, in_file_slab(work->payload));
    host_->submit(work);
  }
  void submit(GatherWork* work) override {
    EXPECT_EQ(work->on_device, in_file_slab(work->payload));
    host_->submit(work);
  }
  Slab* make_file_slab() override {
    EXPECT_FALSE(std::exchange(has_file_slab_, true));
    return &file_slab_;
  }
  void drop_file_slab() override { EXPECT_TRUE(std::exchange(has_file_slab_, false)); }
  bool copy_from_file_slab(std::byte* to, const std::byte* from, uint64_t bytes) override {
    EXPECT_TRUE(in_file_slab({from, bytes}));
    EXPECT_FALSE(in_file_slab({to, bytes}));
    ++copies;
    if (before_copy) before_copy();
    if (fail_copies) return false;
    std::memcpy(to, from, bytes);
    return true;
  }
  void enter_thread() override {
    ++entered;
    EXPECT_NE(std::this_thread::get_id(), made_on_) << "the engine's thread keeps the device that it has";
  }

  std::atomic<int> copies = 0;  // from the file slab to the host's
  std::atomic<bool> fail_copies = false;
  std::function<void()> before_copy;
  inline static std::atomic<int> entered = 0;

 private:
  bool in_file_slab(std::span<const std::byte> payload) const {
    return payload.data() >= file_slab_.base() && payload.data() < file_slab_.base() + file_slab_.size();
  }

  const std::string name_;
  std::unique_ptr<Device> host_;
  HostSlab file_slab_;
  bool has_file_slab_ = false;
  const std::thread::id made_on_ = std::this_thread::get_id();
};

/// The control of a fake cuFile, as new.
inline FakeCuFileControl& fresh_fake(const char* library = FAKE_CUFILE_WHOLE) {
  void* const opened = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  EXPECT_NE(opened, nullptr) << library;
  reinterpret_cast<FakeCuFileResetCall>(dlsym(opened, "fake_cufile_reset"))();
  return *reinterpret_cast<FakeCuFileControlCall>(dlsym(opened, "fake_cufile_control"))();
}

}  // namespace tokendepot::testing
