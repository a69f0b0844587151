#include <condition_variable>
#include <mutex>
#include <vector>

#include "base/check.h"
#include "io/engine.h"

namespace tokendepot {
namespace {

constexpr uint32_t kPieceBytes = 1u << 20;

/// Counts operations down and keeps the first error.
struct Pass {
  std::mutex mutex;
  std::condition_variable ended;
  size_t left = 0;
  int error = 0;

  void count(int with) {
    const std::lock_guard lock(mutex);
    if (error == 0) error = with;
    if (--left == 0) ended.notify_one();  // under the lock: the waiter owns this object
  }
};

}  // namespace

int move_and_wait(IoEngine& engine, const IoOperation& pattern, std::byte* buffer, uint64_t offset,
                  uint64_t bytes) {
  TD_CHECK(bytes % kPieceBytes == 0);
  Pass pass;
  pass.left = bytes / kPieceBytes;
  std::vector<IoOperation> operations(pass.left, pattern);
  for (size_t i = 0; i < operations.size(); ++i) {
    IoOperation& operation = operations[i];
    operation.buffer = buffer + i * kPieceBytes;
    operation.offset = offset + i * kPieceBytes;
    operation.bytes = kPieceBytes;
    operation.done = [](IoOperation* self, int error) { static_cast<Pass*>(self->owner)->count(error); };
    operation.owner = &pass;
  }
  for (IoOperation& operation : operations) engine.submit(&operation);
  std::unique_lock lock(pass.mutex);
  pass.ended.wait(lock, [&pass] { return pass.left == 0; });
  return pass.error;
}

}  // namespace tokendepot
