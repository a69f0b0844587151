// Reads sealed segments again in the background and condemns what is not what its digests say.
//
// One process a root does it, whoever has the lock on `scrub.lock`. It reads at a bounded rate, aside from
// loads and stores of its own process, and notes in the root how far it is, so that the next one goes on
// there. A pass begins a day after the one before ended.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "base/clock.h"
#include "store/root_writer.h"
#include "tokendepot/tending.h"
#include "tokendepot/tools.h"

namespace tokendepot {

class Scrubber {
 public:
  /// The writers and the table outlive this. `bytes_per_second` is each root's; 0 = nothing is read.
  Scrubber(const std::vector<RootWriter*>& writers, SegmentTable& segments, const Clock& clock,
           uint64_t bytes_per_second);
  /// Waits for the thread, however long.
  ~Scrubber();

  /// Ends the thread. False: it is still in the kernel after `patience`; this object and all that it uses
  /// must stay for good.
  bool stop(std::chrono::nanoseconds patience);

  /// False: the system refused the thread.
  bool running() const { return bytes_per_second_ == 0 || places_.empty() || thread_.joinable(); }

  struct Progress {
    uint64_t scrubbed_bytes = 0;  // by this process
    uint64_t errors = 0;          // extents that were bad or could not be read, by this process
    uint64_t pass_bytes = 0;      // in the pass under way, as the root's notes say; 0 = none
    uint64_t finished_ns = 0;     // end of the last full pass, as the root's notes say
  };
  Progress progress(RootIndex root) const;

 private:
  struct Place;
  void run();
  void end_thread();
  void step(Place& place);
  bool begin_or_go_on(Place& place);
  void check_segment(Place& place, const SegmentId& id, const std::vector<StoredExtent>& extents);
  void note(Place& place);
  /// Waits for the rate and for loads and stores. False: the depot closes.
  bool may_read(Place& place, uint64_t bytes);
  bool sleep(uint64_t ns);

  std::vector<std::unique_ptr<Place>> places_;
  SegmentTable& segments_;
  const Clock& clock_;
  const uint64_t bytes_per_second_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stop_ = false;
  bool at_work_ = false;  // the thread has not ended
  std::condition_variable ended_;
  std::thread thread_;
};

}  // namespace tokendepot
