#include "store/keeper.h"

#include <algorithm>
#include <chrono>

#include "base/clock.h"
#include "base/errors.h"
#include "base/log.h"
#include "io/io_thread.h"
#include "store/copy_run.h"

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
// Stores that wait ask for space far more often than it is worth listing a directory.
constexpr auto kSpaceRetry = milliseconds(50);
constexpr auto kTidyInterval = std::chrono::seconds(10);
// Tidying lists the segments, which may take seconds where there are very many.
constexpr int kTidyShare = 20;
constexpr auto kRarestTidying = std::chrono::minutes(2);

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
  if (RootWriter* const target = store_target(); target != nullptr && target->root().write_through()) {
    if (const auto below = tier_below(tier_of(target->root().index()))) {
      write_through_ =
          std::make_unique<WriteThrough>(target->root(), *tiers_[*below].writer, segments_, system_clock(),
                                         [this, below = *below](uint32_t slot) { return save(below, slot); });
    }
  }
  (void)make_space_ready();  // before the first store, which would have to wait for it
  for (const Tier& tier : tiers_) {
    Tail& tail = *tails_.emplace_back(std::make_unique<Tail>(Tail{.keeper = this, .tier = &tier}));
    tail.thread = start_io_thread(
        [](void* self) {
          const auto* const mine = static_cast<Tail*>(self);
          mine->keeper->run_tail(*mine->tier);
          mine->keeper->end_thread();
        },
        &tail, "td-journal");
  }
  space_ = start_io_thread(
      [](void* self) {
        auto* const keeper = static_cast<Keeper*>(self);
        keeper->run_space();
        keeper->end_thread();
      },
      this, "td-space");
  slow_ = start_io_thread(
      [](void* self) {
        auto* const keeper = static_cast<Keeper*>(self);
        keeper->run_slow();
        keeper->end_thread();
      },
      this, "td-slow");
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
  const auto until = steady_clock::now() + patience;
  lock.unlock();
  const bool passed = !write_through_ || write_through_->stop(patience);
  lock.lock();
  return ended_.wait_until(lock, until, [this] { return at_work_ == 0; }) && passed;
}

Keeper::~Keeper() {
  (void)stop(std::chrono::nanoseconds(0));
  write_through_.reset();
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
  return (!write_through_ || write_through_->running()) && slow_.joinable() && space_.joinable() &&
         std::ranges::all_of(tails_, [](const auto& tail) { return tail->thread.joinable(); });
}

void Keeper::poll_journals(const Tier& tier) {
  tier.replay->poll();
  if (tier.replay->take_condemned() && catalog_ != nullptr) catalog_->sweep();
}

void Keeper::poll_journals() {
  for (const Tier& tier : tiers_) poll_journals(tier);
}

bool Keeper::make_space_ready() {
  RootWriter* target = store_target();
  if (target == nullptr || !target->wants_spare()) return true;
  const size_t tier = tier_of(target->root().index());
  if (lags_too_much(target->root())) {
    target->refuse_more();
    {
      std::lock_guard lock(mutex_);
      lagging_ = true;
    }
    wake_slow_.notify_one();
    return false;
  }
  const auto ready = target->prepare_spare([this, tier](uint32_t slot) { return save(tier, slot); });
  if (ready) {
    last_complaint_.reset();
    if (space_ready_) space_ready_();
  } else if (ready.error().kind != ErrorKind::busy && ready.error().kind != last_complaint_) {
    last_complaint_ = ready.error().kind;
    log(LogLevel::warning, "no space for stores: {}", ready.error().message);
  }
  return ready.has_value();
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
      tier.writer->leave_spoilt_segments();
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
    const bool ready = make_space_ready();
    lock.lock();
    if (!ready) wake_space_.wait_for(lock, kSpaceRetry, [this] { return stop_.load(); });
  }
}

size_t Keeper::tier_of(RootIndex root) const {
  return static_cast<size_t>(std::ranges::find(tiers_, root, [](const Tier& t) { return t.root->index(); }) -
                             tiers_.begin());
}

std::optional<size_t> Keeper::tier_below(size_t tier) const {
  for (size_t below = tier + 1; below < tiers_.size(); ++below) {
    if (tiers_[below].writer != nullptr) return below;
  }
  return std::nullopt;
}

bool Keeper::is_wanted_below(const SegmentTable::Segment& segment, size_t tier, size_t* below) const {
  const auto next = tier_below(tier);
  if (!next) return false;
  *below = *next;
  const SegmentTable::PerRoot& above = segment.roots[tiers_[tier].root->index()];
  const SegmentTable::PerRoot& there = segment.roots[tiers_[*next].root->index()];
  if (above.copies || there.condemned) return false;
  return !there.present || !there.sealed || there.extents < above.extents;
}

Status Keeper::complete_copy(size_t tier, uint32_t slot, size_t below) {
  // Asked for before an eviction, and once a second.
  std::lock_guard one_at_a_time(completing_);
  const SegmentTable::Segment segment = segments_.get(slot);
  // In use: stores may be passing through to it.
  if (segment.in_use > 0 || completed_.contains({tiers_[below].root->index(), slot})) return {};
  const auto source = tiers_[tier].root->files().open(segment.id);
  if (!source) return std::unexpected(source.error());
  const SegmentInUse in_use(segments_, slot);
  if (write_through_) write_through_->release(segment.id);
  const SegmentTable::PerRoot& state = segment.roots[tiers_[tier].root->index()];
  const bool whole = segment.roots[tiers_[below].root->index()].extents >= state.extents;
  RootWriter& target = *tiers_[below].writer;
  if (auto completed = target.complete_copy(segment.id, whole ? nullptr : &(*source)->file, state.used_bytes);
      !completed)
    return completed;
  completed_.insert({tiers_[below].root->index(), slot});
  ++demoted_[tiers_[tier].root->index()];
  return {};
}

Status Keeper::copy_down(const File& source, const SegmentTable::Segment& segment, uint64_t used,
                         size_t below) {
  RootWriter& target = *tiers_[below].writer;
  const auto size = source.size();
  if (!size) return std::unexpected(size.error());
  auto copy = target.open_copy(segment.id, *size, [this, below](uint32_t next) { return save(below, next); });
  if (!copy) return std::unexpected(copy.error());
  used = std::min(align_up(used), *size);
  auto moved = copy_run(source, *copy, 0, used, [this] { return !stop_; });
  // Somebody who evicted it meanwhile may have filled the same file anew, under another name.
  if (moved && !source.is_at_its_path())
    moved = fail(ErrorKind::busy, "{}: evicted while it was copied", source.path());
  if (moved) moved = target.publish_copy(segment.id, *copy, used);
  if (moved) return {};
  target.drop_copy(segment.id, *copy);
  return moved;
}

Status Keeper::demote(size_t tier, uint32_t slot) {
  size_t below = 0;
  const SegmentTable::Segment segment = segments_.get(slot);
  const SegmentTable::PerRoot& state = segment.roots[tiers_[tier].root->index()];
  if (!state.sealed || state.extents == 0 || !is_wanted_below(segment, tier, &below)) return {};
  Status moved;
  if (segment.roots[tiers_[below].root->index()].present) {
    moved = complete_copy(tier, slot, below);
  } else {
    auto source = tiers_[tier].root->files().open(segment.id);
    if (!source) return std::unexpected(source.error());
    const SegmentInUse in_use(segments_, slot);
    moved = copy_down((*source)->file, segment, state.used_bytes, below);
    if (moved) ++demoted_[tiers_[tier].root->index()];
  }
  if (moved || !is_wanted_below(segments_.get(slot), tier, &below)) return {};  // somebody else was faster
  if (moved.error().kind != ErrorKind::busy && moved.error().kind != ErrorKind::closed)
    log(LogLevel::warning, "segment {} was not demoted to \"{}\": {}", segment_name(segment.id),
        tiers_[below].root->path(), moved.error().message);
  return moved;
}

Status Keeper::save(size_t tier, uint32_t slot) {
  auto moved = demote(tier, slot);
  // What the root below has no room for, or cannot take, goes all the same.
  if (!moved && (moved.error().kind == ErrorKind::busy || moved.error().kind == ErrorKind::closed))
    return moved;
  rewriting_.carry_on(tiers_[tier], slot, *store_target(), stop_);
  return {};
}

Keeper::Lag Keeper::demotion_lag(RootIndex root) const {
  const size_t tier = tier_of(root);
  Lag lag;
  if (tiers_[tier].writer == nullptr) return lag;
  size_t below = 0;
  for (const auto& [slot, segment] : segments_.present_segments(root)) {
    const SegmentTable::PerRoot& state = segment.roots[root];
    const bool ours = segment.id.writer == tiers_[tier].writer->writer_id();
    if (!ours || !is_wanted_below(segment, tier, &below)) continue;
    // Of a copy that grows with the stores, what is missing came after its last extent.
    const SegmentTable::PerRoot& there = segment.roots[tiers_[below].root->index()];
    if (there.extents >= state.extents || state.used_bytes <= there.used_bytes) continue;
    lag.bytes += state.used_bytes - there.used_bytes;
    const uint64_t since = there.extents > 0 ? there.last_put_ns : state.first_put_ns;
    lag.since_ns = lag.since_ns == 0 ? since : std::min(lag.since_ns, since);
  }
  return lag;
}

bool Keeper::lags_too_much(const Root& root) const {
  if (root.demotion_lag_bound() == 0) return false;
  // What is being filled may become full, and so may what is to be ready.
  const uint64_t bound = std::max(root.demotion_lag_bound(), 3 * root.segment_bytes());
  return demotion_lag(root.index()).bytes + 2 * root.segment_bytes() > bound;
}

void Keeper::demote_all() {
  for (size_t tier = 0; tier + 1 < tiers_.size(); ++tier) {
    for (const auto& [slot, segment] : segments_.present_segments(tiers_[tier].root->index())) {
      if (stop_) return;
      (void)demote(tier, slot);
    }
  }
}

void Keeper::promote() {
  RootWriter* const target = store_target();
  if (target == nullptr) return;
  const size_t top = tier_of(target->root().index());
  promotion_.run_round([this, top](uint32_t slot) { return save(top, slot); }, stop_);
}

void Keeper::tidy_up() {
  for (const Tier& tier : tiers_) {
    if (tier.writer == nullptr || stop_) continue;
    tier.writer->tend_dead_writers();
    tier.writer->remove_orphans();
    tier.writer->remove_unfinished();
    tier.writer->compact_journal();
  }
}

void Keeper::run_slow() {
  for (const Tier& tier : tiers_) tier.root->map_ahead(segments_, stop_);
  auto next_tidying = steady_clock::now() + kTidyInterval;
  std::unique_lock lock(mutex_);
  while (!stop_) {
    wake_slow_.wait_for(lock, kSlowInterval, [this] { return stop_ || lagging_; });
    if (stop_) return;
    lagging_ = false;
    lock.unlock();
    for (const Tier& tier : tiers_) tier.root->map_ahead(segments_, stop_);  // others' new ones
    demote_all();
    promote();
    for (const Tier& tier : tiers_) {
      if (tier.writer != nullptr && !stop_) tier.writer->reclaim();
    }
    if (const auto began = steady_clock::now(); began >= next_tidying) {
      tidy_up();
      const auto ended = steady_clock::now();
      const auto rare = std::min<steady_clock::duration>(kTidyShare * (ended - began), kRarestTidying);
      next_tidying = ended + std::max<steady_clock::duration>(kTidyInterval, rare);
    }
    lock.lock();
  }
}

}  // namespace tokendepot
