#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <vector>

#include "base/check.h"
#include "io/engine.h"

namespace tokendepot {
namespace {

constexpr uint32_t kPieceBytes = 1u << 20;

/// Counts operations down, keeps the first error, and submits the next operation for each that ended.
struct Pass {
  IoEngine& engine;
  std::vector<IoOperation> operations;
  std::mutex mutex = {};
  std::condition_variable ended = {};
  size_t submitted = 0;
  size_t left = 0;
  int error = 0;

  void count(int with) {
    IoOperation* following = nullptr;
    {
      const std::lock_guard lock(mutex);
      if (error == 0) error = with;
      if (submitted < operations.size()) following = &operations[submitted++];
      if (--left == 0) ended.notify_one();  // under the lock: the waiter owns this object
    }
    // One that has not ended keeps the waiter, and so this object.
    if (following != nullptr) engine.submit(following);
  }
};

}  // namespace

int move_and_wait(IoEngine& engine, const IoOperation& pattern, std::byte* buffer, uint64_t offset,
                  uint64_t bytes, size_t at_once) {
  TD_CHECK(bytes % kPieceBytes == 0 && at_once > 0);
  Pass pass{engine, std::vector<IoOperation>(bytes / kPieceBytes, pattern)};
  pass.left = pass.operations.size();
  for (size_t i = 0; i < pass.operations.size(); ++i) {
    IoOperation& operation = pass.operations[i];
    operation.buffer = buffer + i * kPieceBytes;
    operation.offset = offset + i * kPieceBytes;
    operation.bytes = kPieceBytes;
    operation.done = [](IoOperation* self, int error) { static_cast<Pass*>(self->owner)->count(error); };
    operation.owner = &pass;
  }
  const size_t first = std::min(at_once, pass.operations.size());
  pass.submitted = first;
  for (size_t i = 0; i < first; ++i) engine.submit(&pass.operations[i]);
  std::unique_lock lock(pass.mutex);
  pass.ended.wait(lock, [&pass] { return pass.left == 0; });
  return pass.error;
}

}  // namespace tokendepot
