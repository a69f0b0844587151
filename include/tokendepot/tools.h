// Reading and tending a root from outside, without being an engine: what the CLI is made of.
// Safe while engines run.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "tokendepot/depot.h"
#include "tokendepot/error.h"
#include "tokendepot/key.h"
#include "tokendepot/layout.h"
#include "tokendepot/plan.h"
#include "tokendepot/tending.h"

namespace tokendepot {

struct StoredExtent {
  Key key;
  uint64_t ns_prefix = 0;  // first 8 bytes of the namespace digest
  uint16_t group = 0;
  LayoutKind kind = LayoutKind::canonical;
  Part part;
  uint32_t tokens = 0;
  ExtentRef where;
  uint64_t stored_at_ns = 0;  // wall clock
};

struct SegmentInfo {
  SegmentId id;
  std::string file;  // name under segments/
  uint64_t file_bytes = 0;
  uint64_t live_bytes = 0;  // of extents that the journals still speak of
  uint64_t extents = 0;
  bool sealed = false;
  uint64_t last_used_ns = 0;  // wall clock, from puts and touches
};

struct JournalInfo {
  uint64_t writer = 0;
  std::string file;
  uint64_t records = 0;
  uint64_t bad_records = 0;  // records that do not decode, between good ones
  bool damaged = false;      // bad records, or bytes behind the last good one that no live writer is adding
  bool in_use = false;       // a live writer holds its lock
};

struct NamespaceInfo {
  std::string digest_hex;  // from the file name; its first 16 digits when extents name it but no file does
  std::string manifest;    // JSON text, empty when damaged or missing
  bool damaged = false;
  uint64_t extents = 0;
  uint64_t bytes = 0;
};

struct RootInfo {
  std::string path;
  std::string root_id_hex;
  uint32_t format_version = 0;
  uint64_t created_ns = 0;
  std::string file_system;       // "tmpfs", "ext4", ...
  uint64_t available_bytes = 0;  // on that file system
  std::string transport;  // what "auto" finds here: "mapped", "direct", "buffered"; "" = no segment to ask
  std::vector<NamespaceInfo> namespaces;
  std::vector<SegmentInfo> segments;
  std::vector<JournalInfo> journals;
  std::vector<std::string> foreign_files;  // paths below the root that are not the depot's; left alone
};

/// `not_found` / `corrupt` / `unsupported` / `permission` when `path` is not a readable root.
Result<RootInfo> inspect_root(const std::string& path);
Result<std::vector<StoredExtent>> list_extents(const std::string& path);

/// Reads one extent and checks its header against `extent` and every shard digest. Errors: not_found,
/// corrupt, io.
Status verify_extent(const std::string& path, const StoredExtent& extent);

/// Journals that these extents are to be forgotten, and why; live engines obey at their next poll. Returns
/// how many.
Result<uint64_t> remove_extents(const std::string& path, const std::vector<StoredExtent>& extents,
                                Cause cause = Cause::manual);

struct Evicted {
  uint64_t segments = 0;
  uint64_t bytes = 0;
};
/// Condemns and removes the coldest sealed segments that are not pinned until at least `bytes` of the root
/// are freed (or none is left). With `dry_run` only says what it would do.
Result<Evicted> evict_segments(const std::string& path, uint64_t bytes, bool dry_run = false);

struct PolicyInfo {
  Policies policies;                    // as they are in the file, ended pins included
  std::vector<uint64_t> bytes;          // of live extents that each rule is about
  std::string damage;                   // why the file counts as absent; empty = it is whole, or not there
  KeeperNotes notes;                    // zeros where there are none that can be read
  uint64_t pinned_bytes = 0;            // segment files that pins in force hold
  std::set<SegmentId> pinned_segments;  // those files
};
/// The rules of a root and what they come to now.
Result<PolicyInfo> inspect_policies(const std::string& path);

/// Adds a rule, or puts it in the place of the one of the same kind, namespace and keys; engines obey within
/// two seconds. `capacity_bytes` 0 = as the keeper noted it. Errors: invalid_argument (a rule that cannot be;
/// a pin beyond 1 / kPinShare of the capacity, with the figures; capacity not known), corrupt or unsupported
/// (the file that is there is left alone), busy, permission. With `dry_run` only says whether it would.
Status set_policy(const std::string& path, Policy policy, uint64_t capacity_bytes = 0, bool dry_run = false);

/// Takes back the rules of this kind and namespace, of a pin only the one with these keys where they are
/// given. Returns how many.
Result<uint64_t> drop_policies(const std::string& path, Policy::Kind kind, const NamespaceDigest& ns,
                               const std::optional<std::vector<Key>>& keys, bool dry_run = false);

}  // namespace tokendepot
