// Loads and stores in motion: queues, bounds, deadlines, and the steps of each extent over io and device.
//
// One dispatcher thread starts work; I/O and device threads drive what is started from step to step. Loads
// are started before stores, earliest deadline first. Lock order: mutex_ before anything of the store rooms.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <unordered_map>
#include <vector>

#include "base/check.h"
#include "base/clock.h"
#include "device/device.h"
#include "store/keeper.h"
#include "tokendepot/depot.h"

namespace tokendepot {

struct LoadTask;
struct StoreTask;

class Transfers {
 public:
  struct Tier {
    Root* root = nullptr;
    RootWriter* writer = nullptr;  // null: not written by this process
  };
  /// `promotion`, where there is one, hears of every load and outlives the transfers.
  Transfers(Device& device, std::vector<Tier> tiers, SegmentTable& segments, const Clock& clock,
            uint64_t store_queue_bytes, Promotion* promotion = nullptr);
  /// close() has been called.
  ~Transfers();

  /// Cancels what is queued, waits for what is in motion; further submits answer `closed`. Idempotent.
  void close();

  Status attach(const PagedCache& cache);
  Status mark_stream(void* stream);
  Status submit_load(uint64_t job, LoadPlan plan, bool hold = false);
  Status place(uint64_t job, uint64_t held_job, std::span<const Depot::HeldBlocks> blocks);
  void drop_held(uint64_t held_job);
  Status submit_store(uint64_t job, StorePlan plan, Keeper& keeper);
  bool wait_gathered(uint64_t timeout_ns);
  void cancel(uint64_t job);
  std::vector<Completion> poll();
  bool wait_ended(uint64_t timeout_ns);
  bool flush(uint64_t timeout_ns);
  /// A segment became ready: stores that waited for it may start.
  void space_ready();
  void add_to(DepotStats& stats) const;
  /// False: the system refused the dispatcher's thread; nothing may be submitted.
  bool running() const { return dispatcher_.joinable(); }

 private:
  friend struct LoadTask;
  friend struct StoreTask;
  using Reason = ItemFailure::Reason;

  struct Job {
    Completion completion;
    NamespaceDigest ns;
    uint64_t submitted_ns = 0;
    uint64_t deadline_ns = UINT64_MAX;  // steady clock; the largest value = none
    uint32_t unresolved = 0;
    std::vector<LoadTask*> loads;  // unresolved ones
    std::string first_failure;     // where and why, for the job's one log line
  };

  void run();
  // load.cc
  bool start_load(LoadTask& task);
  bool open_place(LoadTask& task);
  void read_mapped(LoadTask& task);
  void copy_mapped(LoadTask& task);
  void read_staged(LoadTask& task);
  /// `here`: this thread may do the work itself, if the device lets it.
  void start_scatter(LoadTask& task, std::span<const std::byte> run, bool guarded, bool here = false);
  void piece_read(LoadTask& task, const IoOperation& piece);
  void pieces_read(LoadTask& task);
  bool check_header(LoadTask& task, std::span<const std::byte> header_bytes);
  void scattered(LoadTask& task, ScatterOutcome outcome);
  void fail_load(LoadTask& task, Reason reason, bool bad_on_medium);
  void condemn_missing(LoadTask& task);
  void submit_scatter(LoadTask& task, std::span<const std::byte> run, bool guarded, bool here = false);
  void let_go(LoadTask& task);
  void leave_place(LoadTask& task);
  void resolve_load_locked(LoadTask& task, std::optional<Reason> failure);
  void retire(LoadTask& task);
  void enforce_deadlines();
  void abandon(LoadTask& task, Reason reason);
  // gds.cc
  GdsLane* lane_of(const LoadTask& task) const;
  bool read_with_gds(LoadTask& task);
  /// The medium is asked once more without cuFile in between: only then is it known whose fault it was.
  void retry_without_gds(LoadTask& task, std::string what);
  bool take_store_memory(StoreTask& task, GdsLane* lane);
  void give_store_memory(StoreTask& task);
  static void count_path(PathBytes& paths, const Root& root, const GdsLane* lane, uint64_t header,
                         uint64_t payload);
  // store.cc
  enum class Start : uint8_t { started, later, over };
  Start start_store(StoreTask& task);
  void gathered(StoreTask& task, bool ok);
  void write_pieces(StoreTask& task);
  void pieces_written(StoreTask& task);
  void finish_store(StoreTask& task, bool stored, Reason reason);

  void resolve_locked(Job& job, uint32_t item, uint32_t chunk, uint16_t group, std::optional<Reason> failure,
                      uint64_t bytes);
  void note_failure(uint64_t job, std::string text);
  void note_failure_locked(uint64_t job, std::string text);
  void end_job_locked(uint64_t id);
  bool id_in_use_locked(uint64_t id) const;
  void log_warnings();
  static void count(FailureCounts& counts, Reason reason);

  Device& device_;
  const std::vector<Tier> tiers_;
  SegmentTable& segments_;
  const Clock& clock_;
  const uint64_t store_queue_bytes_;
  Promotion* const promotion_;
  const bool staged_;  // some root is not mapped

  mutable std::mutex mutex_;
  std::condition_variable wake_;      // the dispatcher
  std::condition_variable settled_;   // wait_gathered, flush, the destructor
  std::condition_variable reported_;  // wait_ended
  bool stop_ = false;
  bool work_ = false;
  uint64_t mark_ = 0;  // of the engine's stream: what is submitted now waits for it
  std::map<uint16_t, std::unique_ptr<PagedCache>> caches_;
  std::unordered_map<uint64_t, Job> jobs_;
  std::vector<Completion> ended_;
  std::vector<std::string> warnings_;                // logged by the dispatcher: a log sink may block
  std::multimap<uint64_t, LoadTask*> queued_loads_;  // by deadline
  std::deque<StoreTask*> queued_stores_;
  std::unordered_map<LoadTask*, std::unique_ptr<LoadTask>> load_tasks_;
  std::unordered_map<uint64_t, std::vector<LoadTask*>> held_;  // by the job that verified them
  std::unordered_map<StoreTask*, std::unique_ptr<StoreTask>> store_tasks_;
  uint32_t loads_in_motion_ = 0;
  uint64_t store_bytes_ = 0;         // queued and in motion
  uint64_t staged_store_bytes_ = 0;  // of the slab
  uint64_t lane_store_bytes_ = 0;    // of the device's slab
  uint32_t ungathered_ = 0;
  TransferStats load_stats_;
  TransferStats store_stats_;
  std::thread dispatcher_;
};

}  // namespace tokendepot
