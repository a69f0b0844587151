#include <liburing.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <mutex>
#include <semaphore>
#include <string>
#include <thread>
#include <vector>

#include "base/check.h"
#include "base/errors.h"
#include "base/log.h"
#include "io/engine.h"
#include "io/io_thread.h"
#include "io/kernel_file.h"
#include "io/operation_queue.h"

namespace tokendepot {
namespace {

constexpr uint64_t kWakeTag = ~uint64_t{0};
constexpr uint32_t kMostEagain = 16;

constexpr unsigned ring_entries(uint32_t depth) {
  return depth + 1;
}  // one for the wake-up

void nap() {
  const timespec pause{.tv_sec = 0, .tv_nsec = 1'000'000};
  ::nanosleep(&pause, nullptr);
}

// One thread owns the ring: it alone submits and reaps, which is what SINGLE_ISSUER asks for and spares all
// locking around the ring. Other threads put operations into `incoming_` and wake it through an eventfd that
// the ring reads.
class UringEngine final : public IoEngine {
 public:
  explicit UringEngine(uint32_t depth) : slots_(depth) {
    free_.reserve(depth);
    for (uint32_t i = depth; i > 0; --i) free_.push_back(i - 1);
  }

  // Zero, or the errno that the kernel refused with. Once, right after construction.
  int start() {
    event_ = ::eventfd(0, EFD_CLOEXEC);
    if (event_ < 0) return errno;
    thread_ = start_io_thread([](void* self) { static_cast<UringEngine*>(self)->run(); }, this, "td-io");
    if (!thread_.joinable()) return EAGAIN;
    started_.acquire();
    return start_error_;
  }

  ~UringEngine() override {
    if (thread_.joinable()) {
      {
        const std::lock_guard lock(mutex_);
        stopping_ = true;
      }
      wake();
      thread_.join();
    }
    if (event_ >= 0) ::close(event_);
  }

  void submit(IoOperation* operation) override {
    // All under the lock: once `done` was called the owner may destroy the engine, which waits for the lock.
    const std::lock_guard lock(mutex_);
    const bool first = incoming_.empty();
    incoming_.push(operation);
    // Behind another one the thread is awake or about to be; the thread itself looks before it sleeps.
    if (first && std::this_thread::get_id() != thread_.get_id()) wake();
  }

  const char* name() const override { return "uring"; }
  uint32_t depth() const override { return static_cast<uint32_t>(slots_.size()); }
  bool completes_in_parallel() const override { return false; }

 private:
  struct Slot {
    IoOperation* operation = nullptr;
    uint32_t moved = 0;
    uint32_t eagain = 0;  // answers in a row
  };

  void wake() {
    const uint64_t one = 1;
    while (::write(event_, &one, sizeof(one)) < 0 && errno == EINTR) {
    }
  }

  void run() {
    start_error_ = open_ring();
    const bool usable = start_error_ == 0;
    started_.release();
    if (!usable) return;
    while (take_incoming()) {
      enter();
      reap();
    }
    io_uring_queue_exit(&ring_);
  }

  // liburing reports errors as negative return values; errno is not set.
  int open_ring() {
    const unsigned entries = ring_entries(static_cast<uint32_t>(slots_.size()));
    int result = -EINVAL;
    for (const unsigned flags :
         {IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN, unsigned{IORING_SETUP_COOP_TASKRUN}, 0u}) {
      result = io_uring_queue_init(entries, &ring_, flags);
      if (result != -EINVAL) break;
    }
    if (result < 0) return -result;
    // Setup may pass where entering or plain reads do not (seccomp, kernels before 5.6): move one wake-up for
    // real.
    wake();
    arm_wake();
    io_uring_cqe* done = nullptr;
    do {
      result = io_uring_submit_and_wait(&ring_, 1);
    } while (result == -EINTR);
    if (result >= 0) result = io_uring_peek_cqe(&ring_, &done);
    if (result >= 0 && done->res != static_cast<int>(sizeof(wake_count_))) {
      result = done->res < 0 ? done->res : -EIO;
    }
    if (result < 0) {
      io_uring_queue_exit(&ring_);
      return -result;
    }
    io_uring_cqe_seen(&ring_, done);
    arm_wake();
    return 0;
  }

  io_uring_sqe* next_sqe() {
    io_uring_sqe* const sqe = io_uring_get_sqe(&ring_);
    TD_CHECK(sqe != nullptr);  // the ring has an entry for every slot and the wake-up
    return sqe;
  }

  void arm_wake() {
    io_uring_sqe* const sqe = next_sqe();
    io_uring_prep_read(sqe, event_, &wake_count_, sizeof(wake_count_), 0);
    io_uring_sqe_set_data64(sqe, kWakeTag);
  }

  // Prepares as much as there are slots. False when the engine is stopping and everything is done.
  bool take_incoming() {
    for (;;) {
      bool stopping;
      {
        const std::lock_guard lock(mutex_);
        pending_.append(incoming_);
        stopping = stopping_;
      }
      while (!pending_.empty() && !free_.empty()) {
        IoOperation* const operation = pending_.pop();
        if (operation->bytes == 0) {
          operation->done(operation, 0);
          continue;
        }
        const uint32_t index = free_.back();
        free_.pop_back();
        slots_[index] = {operation, 0, 0};
        prepare(index);
      }
      if (free_.size() < slots_.size()) return true;
      const std::lock_guard lock(mutex_);
      if (incoming_.empty()) return !stopping;
    }
  }

  void prepare(uint32_t index) {
    const Slot& slot = slots_[index];
    const IoOperation& operation = *slot.operation;
    io_uring_sqe* const sqe = next_sqe();
    std::byte* const buffer = operation.buffer + slot.moved;
    const uint32_t bytes = operation.bytes - slot.moved;
    const uint64_t offset = operation.offset + slot.moved;
    if (operation.write) {
      io_uring_prep_write(sqe, operation.fd, buffer, bytes, offset);
    } else {
      io_uring_prep_read(sqe, operation.fd, buffer, bytes, offset);
    }
    // A file that cannot do it without blocking answers EAGAIN; a kernel worker may block.
    if (slot.eagain > 0) io_uring_sqe_set_flags(sqe, IOSQE_ASYNC);
    io_uring_sqe_set_data64(sqe, index);
  }

  void enter() {
    const int result = io_uring_submit_and_wait(&ring_, 1);
    if (result >= 0 || result == -EINTR) return;
    // Out of kernel memory or completion space for the moment. What was not submitted stays in the ring and
    // goes with the next attempt.
    if (!complained_) log(LogLevel::warning, "io_uring_enter: {}; trying again", std::strerror(-result));
    complained_ = true;
    nap();
  }

  void reap() {
    io_uring_cqe* cqe = nullptr;
    while (io_uring_peek_cqe(&ring_, &cqe) == 0) {
      const uint64_t tag = io_uring_cqe_get_data64(cqe);
      const int result = cqe->res;
      io_uring_cqe_seen(&ring_, cqe);
      if (tag == kWakeTag) {
        arm_wake();
      } else {
        advance(static_cast<uint32_t>(tag), result);
      }
    }
  }

  void advance(uint32_t index, int result) {
    Slot& slot = slots_[index];
    if (result > 0) {
      slot.moved += static_cast<uint32_t>(result);
      slot.eagain = 0;
      if (slot.moved < slot.operation->bytes) return prepare(index);
      return finish(index, 0);
    }
    if (result == -EINTR) return prepare(index);
    if (result == -EAGAIN && slot.eagain < kMostEagain) {
      ++slot.eagain;
      return prepare(index);
    }
    if (result == 0) return finish(index, slot.operation->write ? EIO : ENODATA);
    finish(index, -result);
  }

  void finish(uint32_t index, int error) {
    IoOperation* const operation = slots_[index].operation;
    slots_[index].operation = nullptr;
    free_.push_back(index);
    operation->done(operation, error);
  }

  std::mutex mutex_;
  OperationQueue incoming_;  // under mutex_
  bool stopping_ = false;    // under mutex_

  // The thread's own.
  io_uring ring_{};
  OperationQueue pending_;
  std::vector<Slot> slots_;
  std::vector<uint32_t> free_;
  uint64_t wake_count_ = 0;
  bool complained_ = false;

  int event_ = -1;
  int start_error_ = 0;
  std::binary_semaphore started_{0};
  std::thread thread_;
};

// " (kernel.io_uring_disabled=2)", or nothing on kernels without the setting.
std::string disabled_setting() {
  const auto setting = number_in(kernel_text("/proc/sys/kernel/io_uring_disabled"));
  return setting ? fmt::format(" (kernel.io_uring_disabled={})", *setting) : std::string();
}

// Many kernels count the rings themselves, without any registered buffer, as locked memory of the user.
std::string locked_memory(uint32_t depth) {
  rlimit limit{};
  ::getrlimit(RLIMIT_MEMLOCK, &limit);
  return fmt::format(" (a ring of depth {} may need {} bytes of the user's memlock limit of {})", depth,
                     io_uring_mlock_size(ring_entries(depth), 0), limit.rlim_cur);
}

}  // namespace

Result<std::unique_ptr<IoEngine>> make_uring_engine(uint32_t depth) {
  TD_CHECK(depth >= 1 && depth <= 128);
  auto engine = std::make_unique<UringEngine>(depth);
  if (const int error = engine->start(); error != 0) {
    if (error == EAGAIN) return thread_refused("io_uring's thread");
    const ErrorKind kind = error == EPERM || error == EACCES ? ErrorKind::permission : ErrorKind::unsupported;
    return std::unexpected(Error{kind, error,
                                 fmt::format("io_uring: {}{}", std::strerror(error),
                                             error == ENOMEM ? locked_memory(depth) : disabled_setting())});
  }
  return engine;
}

}  // namespace tokendepot
