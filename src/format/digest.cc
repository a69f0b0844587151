#include "format/digest.h"

#define XXH_STATIC_LINKING_ONLY
#include <xxhash.h>
// The library's own choice of vector width at run time; its plain functions stay at the compiler's baseline.
#if defined(__x86_64__) && __has_include(<xxh_x86dispatch.h>)
#include <xxh_x86dispatch.h>
#endif

#include <algorithm>

#include "base/check.h"
#include "tokendepot/layout.h"

namespace tokendepot {

namespace {

void add_pages(XXH3_state_t& state, std::span<const std::byte> pages) {
  constexpr size_t kBatch = 64;
  uint64_t digests[kBatch];
  while (!pages.empty()) {
    const size_t count = std::min(kBatch, pages.size() / kPageBytes);
    digest_pages(pages.first(count * kPageBytes), digests);
    XXH3_64bits_update(&state, digests, count * sizeof(uint64_t));
    pages = pages.subspan(count * kPageBytes);
  }
}

}  // namespace

uint64_t xxh3(std::span<const std::byte> bytes) {
  return XXH3_64bits(bytes.data(), bytes.size());
}

uint64_t shard_digest_of_pages(std::span<const uint64_t> page_digests) {
  return XXH3_64bits(page_digests.data(), page_digests.size_bytes());
}

void digest_pages(std::span<const std::byte> pages, std::span<uint64_t> digests) {
  TD_CHECK(pages.size() % kPageBytes == 0 && digests.size() >= pages.size() / kPageBytes);
  for (size_t i = 0; i < pages.size() / kPageBytes; ++i)
    digests[i] = xxh3(pages.subspan(i * kPageBytes, kPageBytes));
}

uint64_t shard_digest(std::span<const std::byte> shard) {
  TD_CHECK(shard.size() % kPageBytes == 0);
  XXH3_state_t state;
  XXH3_64bits_reset(&state);
  add_pages(state, shard);
  return XXH3_64bits_digest(&state);
}

ShardDigest::ShardDigest() : state_(XXH3_createState(), [](XXH3_state_s* state) { XXH3_freeState(state); }) {
  TD_CHECK(state_ != nullptr);
  XXH3_64bits_reset(state_.get());
}

void ShardDigest::add(std::span<const std::byte> pages) {
  TD_CHECK(pages.size() % kPageBytes == 0);
  add_pages(*state_, pages);
}

uint64_t ShardDigest::take() {
  const uint64_t digest = XXH3_64bits_digest(state_.get());
  XXH3_64bits_reset(state_.get());
  return digest;
}

}  // namespace tokendepot
