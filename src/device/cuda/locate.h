// Where the bytes of an extent lie in the paged cache: plain arithmetic, so that the kernels and a test
// without a GPU use the same.
#pragma once

#include <bit>
#include <cstdint>

#ifdef __CUDACC__
#define TD_HOST_DEVICE __host__ __device__
#else
#define TD_HOST_DEVICE
#endif

namespace tokendepot::cuda {

/// Division by a number that is known before the launch: a multiplication and a shift instead of the 20
/// instructions that a GPU takes for one, four times for every 16 bytes. Exact for numbers below 2^31.
/// Granlund and Montgomery, "Division by Invariant Integers using Multiplication", PLDI 1994, figure 4.1.
struct Divisor {
  Divisor() = default;
  /// `by` in 1..2^31.
  explicit Divisor(uint32_t by)
      : value(by),
        shift(static_cast<uint32_t>(std::bit_width(by - 1))),
        magic(static_cast<uint32_t>(((((uint64_t{1} << shift) - by) << 32) / by) + 1)) {}

  TD_HOST_DEVICE uint32_t quotient(uint32_t number) const {
    const auto high = static_cast<uint32_t>((uint64_t{magic} * number) >> 32);
    return (high + number) >> shift;
  }

  uint32_t value = 1;
  uint32_t shift = 0;
  uint32_t magic = 1;
};

/// One strided plane or piece of a layer in device memory. See Plane in tokendepot/layout.h.
struct DevicePlane {
  uint8_t* base;
  int64_t block_stride;
  int64_t head_stride;
  int64_t token_stride;
  uint32_t piece_bytes;
  uint32_t piece_offset;  // of the piece in its page (opaque)
};

// What travels with a launch: the device need not fetch it over the link that the payloads use.
constexpr uint32_t kFewBlocks = 128;

/// How an extent and the cache fit together.
struct Fit {
  const DevicePlane* planes;  // [layer of the cache's part][plane or piece]; rows of equal length
  Divisor planes_per_layer;
  Divisor block_tokens;
  Divisor row_bytes;  // canonical
  Divisor page_bytes;
  bool opaque;
  uint32_t cache_layer_begin, cache_layer_end;
  uint32_t cache_head_begin, cache_head_end;
  uint32_t layer_begin;
  uint32_t head_begin;
  Divisor tokens;
  uint32_t first_shard;
  const int32_t* blocks;  // -1 = leave out; mapped host memory, or null = few_blocks
  int32_t few_blocks[kFewBlocks];

  TD_HOST_DEVICE int32_t block(uint32_t i) const { return blocks != nullptr ? blocks[i] : few_blocks[i]; }
};

/// Where 1 to 16 contiguous bytes of a shard lie in the cache; nullptr when they are not wanted here.
struct Target {
  uint8_t* at;
  uint32_t run;  // bytes that stay contiguous from there
};

/// `offset` < the bytes of a shard without its padding.
TD_HOST_DEVICE inline Target locate(const Fit& fit, uint32_t shard, uint32_t offset) {
  if (!fit.opaque) {
    const uint32_t row = fit.row_bytes.quotient(offset), byte = offset - row * fit.row_bytes.value;
    const uint32_t line = fit.tokens.quotient(row), token = row - line * fit.tokens.value;
    const uint32_t of_layers = fit.planes_per_layer.quotient(line);
    const uint32_t layer = fit.layer_begin + of_layers, plane = line - of_layers * fit.planes_per_layer.value;
    const uint32_t head = fit.head_begin + fit.first_shard + shard;
    const uint32_t run = fit.row_bytes.value - byte;
    if (layer < fit.cache_layer_begin || layer >= fit.cache_layer_end) return {nullptr, run};
    if (head < fit.cache_head_begin || head >= fit.cache_head_end) return {nullptr, run};
    const uint32_t i = fit.block_tokens.quotient(token);
    const int32_t block = fit.block(i);
    if (block < 0) return {nullptr, run};
    const DevicePlane& p = fit.planes[(layer - fit.cache_layer_begin) * fit.planes_per_layer.value + plane];
    return {p.base + block * p.block_stride +
                static_cast<int64_t>(head - fit.cache_head_begin) * p.head_stride +
                static_cast<int64_t>(token - i * fit.block_tokens.value) * p.token_stride + byte,
            run};
  }
  const uint32_t page = fit.page_bytes.quotient(offset), byte = offset - page * fit.page_bytes.value;
  const uint32_t layer = fit.layer_begin + fit.first_shard + shard;
  const int32_t block = fit.block(page);
  const DevicePlane* pieces = fit.planes + (layer - fit.cache_layer_begin) * fit.planes_per_layer.value;
  uint32_t i = 0;
  while (byte >= pieces[i].piece_offset + pieces[i].piece_bytes) ++i;
  const uint32_t inside = byte - pieces[i].piece_offset;
  const uint32_t run = pieces[i].piece_bytes - inside;
  if (block < 0) return {nullptr, run};
  return {pieces[i].base + block * pieces[i].block_stride + inside, run};
}

}  // namespace tokendepot::cuda
