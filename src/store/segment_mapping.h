// A mapped segment that the device knows of.
#pragma once

#include <utility>

#include "device/device.h"
#include "io/mapping.h"

namespace tokendepot {

/// Tells the device when it is made, and gives the mapping back to it instead of unmapping it: however it
/// ends, no range that is registered is ever unmapped. Move-only.
class SegmentMapping {
 public:
  /// For segments that are needed at once; the heat of others is when they were last used.
  static constexpr uint64_t kHottest = UINT64_MAX;

  SegmentMapping() = default;
  /// `device` may be null.
  SegmentMapping(Mapping mapping, bool writable, Device* device, uint64_t heat)
      : mapping_(std::move(mapping)), writable_(writable), device_(device) {
    if (device_ != nullptr) device_->adopt({mapping_.data(), mapping_.size()}, writable, heat);
  }
  SegmentMapping(SegmentMapping&& other) noexcept
      : mapping_(std::move(other.mapping_)),
        writable_(other.writable_),
        device_(std::exchange(other.device_, nullptr)) {}
  SegmentMapping& operator=(SegmentMapping&& other) noexcept {
    if (this != &other) {
      give_back();
      mapping_ = std::move(other.mapping_);
      writable_ = other.writable_;
      device_ = std::exchange(other.device_, nullptr);
    }
    return *this;
  }
  ~SegmentMapping() { give_back(); }

  std::byte* data() const { return mapping_.data(); }
  uint64_t size() const { return mapping_.size(); }
  bool is_mapped() const { return mapping_.is_mapped(); }
  bool writable() const { return writable_; }
  void populate() const { mapping_.populate(); }

 private:
  void give_back() {
    if (device_ != nullptr) std::exchange(device_, nullptr)->release(std::move(mapping_));
  }

  Mapping mapping_;
  bool writable_ = false;
  Device* device_ = nullptr;
};

}  // namespace tokendepot
