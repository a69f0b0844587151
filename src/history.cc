#include "tokendepot/history.h"

#include <map>
#include <set>
#include <utility>

#include "format/journal.h"
#include "root_files.h"
#include "store/extent_check.h"
#include "store/journal_file.h"

namespace tokendepot {

Result<std::vector<PastExtent>> trace_extents(const std::string& path, std::span<const Key> keys) {
  if (const auto marker = read_marker(path); !marker) return std::unexpected(marker.error());
  const auto journals = entries_of(path + "/journals");
  if (!journals) return std::unexpected(journals.error());
  const std::set<Key> wanted(keys.begin(), keys.end());
  std::map<std::pair<SegmentId, uint64_t>, PastExtent> found;
  std::map<std::pair<SegmentId, uint64_t>, uint64_t> condemned;
  std::map<SegmentId, uint64_t> evicted;
  for (const DirectoryEntry& entry : *journals) {
    const auto writer = writer_of_journal(entry.name);
    if (!writer || !entry.regular) continue;
    auto reader = JournalReader::open(path + "/journals/" + entry.name, *writer);
    if (!reader && reader.error().kind == ErrorKind::not_found) continue;
    if (!reader) return std::unexpected(reader.error());
    const auto read = reader->read_new([&](const Record& r) {
      const std::pair place(r.where.segment, r.where.offset);
      if (r.type == RecordType::condemn_segment) evicted.try_emplace(r.where.segment, r.time_ns);
      if (r.type == RecordType::condemn_extent) condemned.try_emplace(place, r.time_ns);
      if (r.type == RecordType::put && wanted.contains(r.key)) {
        found[place].extent = extent_of(r);
      }
    });
    if (!read) return std::unexpected(read.error());
  }
  const auto entries = entries_of(path + "/segments");
  if (!entries) return std::unexpected(entries.error());
  std::set<SegmentId> files;
  for (const DirectoryEntry& entry : *entries) {
    if (const auto id = segment_of_name(entry.name); id && entry.regular) files.insert(*id);
  }
  std::vector<PastExtent> past;
  for (auto& [place, extent] : found) {
    if (const auto at = evicted.find(place.first); at != evicted.end()) {
      extent.fate = PastExtent::Fate::evicted;
      extent.ended_ns = at->second;
    } else if (const auto gone = condemned.find(place); gone != condemned.end()) {
      extent.fate = PastExtent::Fate::condemned;
      extent.ended_ns = gone->second;
    } else if (!files.contains(place.first)) {
      extent.fate = PastExtent::Fate::vanished;
    }
    past.push_back(extent);
  }
  return past;
}

}  // namespace tokendepot
