// The host device, and what it was told about mappings and marks.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "device/device.h"

namespace tokendepot::testing {

/// Fails the test when a range is adopted while it is adopted already, or released without having been.
class RecordingDevice final : public Device {
 public:
  explicit RecordingDevice(uint64_t slab_bytes = 8 << 20) : host_(make_host_device(2, slab_bytes).value()) {}
  ~RecordingDevice() override { EXPECT_TRUE(adopted_.empty()) << "mappings are left"; }

  struct Adopted {
    uint64_t bytes = 0;
    bool writable = false;
    uint64_t heat = 0;
  };

  DeviceUse stats() const override { return host_->stats(); }
  Slab& slab() override { return slab_; }
  /// Bytes of the slab that were in use at once, at most.
  uint64_t most_staged() const { return slab_.most; }
  void forget_most_staged() { slab_.most = 0; }
  void submit(ScatterWork* work) override {
    note(scatter_marks_, work->after);
    if (broken_) return work->done(work, ScatterOutcome::failed);
    {
      const std::lock_guard lock(mutex_);
      if (holds_) return held_.push_back(work);
    }
    host_->submit(work);
  }
  /// What is to be scattered waits until it is let go, in its order.
  void hold_scatters() {
    const std::lock_guard lock(mutex_);
    holds_ = true;
  }
  size_t held_scatters() const {
    const std::lock_guard lock(mutex_);
    return held_.size();
  }
  void let_scatters_go() {
    std::vector<ScatterWork*> held;
    {
      const std::lock_guard lock(mutex_);
      holds_ = false;
      held.swap(held_);
    }
    for (ScatterWork* const work : held) host_->submit(work);
  }
  void submit(GatherWork* work) override {
    note(gather_marks_, work->after);
    {
      const std::lock_guard lock(mutex_);
      if (holds_gathers_) return held_gathers_.push_back(work);
    }
    if (broken_) return work->done(work, false);
    host_->submit(work);
  }
  /// What is to be gathered waits until it is let go.
  void hold_gathers() {
    const std::lock_guard lock(mutex_);
    holds_gathers_ = true;
  }
  size_t held_gathers() const {
    const std::lock_guard lock(mutex_);
    return held_gathers_.size();
  }
  void let_gathers_go() {
    std::vector<GatherWork*> held;
    {
      const std::lock_guard lock(mutex_);
      holds_gathers_ = false;
      held.swap(held_gathers_);
    }
    for (GatherWork* const work : held) host_->submit(work);
  }
  /// While it is broken all work fails, as after an error of a driver that stays.
  void break_down(bool broken) { broken_ = broken; }
  Result<uint64_t> mark(void*) override {
    const std::lock_guard lock(mutex_);
    return ++last_mark_;
  }
  bool registers_mappings() const override { return true; }
  void adopt(std::span<std::byte> mapping, bool writable, uint64_t heat) override {
    const std::lock_guard lock(mutex_);
    const bool fresh = adopted_.try_emplace(mapping.data(), mapping.size(), writable, heat).second;
    EXPECT_TRUE(fresh) << "adopted twice";
    heats_.push_back(heat);
  }
  void release(Mapping mapping) override {
    const std::lock_guard lock(mutex_);
    EXPECT_EQ(adopted_.erase(mapping.data()), 1u) << "released without having been adopted";
    EXPECT_TRUE(mapping.is_mapped());
    ++released_;
  }

  std::map<std::byte*, Adopted> adopted() const {
    const std::lock_guard lock(mutex_);
    return adopted_;
  }
  uint64_t adopted_bytes() const {
    uint64_t total = 0;
    for (const auto& [at, range] : adopted()) total += range.bytes;
    return total;
  }
  std::vector<uint64_t> heats() const {
    const std::lock_guard lock(mutex_);
    return heats_;
  }
  size_t releases() const {
    const std::lock_guard lock(mutex_);
    return released_;
  }
  std::vector<uint64_t> take_scatter_marks() { return take(scatter_marks_); }
  std::vector<uint64_t> take_gather_marks() { return take(gather_marks_); }

 private:
  struct CountingSlab final : Slab {
    explicit CountingSlab(Slab& of) : slab(of) {}
    std::byte* allocate(uint64_t bytes) override {
      std::byte* const range = slab.allocate(bytes);
      const std::lock_guard lock(mutex);
      if (range != nullptr) used += sizes[range] = bytes;
      most = std::max<uint64_t>(most, used);
      return range;
    }
    void release(std::byte* range) override {
      {
        const std::lock_guard lock(mutex);
        used -= sizes.at(range);
        sizes.erase(range);
      }
      slab.release(range);
    }
    uint64_t size() const override { return slab.size(); }
    std::byte* base() const override { return slab.base(); }

    Slab& slab;
    std::mutex mutex;
    std::map<std::byte*, uint64_t> sizes;
    uint64_t used = 0;
    std::atomic<uint64_t> most = 0;
  };

  void note(std::vector<uint64_t>& marks, uint64_t mark) {
    const std::lock_guard lock(mutex_);
    marks.push_back(mark);
  }
  std::vector<uint64_t> take(std::vector<uint64_t>& marks) {
    const std::lock_guard lock(mutex_);
    return std::exchange(marks, {});
  }

  std::atomic<bool> broken_ = false;
  mutable std::mutex mutex_;
  std::map<std::byte*, Adopted> adopted_;
  std::vector<uint64_t> heats_;
  bool holds_ = false;
  std::vector<ScatterWork*> held_;
  bool holds_gathers_ = false;
  std::vector<GatherWork*> held_gathers_;
  size_t released_ = 0;
  uint64_t last_mark_ = 0;
  std::vector<uint64_t> scatter_marks_;
  std::vector<uint64_t> gather_marks_;
  std::unique_ptr<Device> host_;
  CountingSlab slab_{host_->slab()};
};

}  // namespace tokendepot::testing
