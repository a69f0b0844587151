// A root's journals, followed: which chunks are whole, kept up to date place by place. Order between journals
// does not matter: a segment id or an offset in it is never used twice, so what is condemned stays condemned.
#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <unordered_map>
#include <utility>

#include "base/errors.h"
#include "format/journal.h"
#include "format/marker.h"
#include "io/file.h"
#include "store/journal_file.h"
#include "tokendepot/watch.h"

namespace tokendepot {
namespace {

struct ChunkName {
  Key key;
  uint64_t ns_prefix = 0;
  uint16_t group = 0;
  bool operator==(const ChunkName&) const = default;
};

struct HashOfName {
  size_t operator()(const ChunkName& name) const {
    uint64_t word = 0;  // of a SHA-256: random already
    for (size_t i = 0; i < 8; ++i) word = word << 8 | name.key.bytes[i];
    return word ^ name.group;
  }
};

struct Piece {
  SegmentId segment;
  uint64_t offset = 0;
  Part part;
};

struct Chunk {
  std::vector<Piece> pieces;
  uint32_t tokens = 0;
  bool whole = false;   // as it is
  bool told = false;    // as the last poll said
  bool listed = false;  // in `touched`
};

using GroupName = std::pair<uint64_t, uint16_t>;  // (namespace, group)

Result<Marker> marker_of(const std::string& path) {
  const auto bytes = read_file(path + "/DEPOT", kPageBytes);
  if (!bytes) {
    if (bytes.error().kind == ErrorKind::not_found || bytes.error().os_errno == ENOTDIR)
      return fail(ErrorKind::not_found, "{} is not the root of a depot: it has no file DEPOT", path);
    return std::unexpected(bytes.error());
  }
  auto marker = decode_marker(*bytes);
  if (!marker) return fail(marker.error().kind, "{}/DEPOT: {}", path, marker.error().message);
  return marker;
}

/// Whether the pieces hold all of `size`, whose layers and heads begin at 0.
bool covers(const std::vector<Piece>& pieces, const Part& size) {
  const auto holds_all = [&size](const Part& p) {
    return p.layer_begin == 0 && p.head_begin == 0 && p.layer_end >= size.layer_end &&
           p.head_end >= size.head_end;
  };
  if (std::ranges::any_of(pieces, [&](const Piece& piece) { return holds_all(piece.part); })) return true;
  if (pieces.size() < 2) return false;
  // Only where a part begins can cover begin to lack: the corners of the grid that the parts make.
  std::set<uint16_t> layers{0};
  std::set<uint16_t> heads{0};
  for (const Piece& piece : pieces) {
    layers.insert({piece.part.layer_begin, piece.part.layer_end});
    heads.insert({piece.part.head_begin, piece.part.head_end});
  }
  for (const uint16_t layer : layers) {
    if (layer >= size.layer_end) continue;
    for (const uint16_t head : heads) {
      if (head >= size.head_end) continue;
      const bool held = std::ranges::any_of(pieces, [&](const Piece& piece) {
        return piece.part.layer_begin <= layer && layer < piece.part.layer_end &&
               piece.part.head_begin <= head && head < piece.part.head_end;
      });
      if (!held) return false;
    }
  }
  return true;
}

}  // namespace

struct RootWatch::State {
  std::string path;
  Marker marker;
  std::string id_hex;
  bool memory = false;
  std::map<uint64_t, JournalReader> journals;
  std::unordered_map<ChunkName, Chunk, HashOfName> chunks;
  std::map<GroupName, Part> sizes;
  std::map<SegmentId, std::vector<ChunkName>> segments;  // with what they hold, some of it condemned
  std::set<SegmentId> gone;
  std::set<std::pair<SegmentId, uint64_t>> bad_places;
  std::vector<ChunkName> touched;  // since the last poll

  void read_journals(const std::vector<DirectoryEntry>& entries);
  void apply(const Record& record);
  void put(const Record& record);
  void take_away(const ChunkName& name, const SegmentId& segment, std::optional<uint64_t> offset);
  void drop_segment(const SegmentId& segment);
  void note(const ChunkName& name, Chunk& chunk);
};

void RootWatch::State::note(const ChunkName& name, Chunk& chunk) {
  const auto size = sizes.find({name.ns_prefix, name.group});
  chunk.whole = size != sizes.end() && covers(chunk.pieces, size->second);
  if (!std::exchange(chunk.listed, true)) touched.push_back(name);
}

void RootWatch::State::put(const Record& record) {
  const SegmentId& segment = record.where.segment;
  if (gone.contains(segment) || bad_places.contains({segment, record.where.offset})) return;
  const ChunkName name{record.key, record.ns_prefix, record.group};
  Chunk& chunk = chunks[name];
  const bool known = std::ranges::any_of(chunk.pieces, [&](const Piece& piece) {
    return piece.segment == segment && piece.offset == record.where.offset;
  });
  if (known) return;  // a journal that was compacted tells it again
  chunk.pieces.push_back({segment, record.where.offset, record.part});
  chunk.tokens = std::max(chunk.tokens, record.tokens);
  segments[segment].push_back(name);
  Part& size = sizes[{name.ns_prefix, name.group}];
  const bool grew = record.part.layer_end > size.layer_end || record.part.head_end > size.head_end;
  size.layer_end = std::max(size.layer_end, record.part.layer_end);
  size.head_end = std::max(size.head_end, record.part.head_end);
  note(name, chunk);
  if (!grew) return;
  // The model is larger than any rank had shown: what seemed whole may lack something.
  for (auto& [other, its] : chunks) {
    if (other.ns_prefix == name.ns_prefix && other.group == name.group) note(other, its);
  }
}

void RootWatch::State::take_away(const ChunkName& name, const SegmentId& segment,
                                 std::optional<uint64_t> offset) {
  const auto found = chunks.find(name);
  if (found == chunks.end()) return;
  const auto removed = std::erase_if(found->second.pieces, [&](const Piece& piece) {
    return piece.segment == segment && (!offset || piece.offset == *offset);
  });
  if (removed > 0) note(name, found->second);
}

void RootWatch::State::drop_segment(const SegmentId& segment) {
  gone.insert(segment);
  const auto found = segments.find(segment);
  if (found == segments.end()) return;
  for (const ChunkName& name : found->second) take_away(name, segment, std::nullopt);
  segments.erase(found);
}

void RootWatch::State::apply(const Record& record) {
  switch (record.type) {
    case RecordType::put:
      put(record);
      break;
    case RecordType::condemn_extent: {
      bad_places.emplace(record.where.segment, record.where.offset);
      // The record names no namespace: the segment knows which chunks it holds.
      const auto holds = segments.find(record.where.segment);
      if (holds == segments.end()) break;
      for (const ChunkName& name : holds->second) {
        if (name.key == record.key && name.group == record.group)
          take_away(name, record.where.segment, record.where.offset);
      }
      break;
    }
    case RecordType::condemn_segment:
      drop_segment(record.where.segment);
      break;
    case RecordType::open_segment:
    case RecordType::adopt_segment:
    case RecordType::seal:
    case RecordType::touch:
      break;
  }
}

void RootWatch::State::read_journals(const std::vector<DirectoryEntry>& entries) {
  std::set<uint64_t> listed;
  for (const DirectoryEntry& entry : entries) {
    const auto writer = writer_of_journal(entry.name);
    if (!writer || !entry.regular) continue;
    listed.insert(*writer);
    if (journals.contains(*writer)) continue;
    auto reader = JournalReader::open(path + "/journals/" + entry.name, *writer);
    if (reader) journals.emplace(*writer, std::move(*reader));  // else at the next poll
  }
  for (auto at = journals.begin(); at != journals.end();) {
    // What cannot be read now is read at the next poll.
    (void)at->second.read_new([this](const Record& record) { apply(record); });
    // One that was compacted away has been read to its end through its descriptor.
    at = listed.contains(at->first) ? std::next(at) : journals.erase(at);
  }
}

RootWatch::RootWatch(std::unique_ptr<State> state) : state_(std::move(state)) {}
RootWatch::~RootWatch() = default;

Result<std::unique_ptr<RootWatch>> RootWatch::open(const std::string& path) {
  auto marker = marker_of(path);
  if (!marker) return std::unexpected(marker.error());
  const auto system = file_system_of(path);
  if (!system) return std::unexpected(system.error());
  auto state = std::make_unique<State>();
  state->path = path;
  state->marker = *marker;
  for (const uint8_t byte : marker->root_id) state->id_hex += fmt::format("{:02x}", byte);
  state->memory = system->memory;
  return std::unique_ptr<RootWatch>(new RootWatch(std::move(state)));
}

Result<std::vector<ChunkChange>> RootWatch::poll(size_t most) {
  State& state = *state_;
  const auto marker = marker_of(state.path);
  if (!marker) return std::unexpected(marker.error());
  if (*marker != state.marker)
    return fail(ErrorKind::not_found, "{} holds another root than before, expected {}", state.path,
                state.id_hex);
  const auto journals = list_directory(state.path + "/journals");
  if (!journals && journals.error().kind != ErrorKind::not_found) return std::unexpected(journals.error());
  if (journals) state.read_journals(*journals);
  // Listed after reading: a record follows the file that it speaks of.
  const auto files = list_directory(state.path + "/segments");
  if (!files && files.error().kind != ErrorKind::not_found) return std::unexpected(files.error());
  std::set<SegmentId> present;
  if (files) {
    for (const DirectoryEntry& entry : *files) {
      if (const auto id = segment_of_name(entry.name)) present.insert(*id);
    }
  }
  std::vector<SegmentId> missing;
  for (const auto& [id, names] : state.segments) {
    if (!present.contains(id)) missing.push_back(id);
  }
  for (const SegmentId& id : missing) {
    // A listing may be older than the journal, on file systems that cache it: an open asks anew.
    const auto file = File::open(state.path + "/segments/" + segment_name(id), {});
    if (!file && file.error().kind == ErrorKind::not_found) state.drop_segment(id);
  }

  std::vector<ChunkChange> changes;
  size_t seen = 0;
  for (; seen < state.touched.size() && changes.size() < most; ++seen) {
    const ChunkName& name = state.touched[seen];
    const auto found = state.chunks.find(name);
    Chunk& chunk = found->second;
    chunk.listed = false;
    if (chunk.whole != std::exchange(chunk.told, chunk.whole))
      changes.push_back({chunk.whole, name.key, name.ns_prefix, name.group, chunk.tokens});
    if (chunk.pieces.empty()) state.chunks.erase(found);
  }
  state.touched.erase(state.touched.begin(), state.touched.begin() + static_cast<ptrdiff_t>(seen));
  return changes;
}

std::vector<ChunkChange> RootWatch::stored() const {
  std::vector<ChunkChange> all;
  for (const auto& [name, chunk] : state_->chunks) {
    if (chunk.told) all.push_back({true, name.key, name.ns_prefix, name.group, chunk.tokens});
  }
  return all;
}

const std::string& RootWatch::root_id_hex() const {
  return state_->id_hex;
}

bool RootWatch::in_memory() const {
  return state_->memory;
}

}  // namespace tokendepot
