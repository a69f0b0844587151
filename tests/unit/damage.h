// Ways to damage encoded bytes, and random values to encode.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <span>
#include <vector>

#include "format/digest.h"
#include "format/extent.h"
#include "tokendepot/error.h"
#include "tokendepot/layout.h"

namespace tokendepot::damage {

using Bytes = std::vector<std::byte>;

inline bool means_damaged(const Error& error) {
  return error.kind == ErrorKind::corrupt || error.kind == ErrorKind::unsupported;
}

/// Changes each byte in turn, in three ways that together touch every bit.
template <typename Decode>
void expect_every_changed_byte_is_seen(const Bytes& good, Decode decode) {
  ASSERT_TRUE(decode(good).has_value()) << decode(good).error().message;
  Bytes bad = good;
  for (size_t at = 0; at < bad.size(); ++at) {
    for (const auto mask : {std::byte{0x01}, std::byte{0xaa}, std::byte{0xff}}) {
      bad[at] ^= mask;
      const auto result = decode(bad);
      ASSERT_FALSE(result.has_value()) << "byte " << at;
      ASSERT_TRUE(means_damaged(result.error())) << "byte " << at << ": " << result.error().message;
      bad[at] ^= mask;
    }
  }
}

/// The decoder gets an allocation of exactly the shortened size, so that a sanitizer sees reads beyond it.
template <typename Decode>
void expect_every_shortened_copy_is_seen(const Bytes& good, Decode decode) {
  ASSERT_TRUE(decode(good).has_value());
  for (size_t size = 0; size < good.size(); ++size) {
    const Bytes bad(good.begin(), good.begin() + static_cast<std::ptrdiff_t>(size));
    const auto result = decode(bad);
    ASSERT_FALSE(result.has_value()) << size << " bytes";
    ASSERT_TRUE(means_damaged(result.error())) << size << " bytes: " << result.error().message;
  }
}

template <typename T>
void set(Bytes& bytes, size_t at, T value) {
  ASSERT_LE(at + sizeof value, bytes.size());
  std::memcpy(bytes.data() + at, &value, sizeof value);
}

template <typename T>
T get(std::span<const std::byte> bytes, size_t at) {
  T value{};
  EXPECT_LE(at + sizeof value, bytes.size());
  if (at + sizeof value <= bytes.size()) std::memcpy(&value, bytes.data() + at, sizeof value);
  return value;
}

/// Makes the digest right again after a change: for what keeps it in its last 8 bytes.
inline void reseal(Bytes& bytes) {
  set(bytes, bytes.size() - 8, xxh3(std::span(bytes).first(bytes.size() - 8)));
}

/// The same for an extent header.
inline void reseal_header(Bytes& bytes) {
  set<uint64_t>(bytes, 168, 0);
  set(bytes, 168, shard_digest(bytes));
}

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  uint64_t number(uint64_t least, uint64_t most) {
    return std::uniform_int_distribution<uint64_t>(least, most)(engine_);
  }
  template <typename T>
  T any() {
    return static_cast<T>(engine_());
  }
  template <typename Digest>
  Digest digest() {
    Digest digest;
    for (uint8_t& byte : digest.bytes) byte = any<uint8_t>();
    return digest;
  }
  Part part() {
    Part part;
    part.layer_begin = static_cast<uint16_t>(number(0, 100));
    part.layer_end = static_cast<uint16_t>(number(part.layer_begin + 1u, 200));
    part.head_begin = static_cast<uint16_t>(number(0, 1000));
    part.head_end = static_cast<uint16_t>(number(part.head_begin + 1u, 2000));
    return part;
  }
  GroupShape shape() {
    GroupShape shape;
    shape.group = any<uint16_t>();
    shape.kind = number(0, 1) == 0 ? LayoutKind::canonical : LayoutKind::opaque;
    shape.part = part();
    shape.block_tokens = static_cast<uint32_t>(number(1, 64));
    shape.tokens = shape.block_tokens * static_cast<uint32_t>(number(1, 32));
    if (shape.kind == LayoutKind::canonical) {
      shape.planes = static_cast<uint16_t>(number(1, 2));
      shape.row_bytes = static_cast<uint32_t>(number(1, 1024));
    } else {
      shape.part.head_end = static_cast<uint16_t>(shape.part.head_begin + 1);
      shape.page_bytes = static_cast<uint32_t>(number(1, 1 << 20));
    }
    return shape;
  }

 private:
  std::mt19937_64 engine_;
};

}  // namespace tokendepot::damage
