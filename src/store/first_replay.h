// The first reading of all roots' journals, on a thread of its own: a depot that only looks up need not wait
// for it.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "base/clock.h"
#include "store/catalog.h"
#include "store/replay.h"

namespace tokendepot {

/// What has been read is served at once. Until the rest has been, other chunks are misses, and a chunk whose
/// removal is still to be read is promised and found to be a miss when it is loaded.
class FirstReplay {
 public:
  /// Begins to read. All must outlive this object.
  FirstReplay(std::vector<Replay*> replays, Catalog* catalog, const Clock& clock);
  FirstReplay(const FirstReplay&) = delete;
  FirstReplay& operator=(const FirstReplay&) = delete;
  /// Waits for the thread, however long.
  ~FirstReplay();

  /// Waits for the end. True: everything was read; an error ended the reading. False: after `patience` it
  /// goes on, and its end will be logged.
  Result<bool> wait(std::chrono::nanoseconds patience);
  /// Ends the reading. False: the thread is still in the kernel after `patience`, and this object must stay
  /// for good.
  bool stop(std::chrono::nanoseconds patience);

 private:
  void run();

  const std::vector<Replay*> replays_;
  Catalog* const catalog_;
  const Clock& clock_;
  std::mutex mutex_;  // all but the thread
  std::condition_variable changed_;
  bool ended_ = false;
  bool late_ = false;  // nobody waits for the end any more
  bool stopped_ = false;
  Status result_;
  std::thread thread_;
};

}  // namespace tokendepot
