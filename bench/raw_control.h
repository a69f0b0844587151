// What a disk gives without a depot: threads of plain O_DIRECT pread and pwrite on one preallocated file.
#pragma once

#include <fcntl.h>

#include <atomic>
#include <memory>
#include <thread>

#include "rig.h"

namespace tokendepot::bench {

/// One preallocated and written file, read and written in blocks of the extents' size.
class RawControl {
 public:
  RawControl(const std::string& base, uint64_t piece, size_t pieces)
      : file_(base + "/tokendepot-bench-raw"), piece_(piece), pieces_(pieces) {
    fd_ = open(file_.c_str(), O_RDWR | O_CREAT | O_DIRECT, 0600);
    if (fd_ < 0) fd_ = open(file_.c_str(), O_RDWR | O_CREAT, 0600);
    if (fd_ < 0 || posix_fallocate(fd_, 0, static_cast<off_t>(piece * pieces)) != 0)
      stop("no space for the raw control");
    run(4, true);
  }
  ~RawControl() {
    close(fd_);
    unlink(file_.c_str());
  }
  RawControl(const RawControl&) = delete;
  RawControl& operator=(const RawControl&) = delete;

  /// GB/s of `depth` threads that touch every piece, again and again until `seconds` are over.
  double run(size_t depth, bool write, double seconds = 0) {
    std::vector<size_t> order(pieces_);
    for (size_t i = 0; i < pieces_; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random_);
    // Buffers are made and touched before the clock starts: the control pays for the disk only.
    while (buffers_.size() < depth) {
      buffers_.emplace_back(static_cast<char*>(std::aligned_alloc(4096, piece_)), &std::free);
      std::memset(buffers_.back().get(), static_cast<int>(buffers_.size()), piece_);
    }
    std::atomic<size_t> next = 0;
    std::atomic<size_t> done = 0;
    std::atomic<bool> failed = false;
    const double begin = now_s();
    std::vector<std::thread> threads;
    for (size_t t = 0; t < depth; ++t) {
      threads.emplace_back([&, t] {
        char* const buffer = buffers_[t].get();
        for (size_t i = next++; i < pieces_ || now_s() - begin < seconds; i = next++) {
          const auto at = static_cast<off_t>(order[i % pieces_] * piece_);
          const ssize_t moved = write ? pwrite(fd_, buffer, piece_, at) : pread(fd_, buffer, piece_, at);
          if (moved != static_cast<ssize_t>(piece_)) failed = true;
          ++done;
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    if (failed) stop("the raw control failed");
    return static_cast<double>(piece_ * done) * 1e-9 / (now_s() - begin);
  }

 private:
  std::string file_;
  uint64_t piece_;
  size_t pieces_;
  int fd_ = -1;
  std::vector<std::unique_ptr<char, void (*)(void*)>> buffers_;
  std::mt19937 random_{5};
};

}  // namespace tokendepot::bench
