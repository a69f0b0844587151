// One root: a directory that is a depot tier, and the way bytes move in and out of it.
//
// Effect of failure: a root that cannot be opened makes Depot::open fail with one sentence; a root whose file
// system is read-only is served read-only. Files that the depot did not create are left alone.
#pragma once

#include <atomic>
#include <climits>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "device/gds/gds_lane.h"
#include "format/manifest.h"
#include "format/marker.h"
#include "io/engine.h"
#include "io/file.h"
#include "store/keeper_lock.h"
#include "store/segment_files.h"
#include "store/segment_table.h"
#include "tokendepot/depot.h"
#include "tokendepot/error.h"

namespace tokendepot {

/// Leaves room for what the depot appends: the longest is manifests/<64 hex>.json with a temporary suffix.
inline constexpr size_t kMaxRootPathBytes = PATH_MAX - 1 - 128;

class Root {
 public:
  /// Checks the options against the file system, creates marker and directories when the directory is empty
  /// or missing, chooses the transport. `device` and `cufile`, where given, outlive the root.
  static Result<std::unique_ptr<Root>> open(const RootOptions& options, RootIndex index, const Options& depot,
                                            Device* device = nullptr, CuFile* cufile = nullptr);

  RootIndex index() const { return index_; }
  const std::string& path() const { return options_.path; }
  /// Of the marker, 32 hex digits.
  std::string id() const;
  /// As asked for, or the share of the process's memory limit that a root in memory may have.
  uint64_t capacity() const { return options_.capacity_bytes; }
  bool writable() const { return writable_; }
  bool write_through() const { return options_.write_through; }
  /// 0 = no bound but the capacity.
  uint64_t demotion_lag_bound() const { return options_.demotion_lag_bytes; }
  /// Other hosts may write here: a file that is missing, short or not what its journal says may be so for a
  /// moment only, and a lock may be lost to a broken connection.
  bool network() const { return network_; }
  bool mapped() const { return mapped_; }
  /// Only where not mapped.
  IoEngine& engine() const { return *engine_; }
  /// The next load begins while fewer bytes than these are being read for others; UINT64_MAX = no such bound.
  uint64_t most_read_bytes() const { return most_read_bytes_; }
  bool direct() const { return direct_; }
  /// The way between the medium and the device's own memory; null where there is none, or none any more.
  GdsLane* gds() const { return gds_ && gds_->in_use() ? gds_.get() : nullptr; }
  bool has_gds() const { return gds_ != nullptr; }
  uint64_t gds_errors() const { return gds_ ? gds_->errors() : 0; }
  /// How bytes move at present.
  const std::string& transport() const { return gds_ && !gds_->in_use() ? without_gds_ : transport_; }
  /// Measured when the root was opened; 0 = not measured.
  uint64_t read_bytes_per_second() const { return read_bytes_per_second_; }
  const std::string& reason() const { return reason_; }
  SegmentFiles& files() { return *files_; }
  const SegmentFiles& files() const { return *files_; }
  /// On a mapped root whose device registers mappings: maps what is there, hottest first, up to the capacity.
  void map_ahead(const SegmentTable& segments, const std::atomic<bool>& stop);

  std::string segments_dir() const { return path() + "/segments"; }
  std::string journals_dir() const { return path() + "/journals"; }
  std::string manifests_dir() const { return path() + "/manifests"; }

  /// Size of the segment files that are made from now on; grows when extents are attached.
  uint64_t segment_bytes() const { return segment_bytes_; }
  /// What a segment must hold to be of use to what is attached.
  uint64_t largest_extent_bytes() const { return largest_extent_bytes_; }
  /// `invalid_argument` when an extent of this size cannot be kept within the capacity. Where the size of
  /// segments was not stated they become as large as a whole number of such extents, headers included.
  Status fit_extent(uint64_t extent_bytes);

  /// Stores the manifest unless it is there. An equal file is left as it is; a damaged one is told, counted
  /// and replaced. Thread-safe.
  Status keep_manifest(const Manifest& manifest);
  uint64_t mended_manifests() const { return mended_manifests_; }

  /// Sole right to create, recycle and remove segments, held by at most one process, for moments.
  KeeperElection& keeper_election() const { return *election_; }

 private:
  Root() = default;
  Status open_marker();
  void cap_to(const MemoryLimit& limit, const std::string& file_system);
  Status choose_transport(const FileSystemInfo& system, uint32_t io_depth);
  Status choose_gds(CuFile* cufile, uint32_t io_depth);
  /// Whether what is mapped here is registered with a device.
  bool device_registers() const;

  RootOptions options_;
  RootIndex index_ = 0;
  Marker marker_;
  bool writable_ = false;
  bool mapped_ = false;
  bool network_ = false;
  bool direct_ = false;
  uint64_t base_segment_bytes_ = 0;  // before anything was attached
  std::atomic<uint64_t> segment_bytes_ = 0;
  std::atomic<uint64_t> largest_extent_bytes_ = 0;
  std::string transport_;
  std::string without_gds_;
  std::string reason_;
  uint64_t read_bytes_per_second_ = 0;
  uint64_t most_read_bytes_ = UINT64_MAX;
  std::atomic<uint64_t> mended_manifests_ = 0;
  Device* device_ = nullptr;
  std::unique_ptr<IoEngine> engine_;
  std::unique_ptr<GdsLane> gds_;
  std::unique_ptr<SegmentFiles> files_;
  std::unique_ptr<KeeperElection> election_;
};

}  // namespace tokendepot
