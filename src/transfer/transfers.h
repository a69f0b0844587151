// Loads and stores in motion: queues, bounds, deadlines, and the steps of each extent over io and device.
//
// Dispatcher threads start work, one the stores and one for each root its loads: to take space or to open a
// segment may need a file system that does not answer. I/O and device threads drive what is started from step
// to step. Loads are started before stores, earliest deadline first. Lock order: mutex_ before anything of
// the store rooms.
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

  /// Cancels what is queued, waits for what is in motion; further submits answer `closed`. False: the kernel
  /// has not answered after kClosePatienceNs. Nothing will touch a paged cache any more but scatters that
  /// the device has already (verified bytes behind a stream that stands still); threads are still in the
  /// kernel: this object and all that it uses must stay for good. Once.
  bool close();

  Status attach(const PagedCache& cache);
  Status mark_stream(void* stream);
  void engine_step(bool begins) { device_.engine_step(begins); }
  Status submit_load(uint64_t job, LoadPlan plan, bool hold = false);
  Status place(uint64_t job, uint64_t held_job, std::span<const Depot::HeldBlocks> blocks);
  void drop_held(uint64_t held_job);
  Status submit_store(uint64_t job, StorePlan plan, Keeper& keeper);
  struct ObjectItem {
    Depot::Object object;
    ExtentRef where;  // bytes = 0: not in the catalog
  };
  /// Items whose place is known and has the right size are taken as stored.
  Status submit_store_objects(uint64_t job, std::span<const ObjectItem> items, Keeper& keeper);
  Status submit_load_objects(uint64_t job, std::span<const ObjectItem> items, uint64_t deadline_ns);
  bool wait_gathered(uint64_t timeout_ns);
  void cancel(uint64_t job);
  std::vector<Completion> poll();
  bool wait_ended(uint64_t timeout_ns);
  bool flush(uint64_t timeout_ns);
  /// A segment became ready: stores that waited for it may start.
  void space_ready();
  /// `stats.roots` are there already, in their order.
  void add_to(DepotStats& stats) const;
  /// False: the system refused the dispatchers' threads; nothing may be submitted.
  bool running() const;

  static constexpr uint64_t kClosePatienceNs = 10ull * 1000 * 1000 * 1000;

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

  /// Loads from one root: a root holds up none but its own. Guarded by mutex_.
  struct Source {
    Transfers* transfers = nullptr;
    RootWriter* writer = nullptr;  // null: not written by this process
    uint64_t most_staged_bytes = UINT64_MAX;
    uint32_t most_reads = UINT32_MAX;
    uint64_t most_read_bytes = UINT64_MAX;
    std::multimap<uint64_t, LoadTask*> queued;  // by deadline
    std::vector<uint32_t> touched;              // slots whose use is to be journaled
    std::vector<Record> condemned;              // to be journaled, too; one a load in motion at most
    uint32_t in_motion = 0;
    uint32_t stores = 0;                     // into this root, queued or under way
    std::atomic<uint64_t> staged_bytes = 0;  // of the slab; added to by the dispatcher only
    std::atomic<uint32_t> reads = 0;         // of loads that are staged, by the root's engine and not ended
    std::atomic<uint64_t> read_bytes = 0;    // of those
    bool first = false;                      // some wait to be started, and stores for them
    bool work = false;
    std::condition_variable wake;
    std::thread dispatcher;

    /// Not bounded beside stores: their writes are in the same queue.
    bool may_read() const { return stores > 0 || (reads < most_reads && read_bytes < most_read_bytes); }
  };

  void run_loads(Source& source);
  void start_loads(Source& source, std::unique_lock<std::mutex>& lock);
  /// Of the root's engine; its dispatcher goes on when there is room for more.
  void read_ended(Source& source, uint64_t bytes);
  /// Writes what other threads have left for it: the journal may be on a file system that does not answer.
  void write_journal(Source& source, std::unique_lock<std::mutex>& lock);
  bool loads_first_locked() const;
  Source& source_of(const RootWriter* writer) const;
  Result<Job*> begin_job_locked(uint64_t id, JobKind kind, uint64_t deadline_ns = 0);
  /// Sees to it that extents of this size can be kept: slab and segments are large enough, or may become it.
  Status fit_extent(uint64_t bytes, std::string_view what);
  /// A cache of one block, the object's memory; null where an extent of its size cannot be kept.
  std::unique_ptr<PagedCache> cache_of(const Depot::Object& object) const;
  void run_stores();
  /// False: some wait for memory.
  bool start_rewrites(std::unique_lock<std::mutex>& lock);
  void wake_dispatchers_locked();
  uint64_t earliest_deadline_locked() const;
  void give_up_starting_locked(uint64_t submitted_until_ns);
  // load.cc
  void queue_load_locked(Job& job, uint32_t index, LoadItem item, const NamespaceDigest& ns,
                         const PagedCache& cache, bool hold, std::unique_ptr<PagedCache> own = nullptr);
  bool start_load(LoadTask& task);
  /// The first root from `tier` on that may hold the extent; tiers_.size() = none.
  size_t find_tier(const LoadTask& task, size_t tier) const;
  bool open_place(LoadTask& task);
  void queue_at_locked(LoadTask& task, size_t tier);
  /// From being in motion at its root to waiting at this one, which may be the same.
  void move_on_locked(LoadTask& task, size_t tier);
  /// Its time in motion at its root is over.
  void leave_motion_locked(const LoadTask& task);
  /// Bit per root that has condemned the segment.
  uint32_t condemned_in(uint32_t slot) const;
  void read_mapped(LoadTask& task);
  void copy_mapped(LoadTask& task);
  void read_staged(LoadTask& task);
  /// `here`: this thread may do the work itself, if the device lets it.
  void start_scatter(LoadTask& task, std::span<const std::byte> run, bool guarded, bool here = false);
  void piece_read(LoadTask& task, const IoOperation& piece);
  void pieces_read(LoadTask& task);
  bool check_header(LoadTask& task, std::span<const std::byte> header_bytes);
  void scattered(LoadTask& task, ScatterOutcome outcome);
  /// Another root is known to have more extents of this segment than the one that was read from.
  bool is_unfinished_copy(const LoadTask& task) const;
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
  bool take_staging(StoreTask& task, uint64_t bytes);
  bool take_run(StoreTask& task, GdsLane& lane);
  void give_staging(StoreTask& task);
  void give_run(StoreTask& task);
  void give_store_memory(StoreTask& task);
  /// cuFile failed to write the shards, which lie in the device's slab as they were gathered: they are copied
  /// from there and written by the kernel, once there is staging memory for all of the extent.
  void rewrite_without_gds(StoreTask& task);
  /// False: no memory yet.
  bool start_rewrite(StoreTask& task);
  /// `direct`: the file was open with O_DIRECT.
  static void count_path(TransferStats& stats, const Root& root, const GdsLane* lane, bool direct,
                         uint64_t header, uint64_t payload, double tokens);
  // store.cc
  enum class Start : uint8_t { started, later, over };
  void queue_store_locked(Job& job, uint32_t index, StoreItem item, const NamespaceDigest& ns,
                          const PagedCache& cache, Keeper& keeper, RootWriter* writer,
                          std::unique_ptr<PagedCache> own = nullptr);
  Start start_store(StoreTask& task);
  void gathered(StoreTask& task, bool ok);
  void write_pieces(StoreTask& task);
  void pieces_written(StoreTask& task);
  void finish_store(StoreTask& task, bool stored, Reason reason);
  /// Ends a store that a bound stopped.
  void drop_store(StoreTask& task, uint64_t DropCounts::* why);

  void resolve_locked(Job& job, uint32_t item, uint32_t chunk, uint16_t group, std::optional<Reason> failure,
                      uint64_t bytes);
  void note_failure(uint64_t job, std::string text);
  void note_failure_locked(uint64_t job, std::string text);
  void end_job_locked(uint64_t id);
  bool id_in_use_locked(uint64_t id) const;
  void log_warnings();
  static void count(FailureCounts& counts, Reason reason);
  /// The part of a chunk's tokens that an extent brings or takes; 0 but for the lowest group attached.
  double tokens_locked(const PagedCache& cache, const Part& part) const;

  Device& device_;
  const std::vector<Tier> tiers_;
  SegmentTable& segments_;
  const Clock& clock_;
  const uint64_t store_queue_bytes_;
  Promotion* const promotion_;
  const bool staged_;  // some root is not mapped

  mutable std::mutex mutex_;
  std::condition_variable wake_stores_;  // the dispatcher of stores
  std::condition_variable settled_;      // wait_gathered, flush, the destructor
  std::condition_variable reported_;     // wait_ended
  bool stop_ = false;
  bool store_work_ = false;
  uint32_t dispatching_ = 0;  // dispatchers that have not ended
  uint64_t mark_ = 0;         // of the engine's stream: what is submitted now waits for it
  std::map<uint16_t, std::unique_ptr<PagedCache>> caches_;
  std::unordered_map<uint64_t, Job> jobs_;
  std::vector<Completion> ended_;
  std::vector<std::string> warnings_;  // logged by a dispatcher: a log sink may block
  std::deque<StoreTask*> queued_stores_;
  std::deque<StoreTask*> rewrites_;  // gathered, with their places; before all that is queued
  std::unordered_map<LoadTask*, std::unique_ptr<LoadTask>> load_tasks_;
  std::unordered_map<uint64_t, std::vector<LoadTask*>> held_;  // by the job that verified them
  std::unordered_map<StoreTask*, std::unique_ptr<StoreTask>> store_tasks_;
  uint64_t store_bytes_ = 0;         // queued and in motion
  uint64_t staged_store_bytes_ = 0;  // of the slab
  uint64_t lane_store_bytes_ = 0;    // of the device's slab
  uint32_t ungathered_ = 0;
  TransferStats load_stats_;
  TransferStats store_stats_;
  DropCounts drops_;
  struct Traffic {
    uint64_t timed_out_loads = 0;
    RootTraffic loaded;
    RootTraffic stored;
  };
  std::vector<Traffic> traffic_;                  // by root
  std::vector<std::unique_ptr<Source>> sources_;  // by tier
  std::thread store_dispatcher_;
};

}  // namespace tokendepot
