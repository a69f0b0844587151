// Journals on the medium: one appender, any number of readers that tail it.
//
// Effect of damage: a record that does not decode is skipped when good records follow it (each record proves
// itself) and waited for when none does (a writer may be in the middle of it). 64 MiB of damage in a row end
// a journal. It is never fatal and never removed by readers.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <stop_token>
#include <string>
#include <vector>

#include "format/journal.h"
#include "io/file.h"
#include "tokendepot/error.h"

namespace tokendepot {

/// "<16 hex>.log" and back. nullopt: not a journal's name.
std::string journal_name(uint64_t writer);
std::optional<uint64_t> writer_of_journal(const std::string& name);
/// "<16 hex>-<8 hex>.seg" and back. nullopt: not a segment's name.
std::string segment_name(const SegmentId& id);
std::optional<SegmentId> segment_of_name(const std::string& name);

/// Reads a journal from its start and then whatever is appended. Not thread-safe.
class JournalReader {
 public:
  static Result<JournalReader> open(const std::string& path, uint64_t writer);

  /// Calls `visit` for every good record behind the last call's end, in order. Returns how many.
  /// `listed_bytes`: the file's size as its directory says, which on network file systems may be newer than
  /// the open file's. Ends early when `stop` is requested. `unsupported` where a record of another format
  /// version has a digest that is right.
  Result<uint64_t> read_new(const std::function<void(const Record&)>& visit, uint64_t listed_bytes = 0,
                            const std::stop_token& stop = {});
  /// A file of this size has nothing that read_new() has not seen.
  bool has_read(uint64_t listed_bytes) const { return listed_bytes == size_seen_ && !has_tail_; }

  /// Gives the descriptor back until the next read_new(), which finds the file by its name.
  void close() { file_ = File(); }
  bool is_open() const { return file_.is_open(); }

  uint64_t writer() const { return writer_; }
  /// Index behind the last good record: where an appender goes on.
  uint64_t next_index() const { return next_index_; }
  uint64_t bad_records() const { return bad_records_; }
  /// The latest time of the records read so far; while one is visited, of those before it.
  uint64_t newest_ns() const { return newest_ns_; }
  /// Bytes lie behind the last good record (torn, damaged, or being written at this moment).
  bool has_tail() const { return has_tail_; }

 private:
  File file_;
  std::string path_;
  uint64_t writer_ = 0;
  uint64_t next_index_ = 0;
  uint64_t bad_records_ = 0;
  uint64_t newest_ns_ = 0;
  bool has_tail_ = false;
  static constexpr uint64_t kNothing = UINT64_MAX;
  uint64_t size_seen_ = kNothing;  // all of a file of this size was read
};

/// Appends to one journal while holding its lock. Not thread-safe.
class JournalWriter {
 public:
  /// A new journal with a random writer id in `directory`, locked.
  static Result<JournalWriter> create(const std::string& directory);
  /// Takes over a dead writer's journal. nullopt: a live writer holds it; `not_found` also when its owner
  /// removed it while we took the lock. `next_index` as its reader found it; the tail behind that is cut off
  /// (by the lock's holder only). Call read_new once more between lock and append: use lock() first, then
  /// append_at().
  static Result<std::optional<JournalWriter>> lock(const std::string& path, uint64_t writer);
  Status append_at(uint64_t next_index);

  /// Fills in journal and index, writes all records with one write. On failure nothing counts as written: the
  /// next append goes to the same place.
  Status append(std::span<Record> records);
  Status append(Record record) { return append(std::span(&record, 1)); }
  Status sync() { return file_.sync(); }

  /// The open file once more, to ask for its lock and name without the appender's mutex.
  Result<File> handle() const { return file_.duplicate(); }
  /// A good record lies where the next one goes: the lock was lost, and somebody else appends here.
  bool another_appended() const;

  uint64_t writer() const { return writer_; }
  uint64_t next_index() const { return next_index_; }
  const std::string& path() const { return file_.path(); }

 private:
  File file_;
  uint64_t writer_ = 0;
  uint64_t next_index_ = 0;
  std::vector<std::byte> buffer_;
};

}  // namespace tokendepot
