#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "base/check.h"
#include "base/log.h"
#include "io/engine.h"
#include "io/io_thread.h"
#include "io/operation_queue.h"

namespace tokendepot {
namespace {

int64_t move_file(void* /*context*/, const IoOperation& operation, uint32_t moved) {
  std::byte* const buffer = operation.buffer + moved;
  const size_t wanted = operation.bytes - moved;
  const auto at = static_cast<off_t>(operation.offset + moved);
  const ssize_t result = operation.write ? ::pwrite(operation.fd, buffer, wanted, at)
                                         : ::pread(operation.fd, buffer, wanted, at);
  return result >= 0 ? result : -errno;
}

class ThreadEngine final : public IoEngine {
 public:
  explicit ThreadEngine(const IoMover& mover) : mover_(mover) {}

  /// Once, right after construction. Fewer threads than asked for are slower, not wrong.
  Status start(uint32_t depth) {
    threads_.reserve(depth);
    for (uint32_t i = 0; i < depth; ++i) {
      std::thread thread =
          start_io_thread([](void* self) { static_cast<ThreadEngine*>(self)->work(); }, this, "td-io");
      if (!thread.joinable()) {
        log(LogLevel::warning, "only {} of {} I/O threads could be started", i, depth);
        break;
      }
      threads_.push_back(std::move(thread));
    }
    if (threads_.empty()) return thread_refused("the I/O threads");
    return {};
  }

  ~ThreadEngine() override {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void submit(IoOperation* operation) override {
    // Notified under the lock: once `done` was called the owner may destroy the engine, which waits for the
    // lock.
    const std::lock_guard lock(mutex_);
    queue_.push(operation);
    wake_.notify_one();
  }

  const char* name() const override { return "threads"; }
  uint32_t depth() const override { return static_cast<uint32_t>(threads_.size()); }
  bool completes_in_parallel() const override { return true; }

 private:
  int transfer(const IoOperation& operation) const {
    uint32_t moved = 0;
    while (moved < operation.bytes) {
      const int64_t result = mover_.move(mover_.context, operation, moved);
      if (result > 0) {
        moved += static_cast<uint32_t>(result);
      } else if (result == 0) {
        return operation.write ? EIO : ENODATA;
      } else if (result != -EINTR) {
        return static_cast<int>(-result);
      }
    }
    return 0;
  }

  void work() {
    if (mover_.enter != nullptr) mover_.enter(mover_.context);
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
      if (queue_.empty()) return;
      IoOperation* const operation = queue_.pop();
      lock.unlock();
      operation->done(operation, transfer(*operation));
      lock.lock();
    }
  }

  const IoMover mover_;
  std::mutex mutex_;
  std::condition_variable wake_;
  OperationQueue queue_;   // under mutex_
  bool stopping_ = false;  // under mutex_
  std::vector<std::thread> threads_;
};

}  // namespace

IoMover file_mover() {
  return {.move = move_file};
}

Result<std::unique_ptr<IoEngine>> make_thread_engine(uint32_t depth, const IoMover& mover) {
  TD_CHECK(depth >= 1 && depth <= 128);
  auto engine = std::make_unique<ThreadEngine>(mover);
  if (auto started = engine->start(depth); !started) return std::unexpected(started.error());
  return engine;
}

}  // namespace tokendepot
