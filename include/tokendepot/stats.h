// Counters of one open Depot. Every field only grows while the handle is open; gauges say so.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace tokendepot {

/// Why an extent that was asked for did not come, or a store did not happen. Order and names are stable.
struct FailureCounts {
  uint64_t absent = 0;     // file or extent gone since the promise
  uint64_t mismatch = 0;   // header names another key, namespace, segment or shape
  uint64_t corrupt = 0;    // a digest differs
  uint64_t io_error = 0;   // the kernel failed the operation or delivered too little
  uint64_t timed_out = 0;  // the deadline passed
  uint64_t cancelled = 0;  // asked for by the caller, or the Depot closed
  uint64_t dropped = 0;    // a bound (queue, slab, space) was reached
  uint64_t pinned = 0;     // no space, and what could be evicted is pinned
};

/// An amount by the way that really carried it between a medium and where it is used.
template <typename Amount>
struct ByPath {
  Amount mapped{};      // out of, or into, mapped memory
  Amount direct{};      // O_DIRECT and the host's slab; bytes of headers on the gds ways, too
  Amount buffered{};    // page cache and the host's slab
  Amount gds_p2p{};     // cuFile, past the host
  Amount gds_compat{};  // cuFile, through host memory of its own
};
using PathBytes = ByPath<uint64_t>;
using PathTokens = ByPath<double>;

/// Durations, counted by size: a histogram as Prometheus has it, but for the sums over smaller buckets.
struct LatencyCounts {
  /// Largest nanoseconds of each bucket but the last, which has none.
  static constexpr std::array<uint64_t, 10> kBoundsNs = {
      100'000,     400'000,     1'600'000,     6'400'000,     25'600'000,
      102'400'000, 409'600'000, 1'638'400'000, 6'553'600'000, 26'214'400'000};
  std::array<uint64_t, kBoundsNs.size() + 1> counts{};
  uint64_t nanoseconds = 0;  // sum

  void add(uint64_t ns) {
    size_t bucket = 0;
    while (bucket < kBoundsNs.size() && ns > kBoundsNs[bucket]) ++bucket;
    ++counts[bucket];
    nanoseconds += ns;
  }
};

/// Why `FailureCounts::dropped` of stores grew.
struct DropCounts {
  uint64_t no_root = 0;     // no root is writable
  uint64_t queue_full = 0;  // `store_queue` bytes are waiting or under way
  uint64_t no_space = 0;    // no segment can be had now, or staging memory is taken
  uint64_t late = 0;        // did not begin in time, or its blocks were wanted back
  uint64_t next_root = 0;   // `write_through`: the first root has it, the next one did not take it
};

/// What went from one root into the cache, or the other way.
struct RootTraffic {
  uint64_t bytes = 0;
  double tokens = 0;  // of the lowest group attached; an extent that holds a part of it counts as that part
};

struct TransferStats {
  uint64_t extents = 0;
  uint64_t bytes = 0;         // payload and header bytes moved
  uint64_t nanoseconds = 0;   // sum over extents, submit to done
  PathBytes by_path;          // of `bytes`; what is placed after a hold came only once
  PathTokens tokens_by_path;  // by the way of the payload; tokens as in RootTraffic
  FailureCounts failures;
  LatencyCounts latency;  // of extents that moved: submit to done
  LatencyCounts queue;    // of extents that began: submit to the first byte asked for
};

/// Bytes of extents that are not served any more, by why.
struct EvictedBytes {
  uint64_t capacity = 0;  // to make room
  uint64_t quota = 0;     // their namespace was over its quota
  uint64_t ttl = 0;       // they had outlived their time
  uint64_t manual = 0;    // by hand; by whomever in any process
  uint64_t corrupt = 0;   // they were bad or gone
};

struct RootStats {
  std::string path;
  std::string id;         // 32 hex digits, of the marker
  std::string transport;  // "mapped", "direct-threads", "buffered-uring", "gds-p2p", "gds-compat", ...
  std::string reason;     // why this transport was chosen
  uint64_t read_bytes_per_second = 0;  // measured when the root was opened; 0 = not measured
  uint64_t capacity_bytes = 0;
  uint64_t used_bytes = 0;     // gauge: segment files on the medium, but for those that others have ready
  uint64_t leaving_bytes = 0;  // gauge: of them, evicted ones that stay for `eviction_grace_ms`
  uint64_t segments = 0;       // gauge
  uint64_t evicted_segments = 0;
  uint64_t demoted_segments = 0;
  // Gauges: extents of this process's segments that the next writable root does not have yet, and how long
  // the oldest of them has been waiting at most.
  uint64_t demotion_lag_bytes = 0;
  uint64_t demotion_lag_ns = 0;
  uint64_t promoted_extents = 0;  // copied into this root after they were loaded from a lower one
  uint64_t promoted_bytes = 0;
  uint64_t rewritten_extents = 0;  // carried on into this root when their segment was evicted
  uint64_t rewritten_bytes = 0;
  EvictedBytes evicted_bytes;  // by this process; `manual` by anybody
  uint64_t written_bytes = 0;  // by this process: stores, all kinds of copies, journal records
  RootTraffic loaded;
  RootTraffic stored;
  uint64_t timed_out_loads = 0;    // had not come by their deadline
  LatencyCounts journal_lag;       // of others' puts: from their time (their clock) to their being known here
  uint64_t pinned_bytes = 0;       // gauge: segment files that pins hold
  uint64_t damaged_policies = 0;   // times that the file was found damaged
  uint64_t scrubbed_bytes = 0;     // read and checked by this process in the background
  uint64_t scrub_errors = 0;       // extents that were bad or could not be read
  uint64_t scrub_pass_bytes = 0;   // gauge: read in the pass under way, by whomever; 0 = none
  uint64_t scrub_finished_ns = 0;  // gauge: wall clock at the end of the last full pass; 0 = never
  uint64_t gds_errors = 0;         // of cuFile: the extent went the ordinary way
  uint64_t mended_manifests = 0;   // found damaged and written anew
  bool writable = false;
  bool suspended = false;  // gauge: failing, retried in the background
};

/// What the device of a depot holds. All gauges.
struct DeviceUse {
  std::string name;               // "host", "cuda:0"
  uint64_t slab_bytes = 0;        // device memory
  uint64_t pinned_bytes = 0;      // page-locked host memory, registered segments not counted
  uint64_t mapped_bytes = 0;      // segments mapped into this process
  uint64_t registered_bytes = 0;  // of them, what the device reaches without a copy
  uint32_t threads = 0;
};

struct DepotStats {
  TransferStats load;
  TransferStats store;
  DropCounts drops;            // of stores
  uint64_t entries = 0;        // gauge: extents in the catalog
  uint64_t catalog_bytes = 0;  // gauge: memory of the catalog
  uint64_t lookups = 0;
  uint64_t open_nanoseconds = 0;  // what open() took; from its return on lookups know all that is stored
  uint64_t journal_records = 0;   // replayed or tailed
  uint64_t bad_records = 0;       // journal records left alone because they do not decode
  DeviceUse device;
  std::vector<RootStats> roots;
};

/// One JSON object with the fields above, by their names.
std::string to_json(const DepotStats& stats);

}  // namespace tokendepot
