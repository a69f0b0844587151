#include "store/segment_inventory.h"

#include <algorithm>
#include <string_view>
#include <utility>

#include "base/log.h"
#include "store/journal_file.h"

namespace tokendepot {
namespace {

constexpr uint64_t kListAgainNs = 1'000'000'000;
constexpr std::string_view kCopyPrefix = ".tmp-";

}  // namespace

std::optional<SegmentFileName> segment_file_of_name(const std::string& name) {
  const bool copy = name.starts_with(kCopyPrefix);
  const auto id = segment_of_name(copy ? name.substr(kCopyPrefix.size()) : name);
  if (!id) return std::nullopt;
  return SegmentFileName{*id, copy};
}

std::string SegmentInventory::path_of(const SegmentFileName& file) const {
  return directory_ + "/" + (file.copy ? std::string(kCopyPrefix) : "") + segment_name(file.segment);
}

Status SegmentInventory::catch_up(KeeperLock& keeper) {
  std::lock_guard lock(mutex_);
  const auto notes = seen_ ? keeper.noted_since(*seen_) : std::nullopt;
  if (!notes) {
    if (auto entries = list_locked(keeper); !entries) return std::unexpected(entries.error());
  } else {
    for (const Note& note : *notes) set_locked(note.file, note.bytes);
    seen_ = keeper.noted();
  }
  for (const SegmentFileName& file : std::exchange(doubtful_, {})) {
    const auto there = File::open(path_of(file), {});
    if (!there && there.error().kind == ErrorKind::not_found) (void)note_locked(keeper, {file, 0});
  }
  return {};
}

Result<std::vector<DirectoryEntry>> SegmentInventory::list(KeeperLock& keeper) {
  std::lock_guard lock(mutex_);
  return list_locked(keeper);
}

bool SegmentInventory::list_again(KeeperLock& keeper) {
  std::lock_guard lock(mutex_);
  return clock_.steady_ns() - listed_ns_ >= kListAgainNs && list_locked(keeper);
}

Result<std::vector<DirectoryEntry>> SegmentInventory::list_locked(KeeperLock& keeper) {
  auto entries = list_directory(directory_, [this](const std::string& name) -> std::optional<uint64_t> {
    const auto file = segment_file_of_name(name);
    const auto known = file ? files_.find(*file) : files_.end();
    if (known == files_.end()) return std::nullopt;
    return known->second.bytes;
  });
  if (!entries) return entries;
  const uint64_t now = clock_.steady_ns();
  const uint64_t fresh_since = std::exchange(listed_, true) ? now : 0;
  const auto before = std::exchange(files_, {});
  other_bytes_ = 0;
  for (const DirectoryEntry& entry : *entries) {
    const auto file = segment_file_of_name(entry.name);
    if (!file || !entry.regular) {
      other_bytes_ += entry.bytes;
      continue;
    }
    const auto known = before.find(*file);
    files_[*file] = {entry.bytes, known == before.end() ? fresh_since : known->second.since_ns};
  }
  listed_ns_ = now;
  seen_ = keeper.noted();
  return entries;
}

Status SegmentInventory::will_be(KeeperLock& keeper, const SegmentFileName& file, uint64_t bytes) {
  std::lock_guard lock(mutex_);
  return note_locked(keeper, {file, bytes});
}

void SegmentInventory::has_gone(KeeperLock& keeper, const SegmentFileName& file) {
  std::lock_guard lock(mutex_);
  // Who is not told counts it until its next listing.
  if (auto told = note_locked(keeper, {file, 0}); !told) log(LogLevel::debug, "{}", told.error().message);
}

void SegmentInventory::may_have_gone(const SegmentFileName& file) {
  std::lock_guard lock(mutex_);
  doubtful_.push_back(file);
}

void SegmentInventory::set_locked(const SegmentFileName& file, uint64_t bytes) {
  if (bytes == 0) {
    files_.erase(file);
    return;
  }
  const auto [known, fresh] = files_.try_emplace(file, Known{bytes, clock_.steady_ns()});
  if (!fresh) known->second.bytes = bytes;
}

Status SegmentInventory::note_locked(KeeperLock& keeper, const Note& note) {
  const bool up_to_date = seen_ == keeper.noted();
  const auto told = keeper.note(note);
  if (told && up_to_date) seen_ = keeper.noted();
  if (told || note.bytes == 0) set_locked(note.file, note.bytes);
  return told;
}

uint64_t SegmentInventory::bytes() const {
  std::lock_guard lock(mutex_);
  uint64_t total = other_bytes_;
  for (const auto& [file, known] : files_) total += known.bytes;
  return total;
}

uint64_t SegmentInventory::bytes_begun_within(uint64_t ns) const {
  const uint64_t now = clock_.steady_ns();
  std::lock_guard lock(mutex_);
  uint64_t total = 0;
  for (const auto& [file, known] : files_) {
    if (!file.copy && known.since_ns != 0 && now - known.since_ns < ns) total += known.bytes;
  }
  return total;
}

void SegmentInventory::for_each_segment(
    const std::function<void(const SegmentId& id, uint64_t bytes)>& visit) const {
  std::lock_guard lock(mutex_);
  for (const auto& [file, known] : files_) {
    if (!file.copy) visit(file.segment, known.bytes);
  }
}

}  // namespace tokendepot
