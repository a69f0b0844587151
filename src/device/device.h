// The device seam: where paged KV lives, and the two fused operations between it and extents.
//
// Host twin and CUDA (issue B) must be bit-exact. Work is queued and completes on a thread of the device;
// loads are taken before stores. Payload memory comes from the device's slab, or is a mapped segment.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "format/extent.h"
#include "io/mapping.h"
#include "tokendepot/error.h"
#include "tokendepot/layout.h"
#include "tokendepot/stats.h"

namespace tokendepot {

enum class ScatterOutcome : uint8_t {
  ok,
  corrupt,
  gone,   // the mapping behind the payload failed
  failed  // the device could not do it; says nothing about the payload
};

/// Verify, then scatter: checks the digests of shards [first_shard, first_shard + shards), and only if all
/// are right copies those that fall into the cache's part into its blocks. A bad extent writes nothing.
struct ScatterWork {
  const PagedCache* cache = nullptr;
  const ExtentHeader* header = nullptr;  // what the payload is; already checked against the plan
  std::span<const std::byte> payload;    // the run of shards, (shards * shard_stride) bytes
  uint32_t first_shard = 0;
  uint32_t shards = 0;
  std::span<const int32_t> blocks;  // header->tokens / block_tokens ids, kSkipBlock = leave out
  uint64_t after = 0;               // mark that must have been reached before the cache is touched
  bool guarded = false;             // payload is a mapped file
  bool on_device = false;           // payload is in the file slab
  /// What digest_pages() says of the payload; empty = the device reads the payload itself.
  std::span<const uint64_t> page_digests;
  void (*done)(ScatterWork* self, ScatterOutcome outcome) = nullptr;  // once, on a device thread
  void* owner = nullptr;
  ScatterWork* next = nullptr;
};

/// Gather and digest: copies the shards of the cache's part out of its blocks into `payload` (padding zeroed)
/// and writes one digest a shard.
struct GatherWork {
  const PagedCache* cache = nullptr;
  std::span<const int32_t> blocks;  // all valid ids
  std::span<std::byte> payload;     // shape.payload_bytes()
  std::span<uint64_t> digests;      // shape.shards()
  uint64_t after = 0;               // as in ScatterWork
  bool guarded = false;
  bool on_device = false;                             // as in ScatterWork
  void (*done)(GatherWork* self, bool ok) = nullptr;  // ok = false: the mapping or the device failed
  void* owner = nullptr;
  GatherWork* next = nullptr;
};

/// Bounded staging memory. Thread-safe. Ranges are aligned to 4 KiB.
class Slab {
 public:
  virtual ~Slab() = default;
  /// nullptr when no contiguous range of that size is free.
  virtual std::byte* allocate(uint64_t bytes) = 0;
  virtual void release(std::byte* range) = 0;
  virtual uint64_t size() const = 0;
  virtual std::byte* base() const = 0;
};

class Device {
 public:
  /// Finishes all queued work first.
  virtual ~Device() = default;
  /// All but mapped_bytes, which the roots know.
  virtual DeviceUse stats() const = 0;
  virtual Slab& slab() = 0;
  virtual void submit(ScatterWork* work) = 0;
  virtual void submit(GatherWork* work) = 0;
  /// Does the work now, on the calling thread, where the device's work is the caller's kind of work and one
  /// of its threads idles meanwhile: waking another thread costs as much as a small extent. False: nothing
  /// was done, submit() it. `done` is called before this returns.
  virtual bool run_here(ScatterWork* work) {
    static_cast<void>(work);
    return false;
  }
  /// Whether page digests spare it work: then whoever reads a payload in pieces makes them while others are
  /// read.
  virtual bool takes_page_digests() const { return false; }
  /// Marks the present end of a stream of the engine; work whose `after` is this mark or a later one touches
  /// the cache only when the stream has come so far. Neither host nor device waits. 0: nothing to wait for.
  virtual Result<uint64_t> mark(void* stream) {
    static_cast<void>(stream);
    return 0;
  }
  /// See Depot::engine_step().
  virtual void engine_step(bool begins) { static_cast<void>(begins); }
  /// Whether caches are host memory: then one may come and go with its work. Others are known by their
  /// address as long as the device lives.
  virtual bool on_host() const { return true; }
  /// Whether a cache may be lent: it lies in this device's memory and its extents fit the slabs.
  virtual Status accept(const PagedCache& cache) {
    static_cast<void>(cache);
    return {};
  }
  /// Whether adopt() does anything: then it pays to map segments before they are asked for, and writable.
  virtual bool registers_mappings() const { return false; }
  /// A segment was mapped. A device with a memory of its own registers the range for direct copies: in the
  /// background, hottest first. Until then, and where that fails, payloads in it work too, slower.
  virtual void adopt(std::span<std::byte> mapping, bool writable, uint64_t heat) {
    static_cast<void>(mapping);
    static_cast<void>(writable);
    static_cast<void>(heat);
  }
  /// Ends what adopt() began, then unmaps: a range is never unmapped while it is registered. Nobody uses the
  /// mapping any more.
  virtual void release(Mapping mapping) { static_cast<void>(mapping); }
  /// Sets half of the device's own slab aside for payloads that go between it and files without the host.
  /// Before the first submit. Null where the paged cache is host memory.
  virtual Slab* make_file_slab() { return nullptr; }
  /// Takes it back. Nothing is allocated in it, and nothing is submitted meanwhile.
  virtual void drop_file_slab() {}
  /// Copies a range of the file slab, which nobody writes to meanwhile, to slab() and waits for it. On a
  /// thread of the depot's own. False: the device failed.
  virtual bool copy_from_file_slab(std::byte* to, const std::byte* from, uint64_t bytes) {
    static_cast<void>(to);
    static_cast<void>(from);
    static_cast<void>(bytes);
    return false;
  }
  /// Makes this device the one that libraries find current on the calling thread, which is the depot's own.
  virtual void enter_thread() {}
};

/// `threads` in 1..64 run scatters before gathers; `busy` where the system refuses one. The slab is anonymous
/// memory, touched only when used.
Result<std::unique_ptr<Device>> make_host_device(uint32_t threads, uint64_t slab_bytes);

}  // namespace tokendepot
