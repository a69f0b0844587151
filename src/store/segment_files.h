// Open segment files of one root: descriptors and mappings, cached, counted while in use, bounded in number.
#pragma once

#include <atomic>
#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "device/gds/gds_lane.h"
#include "io/file.h"
#include "store/segment_mapping.h"
#include "tokendepot/error.h"
#include "tokendepot/plan.h"

namespace tokendepot {

struct SegmentFile {
  SegmentId id;
  File file;
  CuFileHandle gds;        // only where cuFile takes the file; ends before the descriptor does
  SegmentMapping mapping;  // only on mapped roots
  uint64_t bytes = 0;      // size when opened
  bool writable = false;
  bool direct = false;  // false: its bytes go through the page cache, if it is not mapped
  uint32_t leases = 0;  // guarded by the cache's mutex
  bool doomed = false;  // close when the last lease ends
  uint64_t last_lease = 0;
};

class SegmentFiles;

/// Keeps a SegmentFile open. Move-only.
class SegmentLease {
 public:
  SegmentLease() = default;
  SegmentLease(SegmentLease&& other) noexcept;
  SegmentLease& operator=(SegmentLease&& other) noexcept;
  ~SegmentLease();
  SegmentFile* operator->() const { return file_; }
  explicit operator bool() const { return file_ != nullptr; }

 private:
  friend class SegmentFiles;
  SegmentLease(SegmentFiles* owner, SegmentFile* file) : owner_(owner), file_(file) {}
  SegmentFiles* owner_ = nullptr;
  SegmentFile* file_ = nullptr;
};

/// Thread-safe.
class SegmentFiles {
 public:
  /// `device`, which may be null, gets to know the mappings of a mapped root; it must live longer.
  /// `map_writable`: the segments of other processes, too, so that their mappings can be registered and serve
  /// again when a segment is recycled. `gds`, when given, is asked to take every file; it must live longer.
  SegmentFiles(std::string directory, bool mapped, bool direct, size_t max_open, Device* device = nullptr,
               bool map_writable = false, GdsLane* gds = nullptr);

  /// Opens the segment for reading, or hands out the copy that is open already. `not_found` when there is no
  /// file.
  Result<SegmentLease> open(const SegmentId& id) { return open(id, SegmentMapping::kHottest); }
  /// Maps a segment that nobody has asked for yet, unless it is open. False: the bound of open files is
  /// reached.
  bool map_ahead(const SegmentId& id, uint64_t heat);
  /// Puts in a file that this process writes. Replaces a copy opened for reading.
  /// `mapping`, when it is of the same file, saves mapping and populating it again.
  Result<SegmentLease> adopt(const SegmentId& id, File file, SegmentMapping mapping = {});
  /// Takes the writable mapping of a file that nobody uses out of the cache, for the file's next life. Empty
  /// when there is none.
  SegmentMapping take_mapping(const SegmentId& id);
  /// One more lease of the same open file, also when it was dropped meanwhile.
  SegmentLease share(const SegmentLease& lease);
  /// Lets go of the file as soon as nobody uses it: the segment was recycled or removed.
  void drop(const SegmentId& id);

  /// So many files are kept open when nobody uses them.
  size_t most_open() const { return max_open_; }
  std::string path_of(const SegmentId& id) const;
  uint64_t mapped_bytes() const;

 private:
  friend class SegmentLease;
  void release(SegmentFile* file);
  void close_idle(size_t keep);
  void drop_locked(const SegmentId& id);
  Result<SegmentLease> open(const SegmentId& id, uint64_t heat);
  Result<SegmentLease> insert(std::unique_ptr<SegmentFile> file, bool map_writable, uint64_t heat);

  const std::string directory_;
  const bool mapped_;
  const bool direct_;
  const size_t max_open_;
  Device* const device_;
  const bool map_writable_;
  GdsLane* const gds_;
  std::atomic<bool> told_fall_back_ = false;
  mutable std::mutex mutex_;
  uint64_t lease_clock_ = 0;
  std::map<SegmentId, std::unique_ptr<SegmentFile>> files_;
  std::list<std::unique_ptr<SegmentFile>> doomed_;  // dropped while leased
};

}  // namespace tokendepot
