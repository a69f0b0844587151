// A root seen from outside: journals replayed read-only, extents checked one by one, records appended to a
// journal of our own. Nothing here trusts another process to stand still: what vanishes meanwhile is reported
// as not found.
#include "tokendepot/tools.h"

#include <algorithm>
#include <array>
#include <map>
#include <optional>
#include <set>
#include <utility>

#include "base/clock.h"
#include "base/errors.h"
#include "format/extent.h"
#include "format/journal.h"
#include "format/manifest.h"
#include "format/marker.h"
#include "io/file.h"
#include "root_files.h"
#include "store/extent_check.h"
#include "store/journal_file.h"
#include "store/scan.h"

namespace tokendepot {
namespace {

struct SegmentTrace {
  bool sealed = false;
  bool condemned = false;
  uint64_t last_used_ns = 0;
};

// What all journals of one root say, taken together. Order between journals does not matter: a segment id or
// an offset in it is never used twice, so what is condemned stays condemned.
struct Replay {
  std::vector<JournalInfo> journals;
  std::map<SegmentId, SegmentTrace> segments;
  std::map<SegmentId, uint64_t> files;  // bytes of the segment files that are there
  std::vector<StoredExtent> extents;    // live, ordered by place
  std::vector<std::string> foreign_files;
};

auto place_of(const StoredExtent& e) {
  return std::pair(e.where.segment, e.where.offset);
}

Status replay_journals(const std::string& path, Replay& replay) {
  const auto entries = entries_of(path + "/journals");
  if (!entries) return std::unexpected(entries.error());
  std::set<std::pair<SegmentId, uint64_t>> condemned;
  for (const DirectoryEntry& entry : *entries) {
    const auto writer = writer_of_journal(entry.name);
    if (is_temporary(entry.name)) continue;
    if (!writer || !entry.regular) {
      replay.foreign_files.push_back("journals/" + entry.name);
      continue;
    }
    JournalInfo info;
    info.writer = *writer;
    info.file = entry.name;
    const std::string file = path + "/journals/" + entry.name;
    info.in_use = has_live_writer(file);
    auto reader = JournalReader::open(file, *writer);
    if (!reader) {
      if (reader.error().kind == ErrorKind::not_found) continue;
      return std::unexpected(reader.error());
    }
    const auto records = reader->read_new([&](const Record& r) {
      SegmentTrace& segment = replay.segments[r.where.segment];
      switch (r.type) {
        case RecordType::put:
          replay.extents.push_back(extent_of(r));
          [[fallthrough]];
        case RecordType::touch:
          segment.last_used_ns = std::max(segment.last_used_ns, r.time_ns);
          break;
        case RecordType::seal:
        case RecordType::adopt_segment:
          segment.sealed = true;
          break;
        case RecordType::condemn_extent:
          condemned.emplace(r.where.segment, r.where.offset);
          break;
        case RecordType::condemn_segment:
          segment.condemned = true;
          break;
        case RecordType::open_segment:
          break;
      }
    });
    if (!records) return std::unexpected(records.error());
    info.records = *records;
    info.bad_records = reader->bad_records();
    info.damaged = info.bad_records > 0 || (reader->has_tail() && !info.in_use);
    replay.journals.push_back(std::move(info));
  }
  std::erase_if(replay.extents, [&](const StoredExtent& e) {
    return replay.segments[e.where.segment].condemned || condemned.contains(place_of(e));
  });
  return {};
}

Status list_segment_files(const std::string& path, Replay& replay) {
  const auto entries = entries_of(path + "/segments");
  if (!entries) return std::unexpected(entries.error());
  for (const DirectoryEntry& entry : *entries) {
    const auto id = segment_of_name(entry.name);
    if (id && entry.regular) {
      replay.files[*id] = entry.bytes;
    } else if (!is_temporary(entry.name)) {
      replay.foreign_files.push_back("segments/" + entry.name);
    }
  }
  return {};
}

Result<Replay> replay_root(const std::string& path) {
  Replay replay;
  if (auto replayed = replay_journals(path, replay); !replayed) return std::unexpected(replayed.error());
  // Listed after reading: a record follows the file that it speaks of.
  if (auto listed = list_segment_files(path, replay); !listed) return std::unexpected(listed.error());
  std::erase_if(replay.extents,
                [&](const StoredExtent& e) { return !replay.files.contains(e.where.segment); });
  std::ranges::sort(replay.extents, {}, place_of);
  drop_overlapping(replay.extents);  // copies of records among them
  return replay;
}

// What is at the top of a root besides the depot's own.
Status list_foreign_at_top(const std::string& path, Replay& replay) {
  constexpr std::array<std::string_view, 11> kOurs{
      "DEPOT",    "manifests",     "segments",     "journals",   "keeper.lock", "identity-cache.json",
      "policies", "policies.lock", "keeper-notes", "scrub.lock", "lost+found"};
  const auto entries = list_directory(path);
  if (!entries) return std::unexpected(entries.error());
  for (const DirectoryEntry& entry : *entries) {
    if (std::ranges::find(kOurs, entry.name) == kOurs.end() && !is_temporary(entry.name)) {
      replay.foreign_files.push_back(entry.name);
    }
  }
  return {};
}

NamespaceInfo read_namespace(const std::string& file, const NamespaceDigest& digest) {
  NamespaceInfo info;
  info.digest_hex = to_hex(digest.bytes);
  const auto bytes = read_file(file, kMaxManifestBytes);
  if (bytes) {
    const auto manifest =
        check_manifest({reinterpret_cast<const char*>(bytes->data()), bytes->size()}, digest);
    if (manifest) info.manifest = manifest->canonical;
  }
  info.damaged = info.manifest.empty();
  return info;
}

Result<std::vector<NamespaceInfo>> read_namespaces(const std::string& path, Replay& replay) {
  const auto entries = entries_of(path + "/manifests");
  if (!entries) return std::unexpected(entries.error());
  std::map<uint64_t, NamespaceInfo> by_prefix;
  for (const DirectoryEntry& entry : *entries) {
    const auto digest = digest_of_manifest(entry.name);
    if (digest && entry.regular) {
      by_prefix.emplace(prefix_of(*digest), read_namespace(path + "/manifests/" + entry.name, *digest));
    } else if (!is_temporary(entry.name)) {
      replay.foreign_files.push_back("manifests/" + entry.name);
    }
  }
  for (const StoredExtent& extent : replay.extents) {
    const auto [at, missing] = by_prefix.try_emplace(extent.ns_prefix);
    NamespaceInfo& info = at->second;
    if (missing) {
      std::array<uint8_t, 32> bytes{};
      for (size_t i = 0; i < 8; ++i) bytes[i] = static_cast<uint8_t>(extent.ns_prefix >> (8 * i));
      info.digest_hex = to_hex(bytes).substr(0, 16);
      info.damaged = true;
    }
    ++info.extents;
    info.bytes += extent.where.bytes;
  }
  std::vector<NamespaceInfo> namespaces;
  namespaces.reserve(by_prefix.size());
  for (auto& [prefix, info] : by_prefix) namespaces.push_back(std::move(info));
  std::ranges::sort(namespaces, {}, &NamespaceInfo::digest_hex);
  return namespaces;
}

std::vector<SegmentInfo> describe_segments(const Replay& replay) {
  std::map<SegmentId, SegmentInfo> infos;
  for (const auto& [id, bytes] : replay.files) {
    SegmentInfo info;
    info.id = id;
    info.file = segment_name(id);
    info.file_bytes = bytes;
    if (const auto trace = replay.segments.find(id); trace != replay.segments.end()) {
      info.sealed = trace->second.sealed;
      info.last_used_ns = trace->second.last_used_ns;
    }
    infos.emplace(id, std::move(info));
  }
  for (const StoredExtent& extent : replay.extents) {
    SegmentInfo& info = infos.at(extent.where.segment);
    ++info.extents;
    info.live_bytes += extent.where.bytes;
  }
  std::vector<SegmentInfo> segments;
  segments.reserve(infos.size());
  for (auto& [id, info] : infos) segments.push_back(std::move(info));
  return segments;
}

// Asks without writing: direct I/O is tried on a segment that is there.
std::string transport_of(const std::string& path, const FileSystemInfo& file_system, const Replay& replay) {
  if (file_system.memory) return "mapped";
  if (replay.files.empty()) return "";
  const auto segment =
      File::open(path + "/segments/" + segment_name(replay.files.begin()->first), {.direct = true});
  if (segment) return "direct";
  return segment.error().kind == ErrorKind::unsupported ? "buffered" : "";
}

constexpr std::string_view kMovedAway = "the segment has gone meanwhile";

}  // namespace

Result<RootInfo> inspect_root(const std::string& path) {
  const auto marker = read_marker(path);
  if (!marker) return std::unexpected(marker.error());
  const auto file_system = file_system_of(path);
  if (!file_system) return std::unexpected(file_system.error());
  auto replay = replay_root(path);
  if (!replay) return std::unexpected(replay.error());
  if (auto listed = list_foreign_at_top(path, *replay); !listed) return std::unexpected(listed.error());
  auto namespaces = read_namespaces(path, *replay);
  if (!namespaces) return std::unexpected(namespaces.error());

  RootInfo info;
  info.path = path;
  std::array<uint8_t, 32> id{};
  std::ranges::copy(marker->root_id, id.begin());
  info.root_id_hex = to_hex(id).substr(0, 2 * marker->root_id.size());
  info.format_version = kFormatVersion;  // the only one that decode_marker() accepts
  info.created_ns = marker->created_ns;
  info.file_system = file_system->type;
  info.available_bytes = file_system->available_bytes;
  info.transport = transport_of(path, *file_system, *replay);
  info.namespaces = std::move(*namespaces);
  info.segments = describe_segments(*replay);
  info.journals = std::move(replay->journals);
  std::ranges::sort(info.journals, {}, &JournalInfo::writer);
  info.foreign_files = std::move(replay->foreign_files);
  std::ranges::sort(info.foreign_files);
  return info;
}

Result<std::vector<StoredExtent>> list_extents(const std::string& path) {
  if (const auto marker = read_marker(path); !marker) return std::unexpected(marker.error());
  auto replay = replay_root(path);
  if (!replay) return std::unexpected(replay.error());
  return std::move(replay->extents);
}

Status verify_extent(const std::string& path, const StoredExtent& extent) {
  const std::string name = path + "/segments/" + segment_name(extent.where.segment);
  const std::string where = fmt::format("{} at {}", name, extent.where.offset);
  const auto file = File::open(name, {});
  if (!file) {
    if (file.error().kind == ErrorKind::not_found)
      return fail(ErrorKind::not_found, "{}: {}", where, kMovedAway);
    return std::unexpected(file.error());
  }
  const auto bytes = credible_bytes(*file);
  if (!bytes) return std::unexpected(bytes.error());
  return check_extent(*file, *bytes, extent, where);
}

Result<uint64_t> remove_extents(const std::string& path, const std::vector<StoredExtent>& extents,
                                Cause cause) {
  const auto live = list_extents(path);
  if (!live) return std::unexpected(live.error());
  std::set<std::pair<SegmentId, uint64_t>> wanted;
  for (const StoredExtent& extent : extents) wanted.insert(place_of(extent));
  std::vector<Record> records;
  for (const StoredExtent& extent : *live) {
    if (!wanted.contains(place_of(extent))) continue;
    Record& record = records.emplace_back(record_of(extent));
    record.type = RecordType::condemn_extent;
    set_cause(record, cause);
    record.time_ns = system_clock().wall_ns();
  }
  if (records.empty()) return 0;
  auto journal = JournalWriter::create(path + "/journals");
  if (!journal) return std::unexpected(journal.error());
  if (auto written = journal->append(records); !written) return std::unexpected(written.error());
  if (auto synced = journal->sync(); !synced) return std::unexpected(synced.error());
  return records.size();
}

Result<Evicted> evict_segments(const std::string& path, uint64_t bytes, bool dry_run) {
  if (const auto marker = read_marker(path); !marker) return std::unexpected(marker.error());
  std::optional<KeeperLock> keeper;  // held to the end
  if (!dry_run) {
    auto locked = lock_keeper(path);
    if (!locked) return std::unexpected(locked.error());
    keeper = std::move(*locked);
  }
  const auto replay = replay_root(path);
  if (!replay) return std::unexpected(replay.error());
  auto segments = describe_segments(*replay);
  std::erase_if(segments, [](const SegmentInfo& s) { return !s.sealed; });
  const auto rules = inspect_policies(path);
  if (!rules) return std::unexpected(rules.error());
  std::erase_if(segments, [&](const SegmentInfo& s) { return rules->pinned_segments.contains(s.id); });
  std::ranges::sort(segments, {}, [](const SegmentInfo& s) { return std::pair(s.last_used_ns, s.id); });

  Evicted evicted;
  std::optional<JournalWriter> journal;
  for (const SegmentInfo& segment : segments) {
    if (evicted.bytes >= bytes) break;
    if (!dry_run) {
      if (!journal) {
        auto created = JournalWriter::create(path + "/journals");
        if (!created) return std::unexpected(created.error());
        journal = std::move(*created);
      }
      // The record first: a reader that obeys it stops promising what is about to vanish.
      Record record;
      record.type = RecordType::condemn_segment;
      set_cause(record, Cause::manual);
      record.where.segment = segment.id;
      record.time_ns = system_clock().wall_ns();
      if (auto written = journal->append(record); !written) return std::unexpected(written.error());
      auto removed = remove_file(path + "/segments/" + segment.file);
      if (!removed && removed.error().kind != ErrorKind::not_found) return std::unexpected(removed.error());
      (void)keeper->note({{segment.id}, 0});  // engines that are not told find out at their next listing
      if (!removed) continue;
    }
    ++evicted.segments;
    evicted.bytes += segment.file_bytes;
  }
  return evicted;
}

}  // namespace tokendepot
