// What lies in a root's segments directory, known without asking the file system for each change.
//
// Listed once, when it is first wanted; from then on it follows the notes of the root's keepers. A shared
// root has thousands of segments, and a listing for each new one is what its file system would spend its time
// on. Listings repeat seldom, by time: they find what no note tells of, files that were removed or added by
// hand or by a process that died. Until then a file that has gone counts as there, so less is stored than
// could be.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "base/clock.h"
#include "io/file.h"
#include "store/keeper_lock.h"

namespace tokendepot {

/// nullopt: the name of neither a segment nor of its copy.
std::optional<SegmentFileName> segment_file_of_name(const std::string& name);

/// Thread-safe. What takes a KeeperLock wants that of its root.
class SegmentInventory {
 public:
  SegmentInventory(std::string directory, const Clock& clock)
      : directory_(std::move(directory)), clock_(clock) {}

  /// Brings it up to date: by notes, or by a listing where they do not reach back.
  Status catch_up(KeeperLock& keeper);
  /// Lists the directory. Returns all that is there; files that are known are not asked for their size again.
  Result<std::vector<DirectoryEntry>> list(KeeperLock& keeper);
  /// The same for who would fail otherwise; false: the last listing is less than a second old.
  bool list_again(KeeperLock& keeper);

  /// Before a file is made or gets this name. An error: it must not be made.
  Status will_be(KeeperLock& keeper, const SegmentFileName& file, uint64_t bytes);
  /// After a file was removed or lost this name.
  void has_gone(KeeperLock& keeper, const SegmentFileName& file);
  /// The same without the lock: the next holder in this process looks, and leaves the note.
  void may_have_gone(const SegmentFileName& file);

  /// Of all files.
  uint64_t bytes() const;
  /// Of segments that appeared in the last `ns`, whoever made them; what the first listing found is older.
  uint64_t bytes_begun_within(uint64_t ns) const;
  /// Segments, not copies that are being made.
  void for_each_segment(const std::function<void(const SegmentId& id, uint64_t bytes)>& visit) const;
  std::string path_of(const SegmentFileName& file) const;

 private:
  struct Known {
    uint64_t bytes = 0;
    uint64_t since_ns = 0;  // steady clock; 0 = of any age
  };
  Result<std::vector<DirectoryEntry>> list_locked(KeeperLock& keeper);
  void set_locked(const SegmentFileName& file, uint64_t bytes);
  Status note_locked(KeeperLock& keeper, const Note& note);

  const std::string directory_;
  const Clock& clock_;
  mutable std::mutex mutex_;
  std::map<SegmentFileName, Known> files_;
  uint64_t other_bytes_ = 0;  // of files that have other names, as of the last listing
  bool listed_ = false;
  uint64_t listed_ns_ = 0;
  std::optional<uint64_t> seen_;  // notes; nullopt = the next holder has to list
  std::vector<SegmentFileName> doubtful_;
};

}  // namespace tokendepot
