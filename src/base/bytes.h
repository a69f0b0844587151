// Little-endian fields in byte buffers. Bounds are checked in release too: decoders read bytes of others.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>

#include "base/check.h"

namespace tokendepot {

static_assert(std::endian::native == std::endian::little, "the format is little-endian and copied as it is");

template <typename T>
  requires std::is_integral_v<T>
T get_le(std::span<const std::byte> bytes, size_t at) {
  TD_CHECK(at + sizeof(T) <= bytes.size());
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof(T));
  return value;
}

template <typename T>
  requires std::is_integral_v<T>
void put_le(std::span<std::byte> bytes, size_t at, T value) {
  TD_CHECK(at + sizeof(T) <= bytes.size());
  std::memcpy(bytes.data() + at, &value, sizeof(T));
}

}  // namespace tokendepot
