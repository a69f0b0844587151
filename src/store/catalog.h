// In-memory index: chunk key and part -> where the extent lies. The replay of all journals of all roots.
//
// 32 bytes an entry in open-addressing tables filled to 53-80 %, so at most 61 bytes for each extent known.
// Keys are kept as 128 of their 256 bits: a collision would send a reader to an extent whose header names
// another key, which is a miss. No I/O, thread-safe, lookups lock one of 64 shards.
#pragma once

#include <array>
#include <cstdint>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <span>
#include <vector>

#include "io/huge_memory.h"
#include "store/gone_keys.h"
#include "store/segment_table.h"
#include "tokendepot/depot.h"
#include "tokendepot/key.h"
#include "tokendepot/layout.h"
#include "tokendepot/plan.h"

namespace tokendepot {

using PartId = uint16_t;

/// What distinguishes the extents of one chunk: group, cut and length. Few exist; each gets a small id.
struct PartShape {
  uint16_t group = 0;
  LayoutKind kind = LayoutKind::canonical;
  Part part;
  uint32_t tokens = 0;
  bool operator==(const PartShape&) const = default;
};

class Catalog {
 public:
  explicit Catalog(const SegmentTable& segments);

  /// Registers a shape. nullopt when 1,024 are known already (a hostile journal): such extents are not
  /// indexed.
  std::optional<PartId> part_id(const PartShape& shape);
  PartShape shape_of(PartId id) const;

  /// The newest put of a key and part wins among those whose segments lie in the same root; one that lies in
  /// a lower root is kept beside it and answers when the higher one has gone.
  /// `may_add` false: an entry of the same slot is brought up to date, no other one is made or replaced.
  /// Returns whether the slot has one entry more than before.
  bool put(const Key& key, PartId part, uint32_t slot, const ExtentRef& where, bool may_add = true);
  /// Starts fetching what put() or find() will look at: in a large catalog that is not in any cache.
  void prefetch(const Key& key, PartId part) const { prefetch(probe_of(key, part)); }
  /// Forgets this place of a key and part.
  void erase_at(const Key& key, PartId part, uint32_t slot, uint64_t offset);
  void forget(const Key& key, uint16_t group);
  /// For history(): an extent of this key was stored once and is gone.
  void note_gone(const Key& key);

  struct Found {
    uint32_t slot = 0;
    uint64_t offset = 0;
    uint64_t bytes = 0;
  };
  /// The place in the highest root.
  std::optional<Found> find(const Key& key, PartId part) const;
  /// Adds 1 to out[i] where key i is present, prefetching ahead. Returns at the first absent key if `stop` is
  /// set.
  size_t count_present(std::span<const Key> keys, PartId part, std::span<uint8_t> out, bool stop) const;

  /// Sets of parts that together hold all of `want`, each a cover that suffices alone. At most 16.
  std::vector<std::vector<PartId>> covers(const GroupWant& want) const;
  /// Bit per key: 1 = some cover is present.
  void presence(std::span<const Key> keys, const GroupWant& want, std::span<uint8_t> out,
                bool stop_at_gap) const;
  size_t longest_prefix(std::span<const Key> keys, std::span<const GroupWant> wants) const;
  /// Of all groups and parts. "gone" is an estimate: see GoneKeys.
  KeyHistory history(const Key& key) const;

  /// Removes entries whose segment is gone from every root.
  void sweep();

  uint64_t entries() const;
  uint64_t memory_bytes() const;

 private:
  struct Entry {
    uint64_t high = 0;
    uint64_t low = 0;
    uint32_t slot = 0;
    uint32_t page = 0;   // offset in 4 KiB pages
    uint32_t pages = 0;  // 0 = empty
    PartId part = 0;
    uint16_t unused = 0;
  };
  static_assert(sizeof(Entry) == 32);
  using Table = std::vector<Entry, HugeAllocator<Entry>>;
  struct alignas(64) Shard {
    mutable std::mutex mutex;
    Table table;
    size_t size = 0;
  };
  struct Probe {
    uint64_t high;
    uint64_t low;
  };
  static constexpr size_t kShards = 64;

  static Probe probe_of(const Key& key, PartId part);
  Shard& shard_of(const Probe& probe) { return shards_[probe.high >> 58]; }
  const Shard& shard_of(const Probe& probe) const { return shards_[probe.high >> 58]; }
  static size_t home(const Probe& probe, size_t capacity);
  /// The first entry of this probe that `wanted` takes; null when there is none. Entries of one probe are
  /// the places of one extent.
  template <typename Wanted>
  static const Entry* seek(const Table& table, const Probe& probe, Wanted wanted);
  template <typename Wanted>
  static Entry* seek(Table& table, const Probe& probe, Wanted wanted);
  static void insert(Table& table, const Entry& entry);
  static void erase(Shard& shard, Entry* entry);
  static void grow(Shard& shard);
  bool present(const Probe& probe) const;
  void prefetch(const Probe& probe) const;
  std::vector<PartId> parts_of_group(uint16_t group) const;

  const SegmentTable& segments_;
  std::array<Shard, kShards> shards_;
  mutable std::shared_mutex parts_mutex_;
  std::vector<PartShape> parts_;
  GoneKeys gone_;
};

}  // namespace tokendepot
