#include "store/catalog.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "base/check.h"

namespace tokendepot {
namespace {

constexpr size_t kFirstCapacity = 256;
constexpr size_t kAhead = 16;  // probes in flight: enough to cover a DRAM miss of ~100 ns at ~10 ns a probe
constexpr size_t kMaxCovers = 16;
constexpr size_t kMaxCoverParts = 64;
constexpr size_t kMaxCoverSteps = 4096;  // hostile or odd sets of parts must not cost a lookup its time

// Groups, cuts and models of one root come to hundreds. A hostile journal may name any number, and each new
// one is compared with all that are known.
constexpr size_t kMostParts = 1024;

uint64_t mix(uint64_t x) {  // splitmix64's finaliser
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

}  // namespace

Catalog::Catalog(const SegmentTable& segments) : segments_(segments) {
  for (Shard& shard : shards_) shard.table.resize(kFirstCapacity);
}

std::optional<PartId> Catalog::part_id(const PartShape& shape) {
  {
    std::shared_lock lock(parts_mutex_);
    // The newest shapes are the ones in use.
    for (size_t i = parts_.size(); i-- > 0;) {
      if (parts_[i] == shape) return static_cast<PartId>(i);
    }
  }
  std::unique_lock lock(parts_mutex_);
  for (size_t i = parts_.size(); i-- > 0;) {
    if (parts_[i] == shape) return static_cast<PartId>(i);
  }
  if (parts_.size() >= kMostParts) return std::nullopt;
  parts_.push_back(shape);
  return static_cast<PartId>(parts_.size() - 1);
}

PartShape Catalog::shape_of(PartId id) const {
  std::shared_lock lock(parts_mutex_);
  return parts_[id];
}

std::vector<PartId> Catalog::parts_of_group(uint16_t group) const {
  std::shared_lock lock(parts_mutex_);
  std::vector<PartId> ids;
  for (size_t i = 0; i < parts_.size(); ++i) {
    if (parts_[i].group == group) ids.push_back(static_cast<PartId>(i));
  }
  return ids;
}

Catalog::Probe Catalog::probe_of(const Key& key, PartId part) {
  Probe probe;
  std::memcpy(&probe.high, key.bytes.data(), 8);
  std::memcpy(&probe.low, key.bytes.data() + 8, 8);
  probe.low ^= mix(part + 1ull);
  return probe;
}

size_t Catalog::home(const Probe& probe, size_t capacity) {
  return static_cast<size_t>(((probe.low >> 32) * capacity) >>
                             32);  // a shard has far fewer than 2^32 entries
}

template <typename Wanted>
const Catalog::Entry* Catalog::seek(const Table& table, const Probe& probe, Wanted wanted) {
  for (size_t at = home(probe, table.size());; at = at + 1 == table.size() ? 0 : at + 1) {
    const Entry& entry = table[at];
    if (entry.pages == 0) return nullptr;
    if (entry.low == probe.low && entry.high == probe.high && wanted(entry)) return &entry;
  }
}

template <typename Wanted>
Catalog::Entry* Catalog::seek(Table& table, const Probe& probe, Wanted wanted) {
  return const_cast<Entry*>(seek(std::as_const(table), probe, wanted));
}

void Catalog::insert(Table& table, const Entry& entry) {
  size_t at = home({entry.high, entry.low}, table.size());
  while (table[at].pages != 0) at = at + 1 == table.size() ? 0 : at + 1;
  table[at] = entry;
}

void Catalog::grow(Shard& shard) {
  Table bigger(shard.table.size() + shard.table.size() / 2);
  for (const Entry& entry : shard.table) {
    if (entry.pages != 0) insert(bigger, entry);
  }
  shard.table.swap(bigger);
}

void Catalog::erase(Shard& shard, Entry* entry) {
  auto& table = shard.table;
  const size_t capacity = table.size();
  size_t hole = static_cast<size_t>(entry - table.data());
  // Backward shift: an entry may move into the hole unless its home lies behind the hole on its probe path.
  for (size_t at = hole + 1 == capacity ? 0 : hole + 1; table[at].pages != 0;
       at = at + 1 == capacity ? 0 : at + 1) {
    const size_t from = home({table[at].high, table[at].low}, capacity);
    const bool reaches_hole = hole <= at ? (from <= hole || from > at) : (from <= hole && from > at);
    if (reaches_hole) {
      table[hole] = table[at];
      hole = at;
    }
  }
  table[hole] = Entry{};
  --shard.size;
}

bool Catalog::put(const Key& key, PartId part, uint32_t slot, const ExtentRef& where, bool may_add) {
  const uint64_t page = where.offset / kPageBytes;
  const uint64_t pages = where.bytes / kPageBytes;
  if (pages == 0 || page > UINT32_MAX || pages > UINT32_MAX)
    return false;  // no segment of ours holds such an extent
  const Probe probe = probe_of(key, part);
  Entry fresh{probe.high, probe.low, slot, static_cast<uint32_t>(page), static_cast<uint32_t>(pages),
              part,       0};
  Shard& shard = shard_of(probe);
  std::lock_guard lock(shard.mutex);
  const uint32_t roots = segments_.present_in(slot);
  const auto replaceable = [&](const Entry& entry) {
    const uint32_t others = segments_.present_in(entry.slot);
    return entry.slot == slot || others == 0 || std::countr_zero(others) == std::countr_zero(roots);
  };
  if (Entry* entry = seek(shard.table, probe, replaceable)) {
    const bool adds = entry->slot != slot;
    if (adds && !may_add) return false;
    *entry = fresh;
    return adds;
  }
  if (!may_add) return false;
  if ((shard.size + 1) * 5 > shard.table.size() * 4) grow(shard);
  insert(shard.table, fresh);
  ++shard.size;
  return true;
}

void Catalog::erase_at(const Key& key, PartId part, uint32_t slot, uint64_t offset) {
  const Probe probe = probe_of(key, part);
  Shard& shard = shard_of(probe);
  std::lock_guard lock(shard.mutex);
  const auto here = [&](const Entry& entry) {
    return entry.slot == slot && entry.page == offset / kPageBytes;
  };
  Entry* entry = seek(shard.table, probe, here);
  if (entry == nullptr) return;
  erase(shard, entry);
  if (seek(shard.table, probe, [](const Entry&) { return true; }) == nullptr) gone_.add(probe.high);
}

void Catalog::note_gone(const Key& key) {
  gone_.add(probe_of(key, 0).high);
}

void Catalog::forget(const Key& key, uint16_t group) {
  for (const PartId part : parts_of_group(group)) {
    const Probe probe = probe_of(key, part);
    Shard& shard = shard_of(probe);
    std::lock_guard lock(shard.mutex);
    while (Entry* entry = seek(shard.table, probe, [](const Entry&) { return true; })) erase(shard, entry);
  }
}

std::optional<Catalog::Found> Catalog::find(const Key& key, PartId part) const {
  const Probe probe = probe_of(key, part);
  const Shard& shard = shard_of(probe);
  std::lock_guard lock(shard.mutex);
  const Entry* best = nullptr;
  int best_root = kMaxRoots;
  (void)seek(shard.table, probe, [&](const Entry& entry) {
    const uint32_t roots = segments_.present_in(entry.slot);
    if (segments_.serves(entry.slot, entry.page) && std::countr_zero(roots) < best_root) {
      best = &entry;
      best_root = std::countr_zero(roots);
    }
    return false;  // on to the next place
  });
  if (best == nullptr) return std::nullopt;
  return Found{best->slot, best->page * kPageBytes, best->pages * kPageBytes};
}

bool Catalog::present(const Probe& probe) const {
  const Shard& shard = shard_of(probe);
  std::lock_guard lock(shard.mutex);
  const auto served = [this](const Entry& entry) { return segments_.serves(entry.slot, entry.page); };
  return seek(shard.table, probe, served) != nullptr;
}

void Catalog::prefetch(const Probe& probe) const {
  const Shard& shard = shard_of(probe);
  std::lock_guard lock(shard.mutex);
  __builtin_prefetch(&shard.table[home(probe, shard.table.size())]);
}

size_t Catalog::count_present(std::span<const Key> keys, PartId part, std::span<uint8_t> out,
                              bool stop) const {
  std::array<Probe, kAhead> probes;
  size_t prepared = 0;
  for (size_t i = 0; i < keys.size(); ++i) {
    if (i == prepared) {
      const size_t upto = std::min(keys.size(), prepared + kAhead);
      for (; prepared < upto; ++prepared) {
        probes[prepared % kAhead] = probe_of(keys[prepared], part);
        prefetch(probes[prepared % kAhead]);
      }
    }
    if (present(probes[i % kAhead])) {
      ++out[i];
    } else if (stop) {
      return i;
    }
  }
  return keys.size();
}

std::vector<std::vector<PartId>> Catalog::covers(const GroupWant& want) const {
  struct Candidate {
    PartId id;
    Part part;
  };
  std::vector<Candidate> candidates;
  {
    std::shared_lock lock(parts_mutex_);
    for (size_t i = 0; i < parts_.size() && candidates.size() < kMaxCoverParts; ++i) {
      const PartShape& shape = parts_[i];
      if (shape.group == want.group && shape.kind == want.kind && shape.tokens == want.tokens &&
          shape.part.intersects(want.part)) {
        candidates.push_back({static_cast<PartId>(i), shape.part});
      }
    }
  }
  std::vector<std::vector<PartId>> found;
  std::vector<const Candidate*> chosen;
  // Depth-first over the first uncovered (layer, head): exact covers by rectangles that do not overlap each
  // other.
  size_t steps = 0;
  auto extend = [&](auto& self) -> void {
    if (found.size() >= kMaxCovers || ++steps > kMaxCoverSteps) return;
    uint16_t layer = want.part.layer_begin;
    uint16_t head = want.part.head_begin;
    auto holder = [&](uint16_t l, uint16_t h) -> const Candidate* {
      for (const Candidate* c : chosen) {
        if (c->part.contains({l, static_cast<uint16_t>(l + 1), h, static_cast<uint16_t>(h + 1)})) return c;
      }
      return nullptr;
    };
    bool uncovered = false;
    for (layer = want.part.layer_begin; layer < want.part.layer_end && !uncovered;) {
      uint16_t step_to = want.part.layer_end;
      for (head = want.part.head_begin; head < want.part.head_end;) {
        const Candidate* c = holder(layer, head);
        if (c == nullptr) {
          uncovered = true;
          break;
        }
        step_to = std::min(step_to, c->part.layer_end);
        head = c->part.head_end;
      }
      if (!uncovered) layer = step_to;
    }
    if (!uncovered) {
      auto& cover = found.emplace_back();
      for (const Candidate* c : chosen) cover.push_back(c->id);
      return;
    }
    for (const Candidate& c : candidates) {
      if (!c.part.contains({layer, static_cast<uint16_t>(layer + 1), head, static_cast<uint16_t>(head + 1)}))
        continue;
      const bool overlaps =
          std::ranges::any_of(chosen, [&](const Candidate* other) { return other->part.intersects(c.part); });
      if (overlaps) continue;
      chosen.push_back(&c);
      self(self);
      chosen.pop_back();
    }
  };
  extend(extend);
  return found;
}

void Catalog::presence(std::span<const Key> keys, const GroupWant& want, std::span<uint8_t> out,
                       bool stop_at_gap) const {
  TD_CHECK(out.size() == keys.size());
  std::ranges::fill(out, uint8_t{0});
  const auto ways = covers(want);
  std::vector<uint8_t> counts(ways.size() == 1 && ways[0].size() == 1 ? 0 : keys.size());
  for (const auto& cover : ways) {
    if (ways.size() == 1 && cover.size() == 1) {
      count_present(keys, cover[0], out, stop_at_gap);
      return;
    }
    std::ranges::fill(counts, uint8_t{0});
    for (const PartId part : cover) count_present(keys, part, counts, stop_at_gap && ways.size() == 1);
    for (size_t i = 0; i < keys.size(); ++i) out[i] |= counts[i] == cover.size() ? 1 : 0;
  }
}

size_t Catalog::longest_prefix(std::span<const Key> keys, std::span<const GroupWant> wants) const {
  if (wants.empty()) return 0;
  size_t limit = keys.size();
  std::vector<uint8_t> have(keys.size());
  for (const GroupWant& want : wants) {
    if (want.window_chunks != 0) continue;
    presence(keys.first(limit), want, std::span(have).first(limit), true);
    limit = static_cast<size_t>(std::find(have.begin(), have.begin() + static_cast<ptrdiff_t>(limit), 0) -
                                have.begin());
  }
  // For window groups the prefix may end at n only if the last min(window, n) chunks before n are there.
  std::vector<uint8_t> may_end(limit + 1, 1);
  bool windows = false;
  for (const GroupWant& want : wants) {
    if (want.window_chunks == 0) continue;
    windows = true;
    presence(keys.first(limit), want, std::span(have).first(limit), false);
    size_t run = 0;
    for (size_t n = 1; n <= limit; ++n) {
      run = have[n - 1] != 0 ? run + 1 : 0;
      if (run < std::min<size_t>(want.window_chunks, n)) may_end[n] = 0;
    }
  }
  if (windows) {
    while (limit > 0 && may_end[limit] == 0) --limit;
  }
  return limit;
}

KeyHistory Catalog::history(const Key& key) const {
  size_t parts = 0;
  {
    std::shared_lock lock(parts_mutex_);
    parts = parts_.size();
  }
  bool dead = false;  // expired, or of a segment that has gone and was not swept yet
  for (size_t part = 0; part < parts; ++part) {
    const Probe probe = probe_of(key, static_cast<PartId>(part));
    const Shard& shard = shard_of(probe);
    std::lock_guard lock(shard.mutex);
    const auto served = [this](const Entry& entry) { return segments_.serves(entry.slot, entry.page); };
    if (seek(shard.table, probe, served) != nullptr) return KeyHistory::stored;
    dead |= seek(shard.table, probe, [](const Entry&) { return true; }) != nullptr;
  }
  return dead || gone_.holds(probe_of(key, 0).high) ? KeyHistory::gone : KeyHistory::never;
}

void Catalog::sweep() {
  for (Shard& shard : shards_) {
    std::lock_guard lock(shard.mutex);
    std::vector<Entry> alive;
    for (const Entry& entry : shard.table) {
      if (entry.pages == 0) continue;
      if (segments_.alive(entry.slot)) {
        alive.push_back(entry);
      } else {
        gone_.add(entry.high);
      }
    }
    if (alive.size() == shard.size) continue;
    std::ranges::fill(shard.table, Entry{});
    for (const Entry& entry : alive) insert(shard.table, entry);
    shard.size = alive.size();
  }
}

uint64_t Catalog::entries() const {
  uint64_t total = 0;
  for (const Shard& shard : shards_) {
    std::lock_guard lock(shard.mutex);
    total += shard.size;
  }
  return total;
}

uint64_t Catalog::memory_bytes() const {
  uint64_t total = sizeof *this;
  for (const Shard& shard : shards_) {
    std::lock_guard lock(shard.mutex);
    total += shard.table.capacity() * sizeof(Entry);
  }
  return total;
}

}  // namespace tokendepot
