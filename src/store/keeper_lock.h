// The sole right to create, recycle and remove segment files of a root: keeper.lock.
//
// The lock belongs to the open file, so the kernel (or the file server, when its lease ends) drops it when
// its holder dies. A holder that is stopped, or whose host has gone where locks outlive hosts, is passed
// over: each holder writes a stamp and renews it while it works, and whoever has waited for a minute at one
// and the same stamp, by its own clock, removes the file and makes a new one. The old holder finds its file
// gone
// (`held`) and stops. What it still does between that look and its next step can be an eviction too many or a
// file too much; ids are never given twice, so it is never another segment's file, and no reader believes
// more than what an extent proves.
//
// Holders leave notes of the segment files that they make and remove (format/keeper_file.h): a file that is
// made is noted before, one that goes after, so that who dies in between has noted a file too many.
#pragma once

#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "format/keeper_file.h"
#include "io/file.h"
#include "tokendepot/error.h"

namespace tokendepot {

/// While it lives, its root's keeper is this process. Move-only.
class KeeperLock {
 public:
  /// False: somebody took over, because it was not renewed for too long.
  bool held() const { return file_.is_at_its_path(); }
  /// Before anything that takes long. Cheap: one write.
  void renew();

  /// How many notes there are, ever. nullopt: none are kept, as the file system had no room for them.
  std::optional<uint64_t> noted() const { return noted_; }
  /// The notes behind the first `seen`. nullopt: not all of them are there any more, or can be read.
  std::optional<std::vector<Note>> noted_since(uint64_t seen) const;
  /// Tells later holders. An error: they were not told, so a file must not be made.
  Status note(const Note& note);

 private:
  friend class KeeperElection;
  /// Goes on with the notes that end here if the last holder kept them, else begins anew.
  void keep_notes(const std::optional<NotesEnd>& end, const KeeperStamp& last);
  KeeperStamp stamp_;
  std::optional<uint64_t> noted_;
  bool others_rely_on_notes_ = false;  // what is there looks complete and could not be changed
  bool network_ = false;
  File file_;
};

/// Thread-safe.
class KeeperElection {
 public:
  static constexpr uint64_t kStuckMs = 60'000;
  /// `stuck_ms`: how long a holder may go without renewing before it is passed over. `network`: other hosts
  /// may hold it, and what is cached here of the file may be old.
  explicit KeeperElection(std::string path, uint64_t stuck_ms = kStuckMs, bool network = false)
      : path_(std::move(path)), stuck_ms_(stuck_ms), network_(network) {}

  /// Waits up to `patience_ms`. nullopt: somebody else has it, and renews it.
  Result<std::optional<KeeperLock>> acquire(uint32_t patience_ms);

 private:
  Result<std::optional<KeeperLock>> try_once();

  const std::string path_;
  const uint64_t stuck_ms_;
  const bool network_;
  std::mutex mutex_;  // the two below
  KeeperStamp seen_;
  uint64_t seen_since_ns_ = 0;  // steady clock; 0 = nothing seen
};

}  // namespace tokendepot
