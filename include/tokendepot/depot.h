// The depot: a set of directories ("roots") that keep KV-cache chunks of an inference server.
//
// Contract. A depot may always answer miss. It never hands out bytes whose identity and digest it has not
// checked, and no failure of a medium is more than a miss, a counter and a log line. Thread safety: every
// member function may be called from any thread. After fork() the child's copy answers `closed` to everything
// and touches nothing.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tokendepot/error.h"
#include "tokendepot/key.h"
#include "tokendepot/layout.h"
#include "tokendepot/plan.h"
#include "tokendepot/stats.h"

namespace tokendepot {

enum class TransportChoice : uint8_t { automatic, mapped, direct, buffered, gds };
enum class IoChoice : uint8_t { automatic, threads, uring };

struct RootOptions {
  std::string path;             // absolute; created with mode 0700 if its parent exists
  uint64_t capacity_bytes = 0;  // upper bound of the segment files, the depot's own; required
  uint64_t segment_bytes = 0;   // 0 = chosen from the capacity (about 256 MiB at most)
  TransportChoice transport = TransportChoice::automatic;  // mapped on tmpfs, direct elsewhere
  IoChoice io = IoChoice::automatic;                       // measured at open
  bool read_only = false;
  bool require_gds = false;  // with a CUDA device: no opening unless cuFile moves the bytes point to point
  // Of the root that takes stores, and only if a writable one comes after it: a store is acknowledged when
  // the next root has the extent, too.
  bool write_through = false;
  // Of the root that takes stores: no more of them wait here for their copy in the next root. 0 = as many as
  // fit.
  uint64_t demotion_lag_bytes = 0;
  // Where not mapped: the next load begins while its reads under way are fewer bytes than this. 0 = measured
  // at open where that is possible, else bounded by io_depth only.
  uint64_t reads_at_once_bytes = 0;
};

struct Options {
  std::vector<RootOptions> roots;             // fastest first; stores go to the first writable one
  bool catalog = true;                        // keep the index that lookups need
  bool writer = true;                         // accept stores
  std::string device = "host";                // where the paged caches are: "host" or "cuda:N"
  uint64_t device_slab_bytes = 512ull << 20;  // CUDA: device memory for extents in flight
  uint64_t slab_bytes = 256ull << 20;         // staging memory on the host; pinned for a CUDA device
  // Gather, verify and scatter; CUDA: copy what is not registered, there parse_options() chooses 12.
  uint32_t device_threads = 2;
  uint32_t io_depth = 16;                      // operations in flight per root
  uint64_t store_queue_bytes = 512ull << 20;   // stores queued beyond this are dropped and counted
  uint64_t free_space_reserve = 256ull << 20;  // left free on each root's file system
  uint32_t poll_ms = 100;                      // how often other writers' journals are read
  // Of the bytes stored, so many percent may be written once more to carry on what is used of a segment that
  // no lower root holds and that must go; at most 10.
  uint32_t rewrite_percent = 0;
  uint64_t scrub_bytes_per_second = 16ull << 20;  // background re-verification of each root; 0 = none
  // How long an evicted segment's file stays for who was promised something of it; at most 60,000.
  uint32_t eviction_grace_ms = 3000;
  // A depot that takes no stores (writer = false) is open after this time at the latest, whatever it has read
  // of the journals by then.
  uint32_t open_wait_ms = 10'000;
};

/// Reads the JSON object that users write, e.g. {"roots":["/dev/shm/depot?capacity=8GiB"],"slab":"256MiB"}.
/// The error is one sentence that names key, value and what is allowed; unknown keys are errors and name the
/// nearest known one. docs/operations.md has the table.
Result<Options> parse_options(std::string_view json);

/// The effective options as the JSON object that parse_options() reads, every key written out, sizes in
/// bytes.
std::string to_json(const Options& options);

/// A size greater than 0 as users write it: bytes, or a number and a unit with or without one blank between
/// them (KiB MiB GiB TiB count by 1024, KB MB GB TB by 1000). "8G" is refused because it is read both ways.
Result<uint64_t> parse_size(std::string_view text);

/// What a lookup asks of one group.
struct GroupWant {
  uint16_t group = 0;
  LayoutKind kind = LayoutKind::canonical;
  Part part;                   // over all ranks
  uint32_t tokens = 0;         // tokens per extent, as in GroupShape
  uint32_t window_chunks = 0;  // 0 = every chunk of the prefix; w = only the last w chunks before its end
};

enum class JobKind : uint8_t { load, store };

struct ItemFailure {
  enum class Reason : uint8_t { absent, mismatch, corrupt, io_error, timed_out, cancelled, dropped, pinned };
  uint32_t item = 0;  // index in the plan
  uint32_t chunk = 0;
  uint16_t group = 0;
  Reason reason = Reason::absent;
};
const char* name(ItemFailure::Reason reason);

struct Completion {
  uint64_t job = 0;
  JobKind kind = JobKind::load;
  uint32_t items_ok = 0;
  uint64_t bytes = 0;
  uint64_t nanoseconds = 0;  // submit to done
  std::vector<ItemFailure> failures;
};

enum class KeyHistory : uint8_t {
  never,   // no extent was ever seen
  stored,  // some extent can be looked up
  gone,    // evicted, condemned or removed
};

class Depot {
 public:
  /// Opens (and where needed creates) every root, replays the journals and starts the background work.
  /// Errors: invalid_argument (option, capacity larger than the file system, or a root that holds something
  /// else), permission, no_space (device slab larger than the free device memory), unsupported (format
  /// version, no such device). Nothing is left behind on failure but empty directories.
  static Result<std::unique_ptr<Depot>> open(const Options& options);

  /// Waits for the work in flight (bounded: queued loads and stores are cancelled), then closes.
  virtual ~Depot() = default;

  /// Registers what must be equal for KV to be exchangeable: a JSON object, stored in every writable root as
  /// manifests/<digest>.json; the digest of its canonical form is the first parent of all keys.
  virtual Result<NamespaceDigest> register_namespace(std::string_view manifest_json) = 0;

  // --- scheduler half: memory only, no I/O
  // ---------------------------------------------------------------------

  /// Number n of leading keys such that every want is met for a prefix of n chunks. Known answers: O(n)
  /// probes.
  virtual size_t longest_prefix(std::span<const Key> keys, std::span<const GroupWant> wants) = 0;

  /// One byte a key: 1 = all of `want` is stored for that chunk.
  virtual void stored(std::span<const Key> keys, const GroupWant& want, std::span<uint8_t> out) = 0;

  /// One group's part of a load: chunks [first_chunk, first_chunk + blocks.size() / blocks_per_chunk).
  struct LoadGroup {
    GroupWant want;
    uint32_t first_chunk = 0;
    uint32_t blocks_per_chunk = 0;
    std::span<const int32_t> blocks;  // kSkipBlock where nothing is wanted
  };
  /// The extents to read. `not_found` when one has gone since the lookup. Chunks whose blocks are all skipped
  /// are left out. Marks the segments as used.
  virtual Result<LoadPlan> plan_load(const NamespaceDigest& ns, std::span<const Key> keys,
                                     std::span<const LoadGroup> groups,
                                     std::chrono::nanoseconds deadline) = 0;

  /// What this process knows of a chunk, whatever groups and parts: memory only, for explaining a miss.
  /// `gone` is an estimate: at most 1 in 65,535 chunks that never were here are taken for gone, and what has
  /// gone is forgotten when about a million others have gone after it. `never` without a catalog.
  virtual KeyHistory history(const Key& key) const = 0;

  /// Drops every extent of this chunk and group from this process's catalog until it is stored again.
  virtual void forget(const Key& key, uint16_t group) = 0;

  /// Takes all that is stored of `want` under these keys out of every process's catalog, for good; the space
  /// comes back when the segments are evicted. Needs the catalog and a writer, else it only forgets. One byte
  /// a key in `out`: 1 = something was stored.
  virtual void condemn(std::span<const Key> keys, const GroupWant& want, std::span<uint8_t> out) = 0;

  // --- worker half
  // ---------------------------------------------------------------------------------------------

  /// Lends the engine's paged cache of one group, in memory of the depot's device. Once per group, before the
  /// first submit. `invalid_argument` when the shape is inconsistent or one extent is larger than a segment
  /// or a slab.
  virtual Status attach(const PagedCache& cache) = 0;

  /// Marks the present end of the engine's CUDA stream (a cudaStream_t; null = the legacy default stream):
  /// loads, places and stores submitted after this call touch the paged cache only when the work queued on
  /// the stream before the call has ended. Nobody waits: neither this call nor host or device as a whole. On
  /// the host device it does nothing. `busy` while the stream is being captured into a graph;
  /// `invalid_argument` for cudaStreamPerThread on a thread whose current device is another one, of which
  /// that stream is.
  virtual Status mark_stream(void* stream) = 0;

  /// The engine begins (true) or has ended (false) to queue a step's work on the device; false without a true
  /// before it says nothing. Meanwhile what keeps others from the driver in the background, which is
  /// registering mapped segments, holds back, and so until 5 ms have passed without a step, 100 ms at a time
  /// at most. Only speed depends on it. Never blocks; thread-safe; does nothing on the host device.
  virtual void engine_step(bool begins) = 0;

  /// Queues the items of `plan` that intersect this worker's part. Never blocks on I/O. The job is reported
  /// by poll() exactly once, also when every item failed or none was this worker's; after that report no byte
  /// of the listed blocks is written any more. A failed item's blocks hold undefined bytes. `busy`: job id in
  /// use. What is proved bad or gone is condemned for everybody; who promises from a catalog calls forget()
  /// for every failed item, because nothing can be proved where the kernel failed.
  virtual Status submit_load(uint64_t job, LoadPlan plan) = 0;

  /// The same reading and checking into staging memory of this process, without writing to the cache: for
  /// engines that cannot survive a load that fails after it was promised. Block ids are ignored. Items that
  /// find no staging memory fail at once as `dropped`. The good items stay held under this job's id until
  /// place() or drop_held().
  virtual Status submit_hold(uint64_t job, LoadPlan plan) = 0;

  /// Writes held items into their blocks (no entry = not wanted) and lets go of all items of `held_job`.
  /// Reported by poll() under `job` like a load; cannot fail for reasons of a medium. `not_found`: nothing is
  /// held under that id.
  struct HeldBlocks {
    uint32_t chunk = 0;
    uint16_t group = 0;
    std::vector<int32_t> blocks;  // as in LoadItem
  };
  virtual Status place(uint64_t job, uint64_t held_job, std::span<const HeldBlocks> blocks) = 0;
  virtual void drop_held(uint64_t held_job) = 0;

  /// Queues stores. Blocks may be reused only after wait_gathered() returned true or poll() reported the job.
  /// Items over the bounds are reported as dropped.
  virtual Status submit_store(uint64_t job, StorePlan plan) = 0;

  /// An opaque object in the caller's memory, kept as one extent with one shard: for cache servers that hand
  /// over finished buffers, not blocks of a paged cache. Nothing needs to be attached. `memory` is 1 byte to
  /// 1 GiB of host memory, of any alignment; a depot of another device refuses objects (unsupported).
  struct Object {
    NamespaceDigest ns;  // checked when it is read: another namespace under the same key is a miss
    Key key;             // names the object in the catalog; made from the namespace too, as KeyChain does
    std::span<std::byte> memory;
  };
  /// What stored(), forget() and condemn() are asked about objects.
  static GroupWant object_want() { return {0, LayoutKind::opaque, {0, 1, 0, 1}, 1, 0}; }
  /// Stores objects, like submit_store(); `memory` is only read, until poll() has reported the job. Objects
  /// that the catalog has at this size count as stored without being written.
  virtual Status submit_store_objects(uint64_t job, std::span<const Object> objects) = 0;
  /// Finds objects in the catalog and reads them into `memory`, like submit_load(): nothing is written to the
  /// memory of an object whose bytes are not proved right. Not stored is `absent`, of another size
  /// `mismatch`. `deadline` counts from now, 0 = none.
  virtual Status submit_load_objects(uint64_t job, std::span<const Object> objects,
                                     std::chrono::nanoseconds deadline) = 0;

  /// Waits until the bytes of all stores submitted so far have left the paged cache. False on time-out.
  virtual bool wait_gathered(std::chrono::nanoseconds timeout) = 0;

  /// Asks a load to stop early; its unfinished items fail as `cancelled`. It is still reported by poll().
  virtual void cancel(uint64_t job) = 0;

  /// Jobs that ended since the last call. Enforces deadlines.
  virtual std::vector<Completion> poll() = 0;

  /// Waits until poll() has something to report. False on time-out.
  virtual bool wait_ended(std::chrono::nanoseconds timeout) = 0;

  /// Waits until every store submitted so far is acknowledged (journal record written) or failed. False on
  /// time-out.
  virtual bool flush(std::chrono::nanoseconds timeout) = 0;

  // --- both
  // ----------------------------------------------------------------------------------------------------

  /// Reads the other writers' journals now instead of at the next poll.
  virtual void refresh() = 0;

  virtual DepotStats stats() const = 0;
};

}  // namespace tokendepot
