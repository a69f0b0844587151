#include "device/stream_copy.h"

#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tokendepot {

void copy_rows_cached(const RowCopy& copy) {
  std::byte* to = copy.to;
  const std::byte* from = copy.from;
  for (uint64_t row = 0; row < copy.rows; ++row, to += copy.to_stride, from += copy.from_stride) {
    std::memcpy(to, from, copy.row_bytes);
  }
}

#if defined(__x86_64__)
namespace {

constexpr uint64_t kLine = 64;

uint64_t bytes_to_line(const std::byte* address) {
  return -reinterpret_cast<uintptr_t>(address) % kLine;
}

// A line that is written only in part must go through the caches; what is left between is whole lines.
template <void (*stream_lines)(std::byte*, const std::byte*, uint64_t)>
inline void stream_rows(const RowCopy& copy) {
  std::byte* to = copy.to;
  const std::byte* from = copy.from;
  for (uint64_t row = 0; row < copy.rows; ++row, to += copy.to_stride, from += copy.from_stride) {
    const uint64_t head = bytes_to_line(to);
    if (copy.row_bytes < head + kLine) {
      std::memcpy(to, from, copy.row_bytes);
      continue;
    }
    const uint64_t tail = (copy.row_bytes - head) % kLine;
    const uint64_t body = copy.row_bytes - head - tail;
    if (head != 0) std::memcpy(to, from, head);
    stream_lines(to + head, from + head, body);
    if (tail != 0) std::memcpy(to + head + body, from + head + body, tail);
  }
}

__attribute__((target("avx512f"))) inline void stream_lines_avx512(std::byte* to, const std::byte* from,
                                                                   uint64_t bytes) {
  uint64_t at = 0;
  for (; at + 4 * kLine <= bytes; at += 4 * kLine) {
    const __m512i a = _mm512_loadu_si512(from + at);
    const __m512i b = _mm512_loadu_si512(from + at + kLine);
    const __m512i c = _mm512_loadu_si512(from + at + 2 * kLine);
    const __m512i d = _mm512_loadu_si512(from + at + 3 * kLine);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at), a);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at + kLine), b);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at + 2 * kLine), c);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at + 3 * kLine), d);
  }
  for (; at < bytes; at += kLine) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at), _mm512_loadu_si512(from + at));
  }
}

__attribute__((target("avx2"))) inline void stream_lines_avx2(std::byte* to, const std::byte* from,
                                                              uint64_t bytes) {
  for (uint64_t at = 0; at < bytes; at += kLine) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + at));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + at + kLine / 2));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at), a);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at + kLine / 2), b);
  }
}

inline void stream_lines_sse2(std::byte* to, const std::byte* from, uint64_t bytes) {
  for (uint64_t at = 0; at < bytes; at += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + at),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at)));
  }
}

}  // namespace

std::array<CopyRows, 3> stream_copies() {
  constexpr CopyRows kAvx512 = stream_rows<stream_lines_avx512>;
  constexpr CopyRows kAvx2 = stream_rows<stream_lines_avx2>;
  constexpr CopyRows kSse2 = stream_rows<stream_lines_sse2>;
  if (__builtin_cpu_supports("avx512f")) return {kAvx512, kAvx2, kSse2};
  if (__builtin_cpu_supports("avx2")) return {kAvx2, kSse2, nullptr};
  return {kSse2, nullptr, nullptr};
}

void stream_fence() {
  _mm_sfence();
}

#else

std::array<CopyRows, 3> stream_copies() {
  return {copy_rows_cached, nullptr, nullptr};
}

void stream_fence() {
  std::atomic_thread_fence(std::memory_order_release);
}

#endif

}  // namespace tokendepot
