#pragma once

#include <gtest/gtest.h>
#include <sys/mount.h>

#include <cstdlib>
#include <filesystem>
#include <iterator>
#include <string>
#include <system_error>

namespace tokendepot {

/// A fresh directory that goes away with its content.
class TemporaryDirectory {
 public:
  explicit TemporaryDirectory(const std::string& parent = ::testing::TempDir()) {
    path_ = parent + (parent.ends_with('/') ? "" : "/") + "tokendepot-test-XXXXXX";
    EXPECT_NE(::mkdtemp(path_.data()), nullptr) << path_;
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  ~TemporaryDirectory() {
    if (mounted_) ::umount2(path_.c_str(), MNT_DETACH);
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }

  /// Puts a file system of its own here, e.g. with "size=1m"; false where the test may not mount.
  bool mount_tmpfs(const char* options, unsigned long flags = 0) {
    mounted_ = ::mount("tmpfs", path_.c_str(), "tmpfs", flags, options) == 0;
    return mounted_;
  }

  const std::string& path() const { return path_; }
  std::string operator/(const std::string& file) const { return path_ + "/" + file; }
  size_t entries() const {
    const std::filesystem::directory_iterator all(path_);
    return static_cast<size_t>(std::distance(begin(all), end(all)));
  }

 private:
  std::string path_;
  bool mounted_ = false;
};

}  // namespace tokendepot
