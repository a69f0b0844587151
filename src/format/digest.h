// XXH3-64 of each 4 KiB page, then XXH3-64 over the page digests of a shard (as u64 LE). Seed 0 in both.
// Bit-exact with the GPU kernel of the same name.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

struct XXH3_state_s;

namespace tokendepot {

/// XXH3-64, seed 0, of any bytes.
uint64_t xxh3(std::span<const std::byte> bytes);

/// Writes the digest of each page of `pages`, whole ones, to the front of `digests`.
void digest_pages(std::span<const std::byte> pages, std::span<uint64_t> digests);

/// Digest of one shard as it lies in a payload, its zero padding included: whole pages of 4 KiB.
uint64_t shard_digest(std::span<const std::byte> shard);

/// The same of a shard that comes in pieces, in memory that does not depend on its size. Not thread-safe.
class ShardDigest {
 public:
  ShardDigest();
  /// The next pages, whole ones.
  void add(std::span<const std::byte> pages);
  /// Of everything since the last call; what is added next begins another shard.
  uint64_t take();

 private:
  std::unique_ptr<XXH3_state_s, void (*)(XXH3_state_s*)> state_;
};

/// The same from page digests computed elsewhere (e.g. while copying).
uint64_t shard_digest_of_pages(std::span<const uint64_t> page_digests);

}  // namespace tokendepot
