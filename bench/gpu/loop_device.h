// A disk as fast as memory: ext4 on a loop device whose file lies in a memory file system. Needs root.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace tokendepot::bench {

class LoopDevice {
 public:
  /// A file of `bytes` in `base`, mounted. nullptr where that is not possible; `why_not` is then the failed
  /// command and its words.
  static std::unique_ptr<LoopDevice> make(const std::string& base, uint64_t bytes, std::string& why_not);
  ~LoopDevice();
  LoopDevice(const LoopDevice&) = delete;
  LoopDevice& operator=(const LoopDevice&) = delete;

  std::string mount_point() const { return directory_ + "/mounted"; }

 private:
  LoopDevice() = default;
  void record();

  std::string directory_;
  std::string device_;
  std::string record_;  // in udev's database; empty where udev made one itself
  bool mounted_ = false;
};

}  // namespace tokendepot::bench
