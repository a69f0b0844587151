#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <vector>

#include "base/check.h"
#include "io/engine.h"

namespace tokendepot {
namespace {

/// Counts operations down, keeps the first error, and submits the next operation for each that ended; none
/// behind an error.
struct Pass {
  IoEngine& engine;
  std::vector<IoOperation> operations;
  std::mutex mutex = {};
  std::condition_variable ended = {};
  size_t submitted = 0;
  size_t under_way = 0;
  int error = 0;

  void count(int with) {
    IoOperation* following = nullptr;
    {
      const std::lock_guard lock(mutex);
      if (error == 0) error = with;
      if (error == 0 && submitted < operations.size()) {
        following = &operations[submitted++];
      } else if (--under_way == 0) {
        ended.notify_one();  // under the lock: the waiter owns this object
      }
    }
    // It is under way by now, and keeps the waiter and so this object.
    if (following != nullptr) engine.submit(following);
  }
};

}  // namespace

int move_and_wait(IoEngine& engine, const IoOperation& pattern, std::byte* buffer, uint64_t offset,
                  uint64_t bytes, size_t at_once) {
  TD_CHECK(bytes % kMoveBytes == 0 && at_once > 0);
  Pass pass{engine, std::vector<IoOperation>(bytes / kMoveBytes, pattern)};
  for (size_t i = 0; i < pass.operations.size(); ++i) {
    IoOperation& operation = pass.operations[i];
    operation.buffer = buffer + i * kMoveBytes;
    operation.offset = offset + i * kMoveBytes;
    operation.bytes = kMoveBytes;
    operation.done = [](IoOperation* self, int error) { static_cast<Pass*>(self->owner)->count(error); };
    operation.owner = &pass;
  }
  const size_t first = std::min(at_once, pass.operations.size());
  pass.submitted = pass.under_way = first;
  for (size_t i = 0; i < first; ++i) engine.submit(&pass.operations[i]);
  std::unique_lock lock(pass.mutex);
  pass.ended.wait(lock, [&pass] { return pass.under_way == 0; });
  return pass.error;
}

}  // namespace tokendepot
