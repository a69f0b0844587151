// The words that stamp a payload; seen by nvcc, too.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TD_HOST_AND_DEVICE __host__ __device__
#else
#define TD_HOST_AND_DEVICE
#endif

namespace tokendepot {

constexpr uint64_t kStampEvery = 512;

/// SplitMix64's finaliser (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014): a
/// bijection of 64-bit words, so what differs before differs behind it.
TD_HOST_AND_DEVICE constexpr uint64_t scramble(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

/// Unlike for any two (process below 2^11, serial, index below 2^21: of 512 bytes in an extent of up to 1
/// GiB).
TD_HOST_AND_DEVICE constexpr uint64_t stamp_word(uint32_t process, uint32_t serial, uint64_t index) {
  return scramble(uint64_t{process} << 53 | uint64_t{serial} << 21 | index);
}

}  // namespace tokendepot
