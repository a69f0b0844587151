// Measures a depot next to the limits of its medium and its link: what `tokendepot bench io` drives.
//
// A workload owns a depot in directories of its own, a paged cache filled with incompressible bytes, and
// loops that keep a number of extents in flight through the public API. One workload is one client process;
// several of them at once are the caller's to start.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tokendepot/depot.h"
#include "tokendepot/error.h"
#include "tokendepot/stats.h"

namespace tokendepot {

/// Counts latencies in buckets that are at most 1/128 of their value wide, as HdrHistogram does: bounded
/// memory, mergeable, and a percentile that is read from it is at most 0.8 % too high. Not thread-safe.
class LatencyHistogram {
 public:
  void add(uint64_t nanoseconds);
  /// (largest value of the bucket in nanoseconds, count), ascending, empty buckets left out.
  std::vector<std::pair<uint64_t, uint64_t>> buckets() const;

 private:
  std::vector<uint64_t> counts_;
};

enum class WorkloadKind : uint8_t {
  read,   // loads of stored extents, in random order
  write,  // stores under new keys
  mixed,  // both at once, every other one
  burst,  // idle, then `in_flight` requests of `request_extents` loads at once; again and again
};

struct WorkloadSpec {
  /// One root, absent or an empty directory; files without a name come and go beside it. With `mixed`, its
  /// segments must hold the volume three times, and eight more be there: an extent that is loaded may be the
  /// only one of its segment, and the volume is stored twice between two loads of it.
  Options options;
  WorkloadKind kind = WorkloadKind::read;
  std::vector<uint64_t> extent_bytes;  // size classes, equally many of each: multiples of 4 KiB up to 256 MiB
  uint64_t volume_bytes = 0;           // payload that lies on the medium to be read, all classes together
  uint32_t in_flight = 1;              // extents, with `burst` requests (of one size class); 1 to 1024
  uint32_t request_extents = 1;        // of one request of a burst; 1 to 1024
  uint32_t process = 0;                // below 2048; other processes' payload and keys differ
  bool keep_cache = false;             // leave the page cache between store and load as it is
};

/// Loads or stores of one size. Latency spans what the client waits for: from submission, through the depot's
/// queue, the medium and the copy into or out of the paged cache, to the report of the end.
struct WorkloadClass {
  bool write = false;
  uint64_t extent_bytes = 0;  // with `burst`, of a whole request
  uint64_t count = 0;
  LatencyHistogram latency;
};

struct WorkloadRun {
  double seconds = 0;
  double cpu_seconds = 0;     // of all threads of the process
  double client_seconds = 0;  // of them, the thread that submits and polls
  uint64_t extents = 0;
  uint64_t bytes = 0;    // payload
  uint64_t dropped = 0;  // stores that the depot did not take
  uint64_t failed = 0;
  std::string failure;             // the first one's reason
  PathBytes loaded, stored;        // payload and headers, by the way that carried them
  uint64_t device_read_bytes = 0;  // what the kernel says that storage delivered (/proc/self/io)
  std::vector<WorkloadClass> classes;
  std::vector<std::pair<double, double>> bursts;  // seconds to the end of the first and of the last request
};

/// One of the things that bound the workload, by moving pieces of its largest extents.
struct WorkloadLimit {
  std::string what;  // "O_DIRECT reads of a plain file, 8 threads, buffers in huge pages"
  double gb_per_s = 0;
};

struct WorkloadCheck {
  uint64_t extents = 0;  // loaded and compared byte by byte with what was stored
  uint64_t bytes = 0;
  uint64_t wrong = 0;  // differ, or could not be loaded
  std::string first_wrong;
};

/// Calls of one workload come from one thread.
class Workload {
 public:
  /// Asked several times a second; true ends the call early, with what was done so far.
  using Interrupted = std::function<bool()>;

  /// Opens the depot, makes the paged cache and measures how fast it can be filled. Errors: those of
  /// Depot::open(); invalid_argument for sizes, counts and a volume that holds less than one extent of each
  /// class; no_space for too little memory.
  static Result<std::unique_ptr<Workload>> open(const WorkloadSpec& spec);
  virtual ~Workload() = default;

  /// Stores what run() needs on the medium. Where run() stores, first until the root has recycled a segment:
  /// fresh memory and fresh file extents are slow for everybody.
  virtual Status fill(const Interrupted& interrupted) = 0;
  /// At least `seconds`, what is in flight then included; a burst at least once, with its idleness. Where
  /// loads would come out of the page cache, each pass over the volume begins with dropping it, outside the
  /// measured time.
  virtual Result<WorkloadRun> run(double seconds, const Interrupted& interrupted) = 0;
  /// The same traffic without a depot: the medium by itself and, with a device, its link. Every list has the
  /// same entries in the same order; the lowest rate is the limit.
  virtual Result<std::vector<WorkloadLimit>> limits(double seconds) = 0;
  /// Compares what the last run left in the paged cache, then loads every `every`-th stored extent into
  /// memory that was overwritten before, and compares all its bytes with the payload as it was generated.
  virtual Result<WorkloadCheck> verify(uint32_t every, const Interrupted& interrupted) = 0;

  virtual double payload_gb_per_s() const = 0;  // how fast fresh payload is made ready, on one thread
  virtual std::string file_system() const = 0;  // of the root: "tmpfs", "ext4", ...
  virtual bool in_memory() const = 0;           // that file system has no device behind it
  virtual DepotStats stats() const = 0;
};

}  // namespace tokendepot
