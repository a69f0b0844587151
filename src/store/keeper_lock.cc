#include "store/keeper_lock.h"

#include <array>
#include <chrono>
#include <cstring>
#include <thread>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/errors.h"
#include "base/log.h"

namespace tokendepot {
namespace {

constexpr uint64_t kNsPerMs = 1'000'000;
using StampBytes = std::array<std::byte, 16>;

}  // namespace

void KeeperLock::renew() {
  ++stamp_.beats;
  StampBytes bytes;
  put_le<uint64_t>(bytes, 0, stamp_.epoch);
  put_le<uint64_t>(bytes, 8, stamp_.beats);
  // A full disk has no room for it: then this holder may be passed over although it works.
  (void)file_.write_at(bytes, 0);
}

Result<std::optional<KeeperLock>> KeeperElection::try_once() {
  auto file = File::open(path_, {.write = true, .create = true});
  if (!file) return std::unexpected(file.error());
  const auto locked = file->try_lock_exclusive();
  if (!locked) return std::unexpected(locked.error());
  StampBytes bytes{};
  KeeperLock::Stamp stamp;
  if (file->read_at(bytes, 0))
    stamp = {get_le<uint64_t>(std::span<const std::byte>(bytes), 0),
             get_le<uint64_t>(std::span<const std::byte>(bytes), 8)};
  const uint64_t now = system_clock().steady_ns();
  std::lock_guard lock(mutex_);
  if (*locked) {
    if (!file->is_at_its_path()) return std::optional<KeeperLock>();  // taken over since it was opened
    KeeperLock held;
    held.file_ = std::move(*file);
    held.stamp_ = {std::max(stamp.epoch, seen_.epoch) + 1, 0};
    held.renew();
    seen_since_ns_ = 0;
    return std::optional<KeeperLock>(std::move(held));
  }
  if (seen_since_ns_ == 0 || seen_ != stamp) {
    seen_ = stamp;
    seen_since_ns_ = now;
  } else if (now - seen_since_ns_ > stuck_ms_ * kNsPerMs && file->is_at_its_path()) {
    log(LogLevel::warning, "{}: its holder has not moved for {} s; another process takes over", path_,
        stuck_ms_ / 1000);
    seen_since_ns_ = 0;
    if (auto removed = remove_file(path_); !removed && removed.error().kind != ErrorKind::not_found)
      return std::unexpected(removed.error());
  }
  return std::optional<KeeperLock>();
}

Result<std::optional<KeeperLock>> KeeperElection::acquire(uint32_t patience_ms) {
  constexpr uint32_t kPauseMs = 5;
  for (uint32_t waited = 0;; waited += kPauseMs) {
    auto held = try_once();
    if (!held || *held || waited >= patience_ms) return held;
    std::this_thread::sleep_for(std::chrono::milliseconds(kPauseMs));
  }
}

}  // namespace tokendepot
