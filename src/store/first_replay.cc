#include "store/first_replay.h"

#include <utility>

#include "base/log.h"
#include "io/io_thread.h"

namespace tokendepot {

FirstReplay::FirstReplay(std::vector<Replay*> replays, Catalog* catalog, const Clock& clock)
    : replays_(std::move(replays)), catalog_(catalog), clock_(clock) {
  thread_ = start_io_thread([](void* self) { static_cast<FirstReplay*>(self)->run(); }, this, "td-replay");
  if (!thread_.joinable()) run();  // the system refuses a thread: the caller reads
}

FirstReplay::~FirstReplay() {
  if (thread_.joinable()) thread_.join();
}

void FirstReplay::run() {
  const uint64_t began = clock_.steady_ns();
  Status result;
  for (Replay* const replay : replays_) {
    if (auto read = replay->first(); !read && result) result = std::move(read);
  }
  if (catalog_ != nullptr) catalog_->sweep();
  std::lock_guard lock(mutex_);
  ended_ = true;
  result_ = std::move(result);
  if (late_ && !stopped_) {
    if (result_) {
      log(LogLevel::info, "all journals read after {:.3f} s: {} extents",
          static_cast<double>(clock_.steady_ns() - began) * 1e-9, catalog_ ? catalog_->entries() : 0);
    } else {
      log(LogLevel::error, "journals were not read to their end, what they hold is missed: {}",
          result_.error().message);
    }
  }
  changed_.notify_all();
}

Result<bool> FirstReplay::wait(std::chrono::nanoseconds patience) {
  std::unique_lock lock(mutex_);
  if (!changed_.wait_for(lock, patience, [this] { return ended_; })) {
    late_ = true;
    return false;
  }
  if (!result_) return std::unexpected(result_.error());
  return true;
}

bool FirstReplay::stop(std::chrono::nanoseconds patience) {
  for (Replay* const replay : replays_) replay->stop();
  std::unique_lock lock(mutex_);
  stopped_ = true;
  return changed_.wait_for(lock, patience, [this] { return ended_; });
}

}  // namespace tokendepot
