// Identity of stored KV: namespaces and chained chunk keys.
//
// Key of chunk i = SHA-256(key of chunk i-1 | token ids of chunk i as u32 LE | extras of chunk i), where the
// key of "chunk -1" is the namespace digest. See docs/format.md, "Keys".
#pragma once

#include <array>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tokendepot/error.h"

namespace tokendepot {

/// 32 bytes of SHA-256. Strong types so that a key is never passed where a namespace is wanted.
template <typename Tag>
struct Digest256 {
  std::array<uint8_t, 32> bytes{};
  auto operator<=>(const Digest256&) const = default;
};
using Key = Digest256<struct KeyTag>;
using NamespaceDigest = Digest256<struct NamespaceTag>;

/// Lower-case hex of the 32 bytes.
std::string to_hex(std::span<const uint8_t, 32> bytes);

/// One multimodal item of a prompt: its content hash (any bytes, not truncated) and the token range that it
/// fills.
struct MediaSpan {
  std::string_view content_hash;
  uint64_t first_token;
  uint64_t tokens;
};

/// Grows the keys of one prompt, chunk by chunk. Not thread-safe; cheap to copy. No I/O, no failure.
class KeyChain {
 public:
  /// `salt` and `lora` (name and digest of the adapter, any bytes) separate tenants and adapters; empty
  /// equals absent. Neither is kept in clear. `chunk_tokens` > 0.
  KeyChain(const NamespaceDigest& ns, uint32_t chunk_tokens, std::string_view salt = {},
           std::string_view lora = {});

  /// Appends the prompt's next tokens; a key is added for every chunk that fills up. A partial chunk waits
  /// for the next call. `media` lists every media span of the prompt known so far (only those that overlap
  /// the new chunks are used, so passing the whole list each time is right and cheap).
  void append(std::span<const uint32_t> tokens, std::span<const MediaSpan> media = {});

  const std::vector<Key>& keys() const { return keys_; }
  uint64_t tokens_seen() const { return tokens_seen_; }
  uint32_t chunk_tokens() const { return chunk_tokens_; }

 private:
  void close_chunk(std::span<const MediaSpan> media);

  Key parent_;
  uint32_t chunk_tokens_;
  uint64_t tokens_seen_ = 0;
  std::array<uint8_t, 32> owner_{};  // digest of salt and lora; used only when has_owner_
  bool has_owner_ = false;
  std::vector<uint32_t> partial_;
  std::vector<Key> keys_;
};

}  // namespace tokendepot
