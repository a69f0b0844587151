#include "store/promotion.h"

#include <algorithm>
#include <chrono>
#include <thread>

#include "base/errors.h"
#include "base/log.h"
#include "store/carry.h"

namespace tokendepot {
namespace {

constexpr size_t kMostWaiting = 4096;
constexpr size_t kMostCopiesKnown = 1 << 16;
constexpr uint64_t kPatienceNs = 10ull * 1000 * 1000 * 1000;
constexpr uint64_t kRoundNs = 1000ull * 1000 * 1000;  // demotion is to go on
constexpr auto kPause = std::chrono::milliseconds(1);
constexpr auto kLongestRest = std::chrono::milliseconds(200);

}  // namespace

Promotion::Promotion(std::vector<Tier> tiers, SegmentTable& segments, const Clock& clock)
    : tiers_(std::move(tiers)), segments_(segments), clock_(clock) {
  while (top_ < tiers_.size() && tiers_[top_].writer == nullptr) ++top_;
}

void Promotion::note_load(size_t tier, uint32_t slot, const Record& put, uint64_t stored_at_ns) {
  const uint64_t now = clock_.wall_ns();
  const uint64_t before = std::max(use_.exchange(slot, put.where.offset, now), std::min(stored_at_ns, now));
  if (tier <= top_) return;
  std::lock_guard lock(mutex_);
  if (waiting_.size() < kMostWaiting) waiting_.push_back({tier, slot, put, before, clock_.steady_ns()});
}

std::optional<Promotion::Candidate> Promotion::next() {
  const uint64_t now = clock_.steady_ns();
  std::lock_guard lock(mutex_);
  while (!waiting_.empty()) {
    const Candidate candidate = waiting_.front();
    waiting_.pop_front();
    if (now - candidate.noted_ns < kPatienceNs) return candidate;
  }
  return std::nullopt;
}

bool Promotion::pays(const Candidate& candidate) const {
  const Root& root = *tiers_[top_].root;
  const RootWriter::Spare spare = tiers_[top_].writer->spare();
  uint64_t used = spare.bytes;
  std::optional<uint64_t> coldest;
  uint32_t sealed = 0;
  for (const auto& [slot, segment] : segments_.present_segments(root.index())) {
    // A file that was ready a moment ago may be a segment by now.
    if (spare.bytes == 0 || segment.id != spare.id) used += segment.roots[root.index()].file_bytes;
    if (!segment.roots[root.index()].sealed) continue;
    if (!coldest) coldest = segment.last_used_ns;
    ++sealed;
  }
  if (used + root.segment_bytes() <= root.capacity()) return true;  // nothing has to go for it
  // The last segment that can go is the next one for stores.
  return sealed > 1 && candidate.used_before_ns > *coldest;
}

bool Promotion::has_copy(const Candidate& candidate) {
  const auto found = copies_.find({candidate.slot, candidate.put.where.offset});
  if (found == copies_.end()) return false;
  if ((segments_.present_in(found->second) >> tiers_[top_].root->index() & 1u) != 0) return true;
  copies_.erase(found);
  return false;
}

bool Promotion::wait_for_rest(const std::atomic<bool>& stop, uint32_t own) const {
  const uint64_t end = clock_.steady_ns() + kRoundNs;
  while (!stop && segments_.in_motion() > own && clock_.steady_ns() < end)
    std::this_thread::sleep_for(kPause);
  return !stop && segments_.in_motion() <= own;
}

void Promotion::run_round(const BeforeEviction& before_eviction, const std::atomic<bool>& stop) {
  if (top_ == tiers_.size()) return;
  const uint64_t end = clock_.steady_ns() + kRoundNs;
  while (!stop && segments_.in_motion() == 0 && clock_.steady_ns() < end) {
    const auto candidate = next();
    if (!candidate) return;
    const uint32_t roots = segments_.present_in(candidate->slot);
    const bool below = (roots >> tiers_[candidate->tier].root->index() & 1u) != 0;
    const bool above = (roots >> tiers_[top_].root->index() & 1u) != 0;
    if (!below || above || has_copy(*candidate) || !pays(*candidate)) continue;
    promote(*candidate, before_eviction, stop);
  }
}

void Promotion::promote(const Candidate& candidate, const BeforeEviction& before_eviction,
                        const std::atomic<bool>& stop) {
  using Steady = std::chrono::steady_clock;
  const Tier& from = tiers_[candidate.tier];
  RootWriter& target = *tiers_[top_].writer;
  const Record& put = candidate.put;
  const auto source = from.root->files().open(put.where.segment);
  if (!source) return;
  auto place = target.reserve_copy(put.where.bytes, before_eviction);
  if (!place) {
    log(LogLevel::debug, "{}", place.error().message);
    return;
  }
  const SegmentInUse source_in_use(segments_, candidate.slot);
  const SegmentInUse place_in_use(segments_, place->slot);
  const auto forgotten = [&] { return from.replay->is_condemned(candidate.slot, put.where.offset); };
  auto piece_began = Steady::now();
  const auto go_on = [&] {
    std::this_thread::sleep_for(std::min<Steady::duration>(Steady::now() - piece_began, kLongestRest));
    const bool rested = wait_for_rest(stop, 2);  // the two above
    piece_began = Steady::now();
    return rested;
  };
  if (forgotten()) return;
  const auto carried = carry_extent((*source)->file, put, target, *place, go_on);
  if (!carried) {
    // Condemned like what a load finds: the original is no better for the next one.
    if (carried.error().kind == ErrorKind::corrupt && from.writer != nullptr && !from.root->network())
      from.writer->condemn_extent(put);
    if (carried.error().kind != ErrorKind::closed)
      log(LogLevel::info, "root \"{}\": not promoted: {}", target.root_path(), carried.error().message);
    return;
  }
  // Forgotten by somebody while it was copied: the copy must not outlive it.
  from.replay->poll();
  if (forgotten()) {
    Record copy = put;
    copy.where = place->where;
    return target.condemn_extent(copy);
  }
  if (copies_.size() >= kMostCopiesKnown) copies_.clear();
  copies_[{candidate.slot, put.where.offset}] = place->slot;
  ++extents_;
  bytes_ += put.where.bytes;
}

}  // namespace tokendepot
