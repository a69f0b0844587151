#include <bit>

#include "tokendepot/workload.h"

namespace tokendepot {
namespace {

// Below 2^8 every value has a bucket; above, each power of two is divided into 2^7.
constexpr unsigned kBits = 7;

size_t bucket_of(uint64_t value) {
  if (value < (2u << kBits)) return value;
  const unsigned shift = static_cast<unsigned>(std::bit_width(value)) - 1 - kBits;
  return (static_cast<size_t>(shift) << kBits) + (value >> shift);
}

uint64_t largest_of(size_t bucket) {
  if (bucket < (2u << kBits)) return bucket;
  const size_t shift = (bucket >> kBits) - 1;
  const uint64_t step = bucket - (shift << kBits);
  return ((step + 1) << shift) - 1;
}

}  // namespace

void LatencyHistogram::add(uint64_t nanoseconds) {
  const size_t bucket = bucket_of(nanoseconds);
  if (bucket >= counts_.size()) counts_.resize(bucket + 1);
  ++counts_[bucket];
}

std::vector<std::pair<uint64_t, uint64_t>> LatencyHistogram::buckets() const {
  std::vector<std::pair<uint64_t, uint64_t>> out;
  for (size_t i = 0; i < counts_.size(); ++i) {
    if (counts_[i] > 0) out.emplace_back(largest_of(i), counts_[i]);
  }
  return out;
}

}  // namespace tokendepot
