#include "store/index_bound.h"

#include <algorithm>
#include <utility>

#include "tokendepot/layout.h"

namespace tokendepot {
namespace {

constexpr uint64_t kLeastExtent = 2 * kPageBytes;

}  // namespace

IndexBound::IndexBound(uint64_t capacity) : most_(capacity / kLeastExtent + kOnTheirWord) {}

IndexBound::Segment& IndexBound::at(uint32_t slot) {
  if (slot >= segments_.size()) segments_.resize(std::max<size_t>(slot + size_t{1}, segments_.size() * 2));
  return segments_[slot];
}

void IndexBound::found(uint32_t slot, uint64_t file_bytes) {
  at(slot).file_bytes = file_bytes;
}

bool IndexBound::must_ask(uint32_t slot, uint64_t end) {
  const bool fits = knows(slot) ? end <= segments_[slot].file_bytes : on_their_word_ < kOnTheirWord;
  return !fits && std::exchange(at(slot).asked, round_) != round_;
}

bool IndexBound::fits(uint32_t slot, uint64_t end) {
  if (knows(slot)) return end <= segments_[slot].file_bytes;
  if (on_their_word_ == kOnTheirWord) return false;
  ++on_their_word_;
  return true;
}

bool IndexBound::has_room(uint32_t slot) const {
  if (extents_ >= most_) return false;
  return !knows(slot) || segments_[slot].extents < segments_[slot].file_bytes / kLeastExtent;
}

void IndexBound::added(uint32_t slot) {
  ++at(slot).extents;
  ++extents_;
}

void IndexBound::condemned(uint32_t slot) {
  leaving_ += std::exchange(at(slot).extents, 0);
}

void IndexBound::swept() {
  extents_ -= std::exchange(leaving_, 0);
}

}  // namespace tokendepot
