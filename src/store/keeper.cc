#include "store/keeper.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>

#include "base/clock.h"
#include "base/errors.h"
#include "base/log.h"
#include "io/io_thread.h"

namespace tokendepot {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr auto kSlowInterval = std::chrono::seconds(1);
constexpr auto kHoldInterval = std::chrono::seconds(1);
constexpr auto kTendInterval = std::chrono::seconds(1);
// Reading journals takes at most a twentieth of the time: where a poll is slow (many journals, a slow file
// system), polls become rarer, until a chunk would not be seen within a second.
constexpr int kPollShare = 20;
constexpr auto kRarestPoll = milliseconds(800);
constexpr auto kBlindPoll = milliseconds(1000);
constexpr uint32_t kRoundsPerTidying = 10;
constexpr uint64_t kCopyPiece = 4ull << 20;

}  // namespace

Keeper::Keeper(std::vector<Tier> tiers, SegmentTable& segments, Catalog* catalog, Promotion& promotion,
               Rewriting& rewriting, uint32_t poll_ms, std::function<void()> space_ready)
    : tiers_(std::move(tiers)),
      segments_(segments),
      catalog_(catalog),
      promotion_(promotion),
      rewriting_(rewriting),
      poll_ms_(poll_ms),
      space_ready_(std::move(space_ready)) {
  // Before the first lookup and the first eviction.
  for (const Tier& tier : tiers_) tier.replay->tend(system_clock());
  make_space_ready();  // before the first store, which would have to wait for it
  for (const Tier& tier : tiers_) {
    Tail& tail = *tails_.emplace_back(std::make_unique<Tail>(Tail{.keeper = this, .tier = &tier}));
    tail.thread = start_io_thread(
        [](void* self) {
          const auto* const mine = static_cast<Tail*>(self);
          mine->keeper->run_tail(*mine->tier);
          mine->keeper->end_thread();
        },
        &tail);
  }
  space_ = start_io_thread(
      [](void* self) {
        auto* const keeper = static_cast<Keeper*>(self);
        keeper->run_space();
        keeper->end_thread();
      },
      this);
  slow_ = start_io_thread(
      [](void* self) {
        auto* const keeper = static_cast<Keeper*>(self);
        keeper->run_slow();
        keeper->end_thread();
      },
      this);
  std::lock_guard lock(mutex_);
  for (const auto& tail : tails_) at_work_ += tail->thread.joinable();
  at_work_ += space_.joinable();
  at_work_ += slow_.joinable();
}

void Keeper::end_thread() {
  std::lock_guard lock(mutex_);
  --at_work_;
  ended_.notify_all();
}

bool Keeper::stop(std::chrono::nanoseconds patience) {
  std::unique_lock lock(mutex_);
  stop_ = true;
  wake_tails_.notify_all();
  wake_space_.notify_all();
  wake_slow_.notify_all();
  return ended_.wait_for(lock, patience, [this] { return at_work_ == 0; });
}

Keeper::~Keeper() {
  (void)stop(std::chrono::nanoseconds(0));
  for (const auto& tail : tails_) {
    if (tail->thread.joinable()) tail->thread.join();
  }
  if (space_.joinable()) space_.join();
  if (slow_.joinable()) slow_.join();
}

RootWriter* Keeper::store_target() const {
  for (const Tier& tier : tiers_) {
    if (tier.writer != nullptr) return tier.writer;
  }
  return nullptr;
}

void Keeper::wake() {
  {
    std::lock_guard lock(mutex_);
    woken_ = true;
  }
  wake_space_.notify_one();
}

bool Keeper::running() const {
  return slow_.joinable() && space_.joinable() &&
         std::ranges::all_of(tails_, [](const auto& tail) { return tail->thread.joinable(); });
}

void Keeper::poll_journals(const Tier& tier) {
  tier.replay->poll();
  if (tier.replay->take_condemned() && catalog_ != nullptr) catalog_->sweep();
}

void Keeper::poll_journals() {
  for (const Tier& tier : tiers_) poll_journals(tier);
}

void Keeper::make_space_ready() {
  RootWriter* target = store_target();
  if (target == nullptr) return;
  if (!target->wants_spare()) return;
  const auto tier = static_cast<size_t>(
      std::ranges::find(tiers_, target, [](const Tier& t) { return t.writer; }) - tiers_.begin());
  const auto ready = target->prepare_spare([this, tier](uint32_t slot) { save(tier, slot); });
  if (ready) {
    last_complaint_.reset();
    if (space_ready_) space_ready_();
  } else if (ready.error().kind != ErrorKind::busy && ready.error().kind != last_complaint_) {
    last_complaint_ = ready.error().kind;
    log(LogLevel::warning, "no space for stores: {}", ready.error().message);
  }
}

void Keeper::run_tail(const Tier& tier) {
  // Who looks nothing up reads journals for eviction and demotion only.
  const auto wanted = std::max(milliseconds(poll_ms_), catalog_ != nullptr ? milliseconds(0) : kBlindPoll);
  auto next_poll = steady_clock::now() + wanted;
  auto next_hold = steady_clock::now();
  auto next_tending = steady_clock::now() + kTendInterval;
  std::unique_lock lock(mutex_);
  while (true) {
    auto next = std::min(next_poll, next_tending);
    if (tier.writer != nullptr) next = std::min(next, next_hold);
    wake_tails_.wait_until(lock, next, [this] { return stop_.load(); });
    if (stop_) return;
    lock.unlock();
    if (tier.writer != nullptr && steady_clock::now() >= next_hold) {
      tier.writer->confirm_hold();
      tier.writer->leave_removed_segments();
      next_hold = steady_clock::now() + kHoldInterval;
    }
    if (steady_clock::now() >= next_tending) {
      tier.replay->tend(system_clock());
      next_tending = steady_clock::now() + kTendInterval;
    }
    if (const auto began = steady_clock::now(); began >= next_poll) {
      poll_journals(tier);
      const auto ended = steady_clock::now();
      const auto rare = std::min<steady_clock::duration>(kPollShare * (ended - began), kRarestPoll);
      next_poll = ended + std::max<steady_clock::duration>(wanted, rare);
    }
    lock.lock();
  }
}

void Keeper::run_space() {
  std::unique_lock lock(mutex_);
  while (true) {
    wake_space_.wait_for(lock, milliseconds(poll_ms_), [this] { return woken_ || stop_; });
    if (stop_) return;
    woken_ = false;
    lock.unlock();
    make_space_ready();
    lock.lock();
  }
}

bool Keeper::is_wanted_below(size_t tier, uint32_t slot, size_t* below) const {
  for (*below = tier + 1; *below < tiers_.size(); ++*below) {
    if (tiers_[*below].writer == nullptr) continue;
    const SegmentTable::PerRoot state = segments_.get(slot).roots[tiers_[*below].root->index()];
    return !state.present && !state.condemned;
  }
  return false;
}

bool Keeper::demote(size_t tier, uint32_t slot) {
  size_t below = 0;
  const SegmentTable::Segment segment = segments_.get(slot);
  const SegmentTable::PerRoot& state = segment.roots[tiers_[tier].root->index()];
  if (!state.sealed || state.copies || state.extents == 0 || !is_wanted_below(tier, slot, &below))
    return false;
  auto source = tiers_[tier].root->files().open(segment.id);
  if (!source) return false;
  const SegmentInUse in_use(segments_, slot);
  RootWriter& target = *tiers_[below].writer;
  auto copy =
      target.open_copy(segment.id, (*source)->bytes, [this, below](uint32_t next) { save(below, next); });
  if (!copy) return false;
  const std::unique_ptr<std::byte, void (*)(void*)> piece(
      static_cast<std::byte*>(std::aligned_alloc(kPageBytes, kCopyPiece)), &std::free);
  const uint64_t used = std::min(align_up(state.used_bytes), (*source)->bytes);
  Status moved;
  for (uint64_t at = 0; at < used && moved; at += kCopyPiece) {
    if (stop_) moved = fail(ErrorKind::closed, "the depot is closing");
    if (!moved) break;
    const std::span<std::byte> bytes(piece.get(), std::min(kCopyPiece, used - at));
    moved = (*source)->file.read_at(bytes, at);
    if (moved) moved = copy->write_at(bytes, at);
  }
  if (moved) moved = target.publish_copy(segment.id, *copy, used);
  if (!moved) {
    log(LogLevel::warning, "segment {} was not demoted to \"{}\": {}", segment_name(segment.id),
        target.root().path(), moved.error().message);
    if (auto removed = remove_file(copy->path()); !removed)
      log(LogLevel::debug, "{}", removed.error().message);
    return false;
  }
  ++demoted_[tiers_[tier].root->index()];
  return true;
}

void Keeper::save(size_t tier, uint32_t slot) {
  demote(tier, slot);
  rewriting_.carry_on(tiers_[tier], slot, *store_target(), stop_);
}

uint64_t Keeper::demotion_lag_bytes(RootIndex root) const {
  const auto tier = static_cast<size_t>(
      std::ranges::find(tiers_, root, [](const Tier& t) { return t.root->index(); }) - tiers_.begin());
  if (tiers_[tier].writer == nullptr) return 0;
  uint64_t lag = 0;
  size_t below = 0;
  for (const auto& [slot, segment] : segments_.present_segments(root)) {
    const SegmentTable::PerRoot& state = segment.roots[root];
    const bool ours = segment.id.writer == tiers_[tier].writer->writer_id();
    if (ours && !state.copies && is_wanted_below(tier, slot, &below)) lag += state.used_bytes;
  }
  return lag;
}

void Keeper::demote_all() {
  for (size_t tier = 0; tier + 1 < tiers_.size(); ++tier) {
    for (const auto& [slot, segment] : segments_.present_segments(tiers_[tier].root->index())) {
      if (stop_) return;
      demote(tier, slot);
    }
  }
}

void Keeper::promote() {
  const RootWriter* target = store_target();
  if (target == nullptr) return;
  const auto top = static_cast<size_t>(
      std::ranges::find(tiers_, target, [](const Tier& tier) { return tier.writer; }) - tiers_.begin());
  promotion_.run_round([this, top](uint32_t slot) { save(top, slot); }, stop_);
}

void Keeper::tidy_up() {
  for (const Tier& tier : tiers_) {
    if (tier.writer == nullptr || stop_) continue;
    tier.writer->tend_dead_writers();
    tier.writer->remove_orphans();
    tier.writer->compact_journal();
  }
}

void Keeper::run_slow() {
  for (const Tier& tier : tiers_) tier.root->map_ahead(segments_, stop_);
  std::unique_lock lock(mutex_);
  for (uint32_t round = 1; !stop_; ++round) {
    wake_slow_.wait_for(lock, kSlowInterval, [this] { return stop_.load(); });
    if (stop_) return;
    lock.unlock();
    for (const Tier& tier : tiers_) tier.root->map_ahead(segments_, stop_);  // others' new ones
    demote_all();
    promote();
    for (const Tier& tier : tiers_) {
      if (tier.writer != nullptr && !stop_) tier.writer->reclaim();
    }
    if (round % kRoundsPerTidying == 0) tidy_up();
    lock.lock();
  }
}

}  // namespace tokendepot
