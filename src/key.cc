#include "tokendepot/key.h"

#include <algorithm>
#include <limits>

#include "base/check.h"
#include "base/sha256.h"

namespace tokendepot {
namespace {

// A tag in front of every extra, each of fixed length, keeps two different lists of extras from reading the
// same.
constexpr uint8_t kOwnerTag = 1;
constexpr uint8_t kMediaTag = 2;

uint64_t end_of(const MediaSpan& span) {
  const uint64_t room = std::numeric_limits<uint64_t>::max() - span.first_token;
  return span.first_token + std::min(span.tokens, room);
}

bool overlaps(const MediaSpan& span, uint64_t begin, uint64_t end) {
  return span.tokens > 0 && span.first_token < end && end_of(span) > begin;
}

// By place; equal places by length and content, so that the caller's order never matters.
bool before(const MediaSpan& a, const MediaSpan& b) {
  if (a.first_token != b.first_token) return a.first_token < b.first_token;
  if (a.tokens != b.tokens) return a.tokens < b.tokens;
  return a.content_hash < b.content_hash;
}

}  // namespace

std::string to_hex(std::span<const uint8_t, 32> bytes) {
  constexpr std::string_view kDigits = "0123456789abcdef";
  std::string text;
  text.reserve(64);
  for (const uint8_t byte : bytes) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

KeyChain::KeyChain(const NamespaceDigest& ns, uint32_t chunk_tokens, std::string_view salt,
                   std::string_view lora)
    : parent_{ns.bytes}, chunk_tokens_(chunk_tokens), has_owner_(!salt.empty() || !lora.empty()) {
  TD_CHECK(chunk_tokens > 0);
  if (has_owner_) {
    owner_ = Sha256().update_le(salt.size()).update(salt).update_le(lora.size()).update(lora).finish();
  }
}

void KeyChain::append(std::span<const uint32_t> tokens, std::span<const MediaSpan> media) {
  const uint64_t open_begin = tokens_seen_ - partial_.size();
  std::vector<MediaSpan> relevant;
  for (const MediaSpan& span : media) {
    if (overlaps(span, open_begin, tokens_seen_ + tokens.size())) relevant.push_back(span);
  }
  std::sort(relevant.begin(), relevant.end(), before);

  std::span<const MediaSpan> ahead = relevant;
  keys_.reserve(keys_.size() + (partial_.size() + tokens.size()) / chunk_tokens_);
  while (!tokens.empty()) {
    const size_t taken = std::min<size_t>(chunk_tokens_ - partial_.size(), tokens.size());
    partial_.insert(partial_.end(), tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(taken));
    tokens = tokens.subspan(taken);
    tokens_seen_ += taken;
    if (partial_.size() == chunk_tokens_) {
      const auto begun = [this](const MediaSpan& span) { return span.first_token < tokens_seen_; };
      const auto later = std::partition_point(ahead.begin(), ahead.end(), begun);
      close_chunk(ahead.first(static_cast<size_t>(later - ahead.begin())));
      while (!ahead.empty() && end_of(ahead.front()) <= tokens_seen_) ahead = ahead.subspan(1);
    }
  }
}

void KeyChain::close_chunk(std::span<const MediaSpan> media) {
  const uint64_t end = tokens_seen_;
  const uint64_t begin = end - chunk_tokens_;
  struct Inside {
    const MediaSpan* span;
    std::array<uint8_t, 32> content;
  };
  std::vector<Inside> inside;
  for (const MediaSpan& span : media) {
    if (overlaps(span, begin, end)) inside.push_back({&span, sha256(span.content_hash)});
  }

  Sha256 hash;
  hash.update(std::as_bytes(std::span(parent_.bytes))).update(std::as_bytes(std::span(partial_)));
  if (has_owner_) hash.update_le(kOwnerTag, 1).update(std::as_bytes(std::span(owner_)));
  for (const Inside& item : inside) {
    hash.update_le(kMediaTag, 1)
        .update(std::as_bytes(std::span(item.content)))
        .update_le(item.span->first_token - begin)  // two's complement: negative when the span began earlier
        .update_le(item.span->tokens);
  }
  parent_.bytes = hash.finish();
  keys_.push_back(parent_);
  partial_.clear();
}

}  // namespace tokendepot
