#include "tokendepot/repair.h"

#include <openssl/rand.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <map>
#include <optional>
#include <set>
#include <utility>

#include "base/clock.h"
#include "base/errors.h"
#include "format/journal.h"
#include "format/manifest.h"
#include "format/marker.h"
#include "root_files.h"
#include "store/extent_check.h"
#include "store/journal_file.h"
#include "store/scan.h"
#include "tokendepot/tools.h"

namespace tokendepot {
namespace {

using Place = std::pair<SegmentId, uint64_t>;

/// One journal, every record looked at for itself: readers cannot tell damage from another version.
struct JournalContent {
  uint64_t writer = 0;
  bool live = false;
  std::vector<Record> records;
  uint64_t bad = 0;
  bool damaged() const { return bad > 0 && !live; }
};

struct Account {
  std::map<std::string, JournalContent> journals;  // by file name
  std::set<Place> puts;
  std::set<Place> sound_puts;  // those that a journal without damage has
  std::set<Place> condemned;
  std::set<SegmentId> condemned_segments;
  std::set<SegmentId> sealed;
  std::set<SegmentId> opened;
};

Result<JournalContent> read_journal(const std::string& file, uint64_t writer) {
  JournalContent content;
  content.writer = writer;
  content.live = has_live_writer(file);
  const auto opened = File::open(file, {});
  if (!opened) return std::unexpected(opened.error());
  const auto size = opened->size();
  if (!size) return std::unexpected(size.error());
  constexpr uint64_t kPiece = 8192;  // records
  std::vector<std::byte> buffer;
  for (uint64_t index = 0; index < *size / kRecordBytes;) {
    const uint64_t count = std::min(kPiece, *size / kRecordBytes - index);
    buffer.resize(count * kRecordBytes);
    if (auto read = opened->read_at(buffer, index * kRecordBytes); !read)
      return std::unexpected(read.error());
    for (uint64_t i = 0; i < count; ++i, ++index) {
      auto record = decode_record(
          std::span<const std::byte, kRecordBytes>(buffer.data() + i * kRecordBytes, kRecordBytes), writer,
          index);
      if (record) {
        content.records.push_back(*record);
      } else if (record.error().kind == ErrorKind::unsupported) {
        return fail(ErrorKind::unsupported, "{}: {}", file, record.error().message);
      } else {
        ++content.bad;
      }
    }
  }
  if (*size % kRecordBytes != 0) ++content.bad;
  return content;
}

Result<Account> read_account(const std::string& path) {
  Account account;
  const auto entries = entries_of(path + "/journals");
  if (!entries) return std::unexpected(entries.error());
  for (const DirectoryEntry& entry : *entries) {
    const auto writer = writer_of_journal(entry.name);
    if (!writer || !entry.regular) continue;
    auto content = read_journal(path + "/journals/" + entry.name, *writer);
    if (!content && content.error().kind == ErrorKind::not_found) continue;  // compacted away
    if (!content) return std::unexpected(content.error());
    for (const Record& r : content->records) {
      const Place place(r.where.segment, r.where.offset);
      if (r.type == RecordType::put) account.puts.insert(place);
      if (r.type == RecordType::put && content->bad == 0) account.sound_puts.insert(place);
      if (r.type == RecordType::condemn_extent) account.condemned.insert(place);
      if (r.type == RecordType::condemn_segment) account.condemned_segments.insert(r.where.segment);
      if (r.type == RecordType::seal || r.type == RecordType::adopt_segment)
        account.sealed.insert(r.where.segment);
      if (r.type == RecordType::open_segment || r.type == RecordType::adopt_segment)
        account.opened.insert(r.where.segment);
    }
    account.journals.emplace(entry.name, std::move(*content));
  }
  return account;
}

/// A segment with extents that no journal speaks of.
struct FoundSegment {
  SegmentId id;
  uint64_t file_bytes = 0;
  uint64_t end = 0;
  std::vector<Record> puts;
};

class Repair {
 public:
  Repair(const std::string& path, const std::vector<std::string>& sources) : path_(path), sources_(sources) {}

  Status examine(const std::function<void(uint64_t, uint64_t)>& progress);
  Status apply();
  RepairReport& report() { return report_; }

 private:
  Status examine_segments(const std::function<void(uint64_t, uint64_t)>& progress);
  Status examine_segment(const SegmentId& id, const DirectoryEntry& entry);
  Status examine_manifests();
  void examine_journals();
  Status list_foreign();
  void collect_manifests(const std::string& root, std::map<NamespaceDigest, std::string>& texts);
  Status restore_marker();
  Status restore_journals();

  const std::string& path_;
  const std::vector<std::string>& sources_;
  Account account_;
  std::vector<FoundSegment> found_;
  std::set<NamespaceDigest> namespaces_;  // that headers name
  std::vector<std::pair<NamespaceDigest, std::string>> manifests_;
  RepairReport report_;
};

Status Repair::examine(const std::function<void(uint64_t, uint64_t)>& progress) {
  const auto marker = read_marker(path_);
  if (!marker && marker.error().kind == ErrorKind::not_found) {
    if (const auto there = list_directory(path_); !there) {
      return there.error().os_errno == ENOTDIR ? std::unexpected(marker.error())
                                               : std::unexpected(there.error());
    }
    report_.marker = RepairReport::Marker::missing;
  } else if (!marker && marker.error().kind == ErrorKind::corrupt) {
    report_.marker = RepairReport::Marker::damaged;
  } else if (!marker) {
    return std::unexpected(marker.error());
  }
  auto account = read_account(path_);
  if (!account) return std::unexpected(account.error());
  account_ = std::move(*account);
  if (auto done = examine_segments(progress); !done) return done;
  const bool has_records =
      std::ranges::any_of(account_.journals, [](const auto& j) { return !j.second.records.empty(); });
  if (report_.marker != RepairReport::Marker::sound && !has_records && namespaces_.empty()) {
    return fail(
        ErrorKind::not_found,
        "{} is not the root of a depot: it has no file DEPOT that can be read, and nothing that a depot "
        "has written",
        path_);
  }
  examine_journals();
  if (auto done = examine_manifests(); !done) return done;
  return list_foreign();
}

Status Repair::examine_segments(const std::function<void(uint64_t, uint64_t)>& progress) {
  const auto entries = entries_of(path_ + "/segments");
  if (!entries) return std::unexpected(entries.error());
  uint64_t total = 0;
  uint64_t done = 0;
  for (const DirectoryEntry& entry : *entries) total += entry.bytes;
  for (const DirectoryEntry& entry : *entries) {
    const auto id = segment_of_name(entry.name);
    if (id && entry.regular) {
      if (auto examined = examine_segment(*id, entry); !examined) return examined;
    } else if (!is_temporary(entry.name)) {
      report_.left.push_back({"segments/" + entry.name, "not the depot's"});
    }
    done += entry.bytes;
    if (progress) progress(done, total);
  }
  return {};
}

Status Repair::examine_segment(const SegmentId& id, const DirectoryEntry& entry) {
  const std::string name = "segments/" + entry.name;
  if (account_.condemned_segments.contains(id)) return {};  // engines remove what is left of it
  const auto journal = account_.journals.find(journal_name(id.writer));
  if (journal != account_.journals.end() && journal->second.live && !account_.sealed.contains(id)) {
    report_.left.push_back({name, "a running engine fills it"});
    return {};
  }
  const auto file = File::open(path_ + "/" + name, {});
  if (!file && file.error().kind == ErrorKind::not_found) return {};  // recycled meanwhile
  if (!file) return std::unexpected(file.error());
  FoundSegment segment{id, entry.bytes, 0, {}};
  const auto end = scan_extents(
      *file, id, 0, false,
      [&](const ExtentHeader& header, uint64_t bytes) {
        namespaces_.insert(header.ns);
        const Place place(id, header.offset);
        if (account_.puts.contains(place) || account_.condemned.contains(place)) return;
        segment.puts.push_back(put_of(header, bytes));
      },
      entry.bytes);
  if (!end) return std::unexpected(end.error());
  segment.end = *end;
  const auto damaged =
      std::erase_if(segment.puts, [&](const Record& put) { return !verify_extent(path_, extent_of(put)); });
  report_.damaged_extents += damaged;
  if (segment.puts.empty()) return {};
  uint64_t bytes = 0;
  for (const Record& put : segment.puts) bytes += put.where.bytes;
  report_.segments.push_back({entry.name, segment.puts.size(), bytes});
  found_.push_back(std::move(segment));
  return {};
}

void Repair::examine_journals() {
  for (const auto& [file, content] : account_.journals) {
    if (content.damaged()) {
      report_.journals.push_back({file, content.records.size(), content.bad});
    } else if (content.bad > 0) {
      report_.left.push_back({"journals/" + file, "damaged or being written, and a running engine's"});
    }
  }
}

void Repair::collect_manifests(const std::string& root, std::map<NamespaceDigest, std::string>& texts) {
  const auto entries = list_directory(root + "/manifests");
  if (!entries) return;
  for (const DirectoryEntry& entry : *entries) {
    if (!entry.regular || entry.bytes > kMaxManifestBytes) continue;
    const auto bytes = read_file(root + "/manifests/" + entry.name, kMaxManifestBytes);
    if (!bytes) continue;
    auto manifest = make_manifest({reinterpret_cast<const char*>(bytes->data()), bytes->size()});
    if (manifest) texts.emplace(manifest->digest, std::move(manifest->canonical));
  }
}

Status Repair::examine_manifests() {
  // Whatever a file is called: its content proves which namespace it is.
  std::map<NamespaceDigest, std::string> texts;
  collect_manifests(path_, texts);
  for (const std::string& source : sources_) {
    if (const auto marker = read_marker(source); !marker) return std::unexpected(marker.error());
    collect_manifests(source, texts);
  }
  for (const NamespaceDigest& ns : namespaces_) {
    const std::string hex = to_hex(ns.bytes);
    const auto stored = read_file(path_ + "/manifests/" + hex + ".json", kMaxManifestBytes);
    if (stored && check_manifest({reinterpret_cast<const char*>(stored->data()), stored->size()}, ns))
      continue;
    if (const auto text = texts.find(ns); text != texts.end()) {
      report_.manifests.push_back(hex);
      manifests_.emplace_back(ns, text->second);
    } else {
      report_.lost_manifests.push_back(hex);
    }
  }
  return {};
}

Status Repair::list_foreign() {
  for (const char* const directory : {"journals", "manifests"}) {
    const auto entries = entries_of(path_ + "/" + directory);
    if (!entries) return std::unexpected(entries.error());
    for (const DirectoryEntry& entry : *entries) {
      const bool ours = entry.regular && (directory[0] == 'j' ? writer_of_journal(entry.name).has_value()
                                                              : digest_of_manifest(entry.name).has_value());
      if (!ours && !is_temporary(entry.name))
        report_.left.push_back({std::string(directory) + "/" + entry.name, "not the depot's"});
    }
  }
  std::ranges::sort(report_.left, {}, &RepairReport::Left::file);
  std::ranges::sort(report_.segments, {}, &RepairReport::Segment::file);
  return {};
}

Status Repair::restore_marker() {
  Marker fresh;  // the old id is lost; nothing but labels was made of it
  fresh.created_ns = system_clock().wall_ns();
  if (RAND_bytes(fresh.root_id.data(), static_cast<int>(fresh.root_id.size())) != 1)
    return fail(ErrorKind::io, "{}: no random bytes for a root id", path_);
  std::array<std::byte, kPageBytes> page;
  encode_marker(fresh, page);
  if (report_.marker == RepairReport::Marker::damaged) return write_file_atomically(path_ + "/DEPOT", page);
  if (auto made = write_new_file_atomically(path_ + "/DEPOT", page); !made)
    return std::unexpected(made.error());
  return {};
}

Status Repair::apply() {
  if (report_.marker != RepairReport::Marker::sound) {
    if (auto restored = restore_marker(); !restored) return restored;
  }
  for (const auto& [ns, text] : manifests_) {
    if (auto made = make_directory(path_ + "/manifests"); !made) return made;
    const std::string file = path_ + "/manifests/" + to_hex(ns.bytes) + ".json";
    if (auto written = write_file_atomically(file, std::as_bytes(std::span(text))); !written) return written;
  }
  if (found_.empty() && report_.journals.empty()) return {};
  return restore_journals();
}

Status Repair::restore_journals() {
  if (auto made = make_directory(path_ + "/journals"); !made) return made;
  const auto keeper = lock_keeper(path_);  // nothing is recycled or removed from here on
  if (!keeper) return std::unexpected(keeper.error());
  // The locks of the dead first: their journals cannot change any more when they are read again.
  std::map<std::string, JournalWriter> taken;
  for (const RepairReport::Journal& journal : report_.journals) {
    const uint64_t writer = *writer_of_journal(journal.file);
    auto locked = JournalWriter::lock(path_ + "/journals/" + journal.file, writer);
    if (!locked && locked.error().kind != ErrorKind::not_found) return std::unexpected(locked.error());
    if (locked && *locked) taken.emplace(journal.file, std::move(**locked));
  }
  const auto now = read_account(path_);
  if (!now) return std::unexpected(now.error());

  std::vector<Record> records;
  std::map<SegmentId, uint64_t> ends;  // of segments to seal
  for (const auto& [file, journal] : taken) {
    const auto content = now->journals.find(file);
    if (content == now->journals.end()) continue;
    for (const Record& r : content->second.records) {
      const Place place(r.where.segment, r.where.offset);
      if (r.type == RecordType::put && now->sound_puts.contains(place)) continue;
      records.push_back(r);
      // Half-filled segments are found by the journal of their writer, which goes: so they are filled no
      // more.
      if (r.where.segment.writer == content->second.writer && r.type == RecordType::put)
        ends[r.where.segment] = std::max(ends[r.where.segment], r.where.offset + r.where.bytes);
      if (r.where.segment.writer == content->second.writer && r.type == RecordType::open_segment)
        ends.try_emplace(r.where.segment, 0);
    }
  }
  for (const FoundSegment& segment : found_) {
    const auto file = File::open(path_ + "/segments/" + segment_name(segment.id), {});
    if (!file || now->condemned_segments.contains(segment.id)) continue;  // evicted since
    if (!now->opened.contains(segment.id)) {
      Record& adopt = records.emplace_back();
      adopt.type = RecordType::adopt_segment;
      adopt.where = {segment.id, 0, align_up(segment.file_bytes)};
    }
    for (const Record& put : segment.puts) {
      const Place place(put.where.segment, put.where.offset);
      if (!now->puts.contains(place) && !now->condemned.contains(place)) records.push_back(put);
    }
    ends[segment.id] = std::max(ends[segment.id], segment.end);
  }
  for (const auto& [id, end] : ends) {
    if (now->sealed.contains(id) || now->condemned_segments.contains(id)) continue;
    Record& seal = records.emplace_back();
    seal.type = RecordType::seal;
    seal.where = {id, end, 0};
  }
  const uint64_t time = system_clock().wall_ns();
  for (Record& record : records) {
    if (record.time_ns == 0) record.time_ns = time;
  }
  if (!records.empty()) {
    auto journal = JournalWriter::create(path_ + "/journals");
    if (!journal) return std::unexpected(journal.error());
    if (auto written = journal->append(records); !written) return written;
    if (auto synced = journal->sync(); !synced) return synced;
  }
  for (const auto& [file, journal] : taken) {
    if (auto removed = remove_file(journal.path()); !removed) return removed;
  }
  return {};
}

}  // namespace

Result<RepairReport> repair_root(const std::string& path, const std::vector<std::string>& sources, bool apply,
                                 const std::function<void(uint64_t done, uint64_t total)>& progress) {
  Repair repair(path, sources);
  if (auto examined = repair.examine(progress); !examined) return std::unexpected(examined.error());
  if (apply) {
    if (auto applied = repair.apply(); !applied) return std::unexpected(applied.error());
  }
  return std::move(repair.report());
}

}  // namespace tokendepot
