// What a disk gives without a depot: plain O_DIRECT reads and writes of one preallocated file.
#pragma once

#include <fcntl.h>
#include <liburing.h>
#include <sys/mman.h>

#include <atomic>
#include <memory>
#include <thread>

#include "rig.h"

namespace tokendepot::bench {

enum class Pages : uint8_t { plain, huge };

/// Touched memory, as malloc gives it or asked for in pages of 2 MiB.
class Buffer {
 public:
  Buffer(uint64_t bytes, Pages pages) : mapped_(bytes + kHugePage) {
    memory_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory_ == MAP_FAILED) stop("no memory for the raw control");
    if (pages == Pages::huge) madvise(memory_, mapped_, MADV_HUGEPAGE);
    data_ = static_cast<char*>(memory_) + -reinterpret_cast<uintptr_t>(memory_) % kHugePage;
    std::memset(data_, 1, bytes);
  }
  ~Buffer() { munmap(memory_, mapped_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  char* data() const { return data_; }

 private:
  static constexpr uint64_t kHugePage = 2ull << 20;
  uint64_t mapped_;
  void* memory_;
  char* data_;
};

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
  double run(size_t depth, bool write, Pages pages = Pages::plain, double seconds = 0) {
    // Buffers are made and touched before the clock starts: the control pays for the disk only.
    auto& buffers = pages == Pages::plain ? plain_ : huge_;
    while (buffers.size() < depth) buffers.push_back(std::make_unique<Buffer>(piece_, pages));
    const std::vector<size_t> order = shuffled();
    std::atomic<size_t> next = 0;
    std::atomic<size_t> done = 0;
    std::atomic<bool> failed = false;
    const double begin = now_s();
    std::vector<std::thread> threads;
    for (size_t t = 0; t < depth; ++t) {
      threads.emplace_back([&, t] {
        char* const buffer = buffers[t]->data();
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

  /// GB/s of one thread that reads block after block, each through io_uring in parts of `part` bytes at once,
  /// into huge pages; 0 where there is no io_uring.
  double run_split(uint64_t part) {
    if (huge_.empty()) huge_.push_back(std::make_unique<Buffer>(piece_, Pages::huge));
    char* const buffer = huge_.front()->data();
    const auto parts = static_cast<unsigned>((piece_ + part - 1) / part);
    io_uring ring{};
    if (io_uring_queue_init(parts, &ring, 0) != 0) return 0;
    const double begin = now_s();
    for (const size_t block : shuffled()) {
      for (uint64_t at = 0; at < piece_; at += part) {
        const auto bytes = static_cast<unsigned>(std::min(part, piece_ - at));
        io_uring_sqe* const entry = io_uring_get_sqe(&ring);
        io_uring_prep_read(entry, fd_, buffer + at, bytes, block * piece_ + at);
        io_uring_sqe_set_data64(entry, bytes);
      }
      if (io_uring_submit(&ring) != static_cast<int>(parts)) stop("the raw split control failed");
      for (unsigned i = 0; i < parts; ++i) {
        io_uring_cqe* done = nullptr;
        if (io_uring_wait_cqe(&ring, &done) != 0 || done->res != static_cast<int>(done->user_data))
          stop("the raw split control failed");
        io_uring_cqe_seen(&ring, done);
      }
    }
    const double took = now_s() - begin;
    io_uring_queue_exit(&ring);
    return static_cast<double>(piece_ * pieces_) * 1e-9 / took;
  }

 private:
  std::vector<size_t> shuffled() {
    std::vector<size_t> order(pieces_);
    for (size_t i = 0; i < pieces_; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random_);
    return order;
  }

  std::string file_;
  uint64_t piece_;
  size_t pieces_;
  int fd_ = -1;
  std::vector<std::unique_ptr<Buffer>> plain_;
  std::vector<std::unique_ptr<Buffer>> huge_;
  std::mt19937 random_{5};
};

}  // namespace tokendepot::bench
