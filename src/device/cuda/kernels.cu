// Gather + digest, verify, scatter. A warp takes one 4 KiB page of the payload at a time: it moves 16-byte
// vectors between the page and the paged cache, or hashes what passes through its registers, or both.
//
// XXH3-64 (https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md): sums over the 16 stripes of a 1
// KiB block do not depend on their order, so the lanes of a warp share a block and are added up before each
// scramble.
#include <algorithm>

#include "device/cuda/move.h"

namespace tokendepot::cuda {
namespace {

constexpr uint32_t kThreads = 512;
// A bf16 matrix product beside loads at 46 to 48 GB/s is slowed down by 5.2 % with 16 blocks, 3.8 to 5.0 with
// 64, 2.7 with 132, 4.2 with 264 (one H100).
constexpr uint32_t kMostBlocks = 132;
constexpr uint32_t kPage = 4096;
constexpr uint64_t kPrime32_1 = 0x9E3779B1u;
constexpr uint64_t kPrime32_2 = 0x85EBCA77u;
constexpr uint64_t kPrime32_3 = 0xC2B2AE3Du;
constexpr uint64_t kPrime64_1 = 0x9E3779B185EBCA87ull;
constexpr uint64_t kPrime64_2 = 0xC2B2AE3D27D4EB4Full;
constexpr uint64_t kPrime64_3 = 0x165667B19E3779F9ull;
constexpr uint64_t kPrime64_4 = 0x85EBCA77C2B2AE63ull;
constexpr uint64_t kPrime64_5 = 0x27D4EB2F165667C5ull;
constexpr uint64_t kPrimeMx1 = 0x165667919E3779F9ull;
constexpr uint64_t kPrimeMx2 = 0x9FB21C651E98DF25ull;

__device__ uint64_t fold(uint64_t a, uint64_t b) {
  return (a * b) ^ __umul64hi(a, b);
}

__device__ uint64_t avalanche3(uint64_t h) {
  h ^= h >> 37;
  h *= kPrimeMx1;
  return h ^ (h >> 32);
}

/// Secret at a byte offset that need not be a multiple of 8.
__device__ uint64_t secret_at(const Secret& secret, uint32_t byte) {
  const uint32_t word = byte >> 3, shift = (byte & 7) * 8;
  return shift == 0 ? secret.words[word]
                    : (secret.words[word] >> shift) | (secret.words[word + 1] << (64 - shift));
}

__device__ uint64_t initial(uint32_t lane) {
  switch (lane) {
    case 0:
      return kPrime32_3;
    case 1:
      return kPrime64_1;
    case 2:
      return kPrime64_2;
    case 3:
      return kPrime64_3;
    case 4:
      return kPrime64_4;
    case 5:
      return kPrime32_2;
    case 6:
      return kPrime64_5;
    default:
      return kPrime32_1;
  }
}

__device__ uint64_t product(uint64_t keyed) {
  return (keyed & 0xffffffffu) * (keyed >> 32);
}

/// Adds the 16-byte vector `v` of a stripe to accumulators 2j and 2j + 1; `byte` is the secret's offset for
/// the stripe.
__device__ void add(uint64_t& even, uint64_t& odd, const uint4& v, const Secret& secret, uint32_t byte,
                    uint32_t j) {
  const uint64_t low = v.x | (uint64_t{v.y} << 32);
  const uint64_t high = v.z | (uint64_t{v.w} << 32);
  even += high + product(low ^ secret_at(secret, byte + 16 * j));
  odd += low + product(high ^ secret_at(secret, byte + 16 * j + 8));
}

__device__ uint64_t sum_over_groups(uint64_t value) {  // lanes that share lane % 4
  value += __shfl_xor_sync(~0u, value, 4);
  value += __shfl_xor_sync(~0u, value, 8);
  return value + __shfl_xor_sync(~0u, value, 16);
}

__device__ uint64_t scramble(uint64_t acc, uint64_t key) {
  return ((acc ^ (acc >> 47)) ^ key) * kPrime32_1;
}

/// The digest of `bytes` whose accumulators 2j and 2j + 1 the lane has.
__device__ uint64_t merged(uint64_t even, uint64_t odd, uint64_t bytes, const Secret& secret, uint32_t j) {
  uint64_t part = fold(even ^ secret_at(secret, 11 + 16 * j), odd ^ secret_at(secret, 11 + 16 * j + 8));
  part += __shfl_xor_sync(~0u, part, 1);
  part += __shfl_xor_sync(~0u, part, 2);
  return avalanche3(part + bytes * kPrime64_1);
}

/// XXH3-64 of one 4 KiB page whose vector i * 32 + lane is v[i]. All lanes get the digest.
__device__ uint64_t page_digest(const uint4 (&v)[8], const Secret& secret, uint32_t lane) {
  const uint32_t j = lane & 3;
  uint64_t even = initial(2 * j), odd = initial(2 * j + 1);
#pragma unroll
  for (uint32_t block = 0; block < 4; ++block) {
    uint64_t e = 0, o = 0;
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t stripe = half * 8 + (lane >> 2);  // of this block
      // The page's last stripe is added apart, with the secret's tail.
      const bool last = block == 3 && stripe == 15;
      add(e, o, v[block * 2 + half], secret, last ? 192 - 64 - 7 : stripe * 8, j);
    }
    if (block < 3) {
      even = scramble(even + sum_over_groups(e), secret.words[16 + 2 * j]);
      odd = scramble(odd + sum_over_groups(o), secret.words[16 + 2 * j + 1]);
    } else {
      even += sum_over_groups(e);
      odd += sum_over_groups(o);
    }
  }
  return merged(even, odd, kPage, secret, j);
}

__device__ uint64_t swap64(uint64_t x) {
  const uint32_t low = static_cast<uint32_t>(x), high = static_cast<uint32_t>(x >> 32);
  return (uint64_t{__byte_perm(low, 0, 0x0123)} << 32) | __byte_perm(high, 0, 0x0123);
}

__device__ uint64_t mix16(const uint64_t* in, const Secret& secret, uint32_t byte) {
  return fold(in[0] ^ secret_at(secret, byte), in[1] ^ secret_at(secret, byte + 8));
}

constexpr uint32_t kFewWords = 30;

/// XXH3-64 of at most kFewWords words, by one thread: short inputs have forms of their own in the
/// specification.
__device__ uint64_t digest_of_few(const volatile uint64_t* words, uint32_t count, const Secret& secret) {
  const uint64_t bytes = uint64_t{count} * 8;
  if (count == 1) {  // 4 to 8 bytes
    const uint64_t w = words[0];
    const uint64_t flip = secret.words[1] ^ secret.words[2];
    const uint64_t input = (w >> 32) + (w << 32);
    uint64_t h = input ^ flip;
    h ^= ((h << 49) | (h >> 15)) ^ ((h << 24) | (h >> 40));
    h *= kPrimeMx2;
    h ^= (h >> 35) + bytes;
    h *= kPrimeMx2;
    return h ^ (h >> 28);
  }
  if (count == 2) {  // 9 to 16 bytes
    const uint64_t low = words[0] ^ (secret.words[3] ^ secret.words[4]);
    const uint64_t high = words[1] ^ (secret.words[5] ^ secret.words[6]);
    return avalanche3(bytes + swap64(low) + high + fold(low, high));
  }
  if (count <= 16) {  // 17 to 128 bytes
    uint64_t acc = bytes * kPrime64_1;
    uint64_t in[2];
    const uint32_t rounds = (static_cast<uint32_t>(bytes) - 1) / 32;
    for (int i = static_cast<int>(rounds); i >= 0; --i) {
      in[0] = words[2 * i];
      in[1] = words[2 * i + 1];
      acc += mix16(in, secret, 32 * i);
      in[0] = words[count - 2 * i - 2];
      in[1] = words[count - 2 * i - 1];
      acc += mix16(in, secret, 32 * i + 16);
    }
    return avalanche3(acc);
  }
  // 129 to 240 bytes
  uint64_t acc = bytes * kPrime64_1;
  uint64_t in[2];
  const uint32_t rounds = static_cast<uint32_t>(bytes) / 16;
  for (uint32_t i = 0; i < 8; ++i) {
    in[0] = words[2 * i];
    in[1] = words[2 * i + 1];
    acc += mix16(in, secret, 16 * i);
  }
  acc = avalanche3(acc);
  for (uint32_t i = 8; i < rounds; ++i) {
    in[0] = words[2 * i];
    in[1] = words[2 * i + 1];
    acc += mix16(in, secret, 16 * (i - 8) + 3);
  }
  in[0] = words[count - 2];
  in[1] = words[count - 1];
  acc += mix16(in, secret, 136 - 17);
  return avalanche3(acc);
}

/// The words were written by other warps: they are read past the caches that are not shared with those.
__device__ uint4 two_words(const uint64_t* at) {
  const uint64_t low = __ldcg(reinterpret_cast<const unsigned long long*>(at));
  const uint64_t high = __ldcg(reinterpret_cast<const unsigned long long*>(at + 1));
  return {static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
          static_cast<uint32_t>(high >> 32)};
}

/// XXH3-64 of more words than that, by a warp; all lanes get it.
__device__ uint64_t digest_of_many(const uint64_t* words, uint32_t count, const Secret& secret,
                                   uint32_t lane) {
  const uint32_t j = lane & 3;
  uint64_t even = initial(2 * j), odd = initial(2 * j + 1);
  const uint32_t stripes = (count - 1) / 8;  // before the last one, which may overlap
  for (uint32_t first = 0; first < stripes; first += 4 * 16) {
    uint4 v[8];  // of four blocks at once: one after the other would wait for the memory each time
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) {
      const uint32_t stripe = first + i * 8 + (lane >> 2);
      v[i] = stripe < stripes ? two_words(words + stripe * 8 + 2 * j) : uint4{};
    }
#pragma unroll
    for (uint32_t block = 0; block < 4; ++block) {
      uint64_t e = 0, o = 0;
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
        const uint32_t in_block = half * 8 + (lane >> 2);
        if (first + block * 16 + in_block < stripes) add(e, o, v[block * 2 + half], secret, in_block * 8, j);
      }
      even += sum_over_groups(e);
      odd += sum_over_groups(o);
      if (first + block * 16 + 16 <= stripes) {
        even = scramble(even, secret.words[16 + 2 * j]);
        odd = scramble(odd, secret.words[16 + 2 * j + 1]);
      }
    }
  }
  uint64_t e = 0, o = 0;
  if (lane < 4) add(e, o, two_words(words + count - 8 + 2 * j), secret, 192 - 64 - 7, j);
  even += sum_over_groups(e);
  odd += sum_over_groups(o);
  return merged(even, odd, uint64_t{count} * 8, secret, j);
}

/// `aligned`: rows, strides and bases are multiples of 16, so a vector never straddles a row.
template <bool aligned>
__device__ uint4 read_cache(const Move& move, uint32_t shard, uint64_t offset) {
  uint4 value = {0, 0, 0, 0};
  if (offset >= move.shard_bytes) return value;  // padding is zero
  if (aligned) {
    const Target from = locate(move.fit, shard, static_cast<uint32_t>(offset));
    return __ldcs(reinterpret_cast<const uint4*>(from.at));
  }
  auto* bytes = reinterpret_cast<uint8_t*>(&value);
  const uint32_t wanted =
      move.shard_bytes - offset < 16 ? static_cast<uint32_t>(move.shard_bytes - offset) : 16;
  for (uint32_t done = 0; done < wanted;) {
    const Target from = locate(move.fit, shard, static_cast<uint32_t>(offset) + done);
    const uint32_t run = from.run < wanted - done ? from.run : wanted - done;
    for (uint32_t i = 0; i < run; ++i) bytes[done + i] = from.at[i];
    done += run;
  }
  return value;
}

template <bool aligned>
__device__ void write_cache(const Move& move, uint32_t shard, uint64_t offset, const uint4& value) {
  if (offset >= move.shard_bytes) return;
  if (aligned) {
    const Target to = locate(move.fit, shard, static_cast<uint32_t>(offset));
    if (to.at != nullptr) __stcs(reinterpret_cast<uint4*>(to.at), value);
    return;
  }
  const auto* bytes = reinterpret_cast<const uint8_t*>(&value);
  const uint32_t wanted =
      move.shard_bytes - offset < 16 ? static_cast<uint32_t>(move.shard_bytes - offset) : 16;
  for (uint32_t done = 0; done < wanted;) {
    const Target to = locate(move.fit, shard, static_cast<uint32_t>(offset) + done);
    const uint32_t run = to.run < wanted - done ? to.run : wanted - done;
    for (uint32_t i = 0; to.at != nullptr && i < run; ++i) to.at[i] = bytes[done + i];
    done += run;
  }
}

/// The pages [begin, end) of a move that are this warp's: neighbours, so that it tells of a shard once, not of
/// each page: with two fences for each, verify took 3.3 times as long on 80 MiB (one H200).
struct Run {
  __device__ explicit Run(const Move& move) : pages(static_cast<uint32_t>(move.shard_stride / kPage)) {
    const uint32_t total = pages * move.shards, warps = gridDim.x * kThreads / 32;
    const uint32_t each = (total + warps - 1) / warps;
    begin = min((blockIdx.x * kThreads + threadIdx.x) / 32 * each, total);
    end = min(begin + each, total);
  }
  /// Calls `page(shard, page of the move)` for each, and `shard(shard, pages done)` behind the last of a shard.
  template <typename Page, typename Shard>
  __device__ void each(const Page& page, const Shard& shard_done) const {
    for (uint32_t p = begin; p < end;) {
      const uint32_t shard = p / pages, first = p;
      for (const uint32_t last = min(end, (shard + 1) * pages); p < last; ++p) page(shard, p);
      shard_done(shard, p - first);
    }
  }

  uint32_t pages;  // of a shard
  uint32_t begin, end;
};

/// To shared memory: of the launch parameters a warp reads each address apart, and of the secret its lanes
/// want up to 14.
__device__ void share(Secret& shared, const Secret& secret) {
  if (threadIdx.x < sizeof secret.words / sizeof secret.words[0])
    shared.words[threadIdx.x] = secret.words[threadIdx.x];
  __syncthreads();
}

/// Notes that `count` more pages of the shard have their digests; the warp that brings its last digests the
/// shard and calls `finish` on one lane.
template <typename Finish>
__device__ void pages_done(const Move& move, const Secret& secret, uint32_t shard, uint32_t pages,
                           uint32_t count, uint32_t lane, const Finish& finish) {
  const uint64_t* const digests = move.page_digests + uint64_t{shard} * pages;
  bool last = false;
  if (lane == 0) {
    __threadfence();
    last = atomicAdd(move.counters->pages_done + shard, count) + count == pages;
    if (last) move.counters->pages_done[shard] = 0;
    __threadfence();
  }
  if (!__any_sync(~0u, last)) return;
  __syncwarp();
  uint64_t whole = 0;
  if (pages > kFewWords) {
    whole = digest_of_many(digests, pages, secret, lane);
  } else if (lane == 0) {
    whole = digest_of_few(digests, pages, secret);
  }
  if (lane == 0) finish(whole);
}

template <bool aligned>
__global__ void __launch_bounds__(kThreads)
    gather(const __grid_constant__ Move move, const __grid_constant__ Secret secret) {
  __shared__ Secret shared;
  share(shared, secret);
  const uint32_t lane = threadIdx.x & 31;
  const Run run(move);
  const auto page = [&](uint32_t shard, uint32_t p) {
    const uint64_t begin = uint64_t{p - shard * run.pages} * kPage;
    uint4 v[8];
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i)
      v[i] = read_cache<aligned>(move, shard, begin + (i * 32 + lane) * 16);
    auto* out = reinterpret_cast<uint4*>(move.payload + uint64_t{p} * kPage) + lane;
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) out[i * 32] = v[i];
    const uint64_t digest = page_digest(v, shared, lane);
    if (lane == 0) move.page_digests[p] = digest;
  };
  run.each(page, [&](uint32_t shard, uint32_t count) {
    pages_done(move, shared, shard, run.pages, count, lane,
               [&](uint64_t digest) { move.shard_digests[shard] = digest; });
  });
}

__global__ void __launch_bounds__(kThreads)
    verify(const __grid_constant__ Move move, const __grid_constant__ Secret secret) {
  __shared__ Secret shared;
  share(shared, secret);
  const uint32_t lane = threadIdx.x & 31;
  const Run run(move);
  const auto page = [&](uint32_t, uint32_t p) {
    const auto* in = reinterpret_cast<const uint4*>(move.payload + uint64_t{p} * kPage) + lane;
    uint4 v[8];
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) v[i] = in[i * 32];
    const uint64_t digest = page_digest(v, shared, lane);
    if (lane == 0) move.page_digests[p] = digest;
  };
  run.each(page, [&](uint32_t shard, uint32_t count) {
    pages_done(move, shared, shard, run.pages, count, lane, [&](uint64_t digest) {
      const uint64_t expected =
          move.shard_digests != nullptr ? move.shard_digests[shard] : move.few_digests[shard];
      if (digest != expected) atomicExch(&move.counters->bad, 1u);
    });
  });
}

/// Behind verify() on the same stream, so `bad` is settled. The block that reads it last clears it.
template <bool aligned>
__global__ void __launch_bounds__(kThreads) scatter_if_good(const __grid_constant__ Move move) {
  __shared__ uint32_t bad;
  if (threadIdx.x == 0) {
    volatile Counters& counters = *move.counters;
    bad = counters.bad;
    if (blockIdx.x == 0) *move.outcome = bad;
    __threadfence();
    if (atomicAdd(&move.counters->asked, 1u) + 1 == gridDim.x) {
      counters.asked = 0;
      counters.bad = 0;
    }
  }
  __syncthreads();
  if (bad != 0) return;
  const uint32_t lane = threadIdx.x & 31;
  const Run run(move);
  const auto page = [&](uint32_t shard, uint32_t p) {
    const uint64_t begin = uint64_t{p - shard * run.pages} * kPage;
    const auto* in = reinterpret_cast<const uint4*>(move.payload + uint64_t{p} * kPage) + lane;
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) {
      write_cache<aligned>(move, shard, begin + (i * 32 + lane) * 16, __ldcs(in + i * 32));
    }
  };
  run.each(page, [](uint32_t, uint32_t) {});
}

}  // namespace

uint32_t thread_blocks(const Move& move) {
  const uint64_t pages = move.shards * (move.shard_stride / kPage);
  constexpr uint64_t kWarps = kThreads / 32;
  constexpr uint64_t kMostWarps = kWarps * kMostBlocks;
  const uint64_t of_block = std::max<uint64_t>((pages + kMostWarps - 1) / kMostWarps, 1) * kWarps;  // see Run
  return static_cast<uint32_t>(std::max<uint64_t>((pages + of_block - 1) / of_block, 1));
}

cudaError_t load_kernels() {
  for (const void* kernel :
       {reinterpret_cast<const void*>(gather<true>), reinterpret_cast<const void*>(gather<false>),
        reinterpret_cast<const void*>(verify), reinterpret_cast<const void*>(scatter_if_good<true>),
        reinterpret_cast<const void*>(scatter_if_good<false>)}) {
    cudaFuncAttributes attributes;
    if (const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel); status != cudaSuccess)
      return status;
  }
  return cudaSuccess;
}

// cudaLaunchKernel says what became of this launch; cudaGetLastError() would also tell of earlier calls that
// failed.

cudaError_t launch_gather(const Move& move, const Secret& secret, bool aligned, cudaStream_t stream) {
  void* arguments[] = {const_cast<Move*>(&move), const_cast<Secret*>(&secret)};
  const void* kernel =
      aligned ? reinterpret_cast<const void*>(gather<true>) : reinterpret_cast<const void*>(gather<false>);
  return cudaLaunchKernel(kernel, dim3(thread_blocks(move)), dim3(kThreads), arguments, 0, stream);
}

cudaError_t launch_verify(const Move& move, const Secret& secret, cudaStream_t stream) {
  void* arguments[] = {const_cast<Move*>(&move), const_cast<Secret*>(&secret)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(verify), dim3(thread_blocks(move)), dim3(kThreads),
                          arguments, 0, stream);
}

cudaError_t launch_scatter(const Move& move, bool aligned, cudaStream_t stream) {
  void* arguments[] = {const_cast<Move*>(&move)};
  const void* kernel = aligned ? reinterpret_cast<const void*>(scatter_if_good<true>)
                               : reinterpret_cast<const void*>(scatter_if_good<false>);
  return cudaLaunchKernel(kernel, dim3(thread_blocks(move)), dim3(kThreads), arguments, 0, stream);
}

}  // namespace tokendepot::cuda
