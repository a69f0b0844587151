// Counters of one open Depot. Every field only grows while the handle is open; gauges say so.
#pragma once

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

/// Bytes by the way that really carried them between a medium and where they are used.
struct PathBytes {
  uint64_t mapped = 0;      // out of, or into, mapped memory
  uint64_t direct = 0;      // O_DIRECT and the host's slab; headers on the gds ways, too
  uint64_t buffered = 0;    // page cache and the host's slab
  uint64_t gds_p2p = 0;     // cuFile, past the host
  uint64_t gds_compat = 0;  // cuFile, through host memory of its own
};

struct TransferStats {
  uint64_t extents = 0;
  uint64_t bytes = 0;        // payload and header bytes moved
  uint64_t nanoseconds = 0;  // sum over extents, submit to done
  PathBytes by_path;         // of `bytes`; what is placed after a hold came only once
  FailureCounts failures;
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
  std::string transport;  // "mapped", "direct-threads", "buffered-uring", "gds-p2p", "gds-compat", ...
  std::string reason;     // why this transport was chosen
  uint64_t read_bytes_per_second = 0;  // measured when the root was opened; 0 = not measured
  uint64_t capacity_bytes = 0;
  uint64_t used_bytes = 0;  // gauge: segment files on the medium, but for those that others have ready
  uint64_t segments = 0;    // gauge
  uint64_t evicted_segments = 0;
  uint64_t demoted_segments = 0;
  EvictedBytes evicted_bytes;      // by this process; `manual` by anybody
  uint64_t pinned_bytes = 0;       // gauge: segment files that pins hold
  uint64_t damaged_policies = 0;   // times that the file was found damaged
  uint64_t scrubbed_bytes = 0;     // read and checked by this process in the background
  uint64_t scrub_errors = 0;       // extents that were bad or could not be read
  uint64_t scrub_pass_bytes = 0;   // gauge: read in the pass under way, by whomever; 0 = none
  uint64_t scrub_finished_ns = 0;  // gauge: wall clock at the end of the last full pass; 0 = never
  uint64_t gds_errors = 0;         // of cuFile: the extent went the ordinary way, or was not stored
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
