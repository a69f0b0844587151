// Copies of rows between the paged cache and payloads, with stores that go past the caches where the CPU has
// them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace tokendepot {

/// `rows` rows of `row_bytes`, at `from + i * from_stride` and `to + i * to_stride`.
struct RowCopy {
  std::byte* to;
  int64_t to_stride;
  const std::byte* from;
  int64_t from_stride;
  uint64_t row_bytes;
  uint64_t rows;
};

using CopyRows = void (*)(const RowCopy& copy);

/// Through the caches: for bytes that are read again soon.
void copy_rows_cached(const RowCopy& copy);

/// Copies for bytes that nobody reads soon: whole cache lines are written without being read from memory
/// first. All that this CPU can run, best first; the places behind them are null. Their stores are weakly
/// ordered: call stream_fence() before anybody is told that the bytes are there.
std::array<CopyRows, 3> stream_copies();
void stream_fence();

}  // namespace tokendepot
