// What one engine process does in the simulated world.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "report.h"
#include "store/journal_file.h"
#include "world.h"

namespace tokendepot::sim {

namespace {

constexpr uint32_t kBlockTokens = 16;
constexpr uint32_t kBlocksPerChunk = kChunkTokens / kBlockTokens;
constexpr uint32_t kRowBytes = 64;
constexpr uint32_t kHeads = 2;
constexpr uint32_t kSlots = 16;  // chunks that a process's cache has blocks for
constexpr uint64_t kPlaneBytes = uint64_t{kBlockTokens} * kHeads * kRowBytes;
constexpr char kManifest[] = R"({"model":"simulated"})";

}  // namespace

GroupShape shape() {
  GroupShape made;
  made.part = {0, 1, 0, kHeads};
  made.tokens = kChunkTokens;
  made.block_tokens = kBlockTokens;
  made.row_bytes = kRowBytes;
  return made;
}

GroupWant want() {
  const GroupShape made = shape();
  return {made.group, made.kind, made.part, made.tokens, 0};
}

/// The paged cache of one process; what belongs into a chunk's blocks follows from its key.
class Cache {
 public:
  Cache() : memory_(2 * kPlaneBytes * kSlots * kBlocksPerChunk) {}
  PagedCache paged() {
    PagedCache cache;
    cache.shape = shape();
    cache.block_count = kSlots * kBlocksPerChunk;
    auto& planes = cache.layers.emplace_back();
    for (uint64_t plane = 0; plane < 2; ++plane) {
      planes.push_back({memory_.data() + plane * kPlaneBytes, static_cast<int64_t>(2 * kPlaneBytes),
                        kRowBytes, static_cast<int64_t>(kHeads * kRowBytes), 0});
    }
    return cache;
  }
  void fill(uint32_t slot, const Key& key) { write(slot, key, false); }
  void spoil(uint32_t slot) { std::memset(at(slot), 0xEE, kChunkBytes); }
  bool holds(uint32_t slot, const Key& key) { return write(slot, key, true); }

 private:
  static constexpr uint64_t kChunkBytes = 2 * kPlaneBytes * kBlocksPerChunk;
  std::byte* at(uint32_t slot) { return memory_.data() + slot * kChunkBytes; }
  bool write(uint32_t slot, const Key& key, bool compare) {
    uint64_t seed = 0;
    std::memcpy(&seed, key.bytes.data(), sizeof seed);
    Random content(seed);
    std::byte* const chunk = at(slot);
    for (uint64_t i = 0; i < kChunkBytes; i += 8) {
      const uint64_t value = content.next();
      if (!compare) {
        std::memcpy(chunk + i, &value, 8);
      } else if (std::memcmp(chunk + i, &value, 8) != 0) {
        return false;
      }
    }
    return true;
  }
  std::vector<std::byte> memory_;
};

Process::Process(World& world, ProcessId id, uint32_t rounds)
    : world_(world), id_(id), rounds_(rounds), cache_(new Cache) {}

bool Process::open_depot() {
  const uint64_t patience = now_ns() + kPatience;
  while (true) {
    const bool excused = world_.faults_on;
    auto opened = Depot::open(world_.options(id_));
    Status ready;
    if (!opened) ready = std::unexpected(opened.error());
    if (ready) ready = (*opened)->attach(cache_->paged());
    if (ready) {
      const auto ns = (*opened)->register_namespace(kManifest);
      if (ns) ns_ = *ns;
      if (!ns) ready = std::unexpected(ns.error());
    }
    if (ready) {
      depot_ = std::move(*opened);
      forgotten_.clear();
      return true;
    }
    // What a lying disk did to a marker stays; nothing can be opened then.
    if (world_.scenario.kind == Scenario::Kind::liar) return false;
    // Nor may there be room for the one record that takes over from a dead writer, where others fill the
    // disk.
    const bool full = world_.crowded && ready.error().kind == ErrorKind::no_space;
    if (!excused && !world_.faults_on && !full)
      violated(Verdict::broken, "the depot does not open on a healthy disk: " + ready.error().message);
    if (now_ns() > patience) violated(Verdict::hang, "the depot never opens: " + ready.error().message);
    sleep_ns(100 * kMs);
  }
}

void Process::run() {
  if (!open_depot()) return;
  Random& random = chance();
  for (uint32_t round = 0; round < rounds_; ++round) {
    const size_t prompt = random.below(world_.prompts.size());
    if (world_.scenario.leases) {
      store(prompt, 0, kChunksPerPrompt);
      load(prompt, false, random.between(2, 10));
      std::set<Key> loaded;
      load_all(loaded);
      continue;
    }
    switch (random.below(10)) {
      case 0:
        sleep_ns(random.between(1, 15'000) * kMs);  // the keeper gets to everything that it does
        break;
      case 1:
        depot_->refresh();
        if (world_.scenario.pressure) load_late();
        break;
      case 2:
        if (random.chance(0.3)) {
          close_depot();
          if (!open_depot()) return;
        }
        break;
      case 3:
        load(prompt, true, 0);
        break;
      case 4:
      case 5:
      case 6:
        load(prompt, false, 0);
        break;
      default: {
        const size_t last = random.between(1, kChunksPerPrompt);
        store(prompt, random.below(last), last);
      }
    }
  }
  close_depot();
}

Completion Process::wait_for(uint64_t job) {
  const uint64_t patience = now_ns() + kPatience;
  while (true) {
    for (Completion& ended : depot_->poll()) {
      if (ended.job != job && !stores_.contains(ended.job))
        violated(Verdict::broken, "a job was reported that was not submitted");
      ++report().operations;
      ended_.emplace(ended.job, std::move(ended));
    }
    if (const auto found = ended_.find(job); found != ended_.end()) {
      Completion ended = std::move(found->second);
      ended_.erase(found);
      return ended;
    }
    if (now_ns() > patience) violated(Verdict::hang, "a job is never reported");
    depot_->wait_ended(std::chrono::milliseconds(100));
  }
}

std::vector<uint8_t> Process::stored(size_t prompt) {
  std::vector<uint8_t> out(kChunksPerPrompt);
  depot_->stored(world_.prompts[prompt], want(), out);
  return out;
}

void Process::store(size_t prompt, size_t first, size_t last) {
  begin_store(prompt, first, last);
  end_stores();
}

void Process::begin_store(size_t prompt, size_t first, size_t last) {
  const std::vector<Key>& keys = world_.prompts[prompt];
  const std::vector<uint8_t> there = stored(prompt);
  StorePlan plan;
  plan.ns = ns_;
  for (size_t chunk = first; chunk < last; ++chunk) {
    if (there[chunk] != 0) continue;
    cache_->fill(static_cast<uint32_t>(chunk), keys[chunk]);
    StoreItem item{keys[chunk], static_cast<uint32_t>(chunk), 0, {}};
    for (uint32_t b = 0; b < kBlocksPerChunk; ++b)
      item.blocks.push_back(static_cast<int32_t>(chunk * kBlocksPerChunk + b));
    plan.items.push_back(std::move(item));
  }
  if (plan.items.empty()) return;
  const uint64_t job = next_job_++;
  const std::vector<StoreItem>& items = stores_[job] = plan.items;
  if (auto queued = depot_->submit_store(job, std::move(plan)); !queued)
    violated(Verdict::broken, "a store is refused: " + queued.error().message);
  if (depot_->wait_gathered(std::chrono::seconds(2))) {
    for (const StoreItem& item : items) cache_->spoil(item.chunk);  // the engine goes on with its blocks
  }
}

void Process::end_stores() {
  while (!stores_.empty()) {
    const auto& [job, items] = *stores_.begin();
    const Completion ended = wait_for(job);
    std::set<uint32_t> failed;
    for (const ItemFailure& failure : ended.failures) failed.insert(failure.chunk);
    if (ended.items_ok + failed.size() != items.size())
      violated(Verdict::broken, "a store's report does not account for all items");
    for (const StoreItem& item : items) {
      if (failed.contains(item.chunk)) continue;
      world_.acknowledged.insert(item.key);
      forgotten_.erase(item.key);
      note("acknowledged", item.chunk);
      tell("acknowledged {}", to_hex(item.key.bytes).substr(0, 8));
    }
    stores_.erase(stores_.begin());
  }
}

void Process::check(const LoadPlan& plan, const Completion& ended, size_t first_slot,
                    const std::vector<Key>& keys, uint64_t promised_ns) {
  std::map<uint32_t, ItemFailure::Reason> failed;
  for (const ItemFailure& failure : ended.failures) failed[failure.chunk] = failure.reason;
  for (const LoadItem& item : plan.items) {
    const auto failure = failed.find(item.chunk);
    if (failure == failed.end()) {
      ++report().hits;
      if (!cache_->holds(static_cast<uint32_t>(first_slot + item.chunk), keys[item.chunk]))
        violated(Verdict::wrong, "a load reported as good brought other bytes than were stored");
      continue;
    }
    note("failed", static_cast<uint64_t>(failure->second));
    tell("{} is {}", to_hex(item.key.bytes).substr(0, 8), name(failure->second));
    // While calls fail, absent may mean that nobody could look; what was looked at and is not right is bad.
    const bool bad = failure->second == ItemFailure::Reason::corrupt ||
                     failure->second == ItemFailure::Reason::mismatch ||
                     (failure->second == ItemFailure::Reason::absent && !world_.faults_on);
    if (bad && world_.flawless && !world_.scenario.pressure) {
      disk().explain(item.key);
      violated(Verdict::lost, std::string("an extent that the journal promises is ") + name(failure->second) +
                                  " although nothing harmed it");
    }
    if (world_.leases_hold() && (failure->second == ItemFailure::Reason::corrupt || promises(item))) {
      disk().explain(item.key);
      violated(Verdict::broken,
               fmt::format("the only process wrote over a segment that it was using: {} at {} is {}",
                           segment_name(item.where.segment), item.where.offset, name(failure->second)));
    }
    const bool gone =
        failure->second == ItemFailure::Reason::absent || failure->second == ItemFailure::Reason::mismatch;
    if (gone && world_.promise_holds(promised_ns)) {
      disk().explain(item.key);
      violated(Verdict::lost,
               fmt::format("what was promised {} ms ago, within the grace of {} ms, is {}: {} at {}",
                           (now_ns() - promised_ns) / kMs, world_.scenario.grace_ms, name(failure->second),
                           segment_name(item.where.segment), item.where.offset));
    }
    depot_->forget(keys[item.chunk], 0);
    forgotten_.insert(keys[item.chunk]);
  }
}

bool Process::promises(const LoadItem& item) {
  const std::vector<int32_t> blocks(kBlocksPerChunk, kSkipBlock);
  const std::vector<Key> keys(1, item.key);
  const Depot::LoadGroup group{want(), 0, kBlocksPerChunk, blocks};
  const auto plan = depot_->plan_load(ns_, keys, std::span(&group, 1), {});
  return plan &&
         std::ranges::any_of(plan->items, [&](const LoadItem& now) { return now.where == item.where; });
}

void Process::load(size_t prompt, bool hold, size_t stores_meanwhile) {
  const std::vector<Key>& keys = world_.prompts[prompt];
  const GroupWant wanted = want();
  const uint64_t promised_ns = now_ns();
  const size_t chunks = depot_->longest_prefix(keys, std::span(&wanted, 1));
  if (chunks == 0) return;
  constexpr size_t kFirstSlot = kSlots / 2;
  std::vector<int32_t> blocks;
  for (size_t i = 0; i < chunks * kBlocksPerChunk; ++i)
    blocks.push_back(static_cast<int32_t>(kFirstSlot * kBlocksPerChunk + i));
  for (size_t i = 0; i < chunks; ++i) cache_->spoil(static_cast<uint32_t>(kFirstSlot + i));
  const Depot::LoadGroup group{wanted, 0, kBlocksPerChunk, blocks};
  auto plan = depot_->plan_load(ns_, std::span(keys).first(chunks), std::span(&group, 1), {});
  if (!plan) return;                                                   // gone since the lookup
  if (chance().chance(0.2)) sleep_ns(chance().between(1, 300) * kMs);  // on its way to the worker
  const LoadPlan wanted_items = *plan;
  const uint64_t job = next_job_++;
  auto queued =
      hold ? depot_->submit_hold(job, std::move(*plan)) : depot_->submit_load(job, std::move(*plan));
  if (!queued) violated(Verdict::broken, "a load is refused: " + queued.error().message);
  if (!hold && chance().chance(0.05)) depot_->cancel(job);
  for (size_t i = 0; i < stores_meanwhile; ++i)
    begin_store(chance().below(world_.prompts.size()), 0, kChunksPerPrompt);
  Completion ended = wait_for(job);
  end_stores();
  if (!hold) return check(wanted_items, ended, kFirstSlot, keys, promised_ns);

  LoadPlan held = wanted_items;
  std::erase_if(held.items, [&](const LoadItem& item) {
    return std::ranges::any_of(ended.failures,
                               [&](const auto& failure) { return failure.chunk == item.chunk; });
  });
  check({ns_, 0, {}}, ended, kFirstSlot, keys, promised_ns);
  if (held.items.empty()) return;
  std::vector<Depot::HeldBlocks> places;
  for (const LoadItem& item : held.items) places.push_back({item.chunk, item.group, item.blocks});
  const uint64_t place = next_job_++;
  if (auto placed = depot_->place(place, job, places); !placed)
    violated(Verdict::broken, "what is held cannot be placed: " + placed.error().message);
  check(held, wait_for(place), kFirstSlot, keys, promised_ns);
}

void Process::load_late() {
  const uint64_t grace_ns = world_.scenario.grace_ms * kMs;
  if (grace_ns < 2 * kHeardWithin) return;
  constexpr size_t kFirstSlot = kSlots / 2;
  const GroupWant wanted = want();
  const uint64_t promised_ns = now_ns();
  std::vector<std::pair<size_t, LoadPlan>> promises;
  for (size_t prompt = 0; prompt < world_.prompts.size(); ++prompt) {
    const std::vector<Key>& keys = world_.prompts[prompt];
    const size_t chunks = depot_->longest_prefix(keys, std::span(&wanted, 1));
    if (chunks == 0) continue;
    std::vector<int32_t> blocks;
    for (size_t i = 0; i < chunks * kBlocksPerChunk; ++i)
      blocks.push_back(static_cast<int32_t>(kFirstSlot * kBlocksPerChunk + i));
    const Depot::LoadGroup group{wanted, 0, kBlocksPerChunk, blocks};
    auto plan = depot_->plan_load(ns_, std::span(keys).first(chunks), std::span(&group, 1), {});
    if (plan) promises.emplace_back(prompt, std::move(*plan));
  }
  sleep_ns(chance().between(100 * kMs, grace_ns - kHeardWithin));
  for (auto& [prompt, plan] : promises) {
    const uint64_t job = next_job_++;
    if (auto queued = depot_->submit_load(job, plan); !queued)
      violated(Verdict::broken, "a load is refused: " + queued.error().message);
    check(plan, wait_for(job), kFirstSlot, world_.prompts[prompt], promised_ns);
  }
}

void Process::load_all(std::set<Key>& loaded) {
  for (size_t prompt = 0; prompt < world_.prompts.size(); ++prompt) {
    const std::vector<Key>& keys = world_.prompts[prompt];
    const std::vector<uint8_t> there = stored(prompt);
    for (uint32_t chunk = 0; chunk < keys.size(); ++chunk) {
      if (there[chunk] == 0) continue;
      std::vector<int32_t> blocks;
      for (uint32_t b = 0; b < kBlocksPerChunk; ++b)
        blocks.push_back(static_cast<int32_t>(chunk * kBlocksPerChunk + b));
      cache_->spoil(chunk);
      const Depot::LoadGroup group{want(), chunk, kBlocksPerChunk, blocks};
      const uint64_t promised_ns = now_ns();
      auto plan = depot_->plan_load(ns_, keys, std::span(&group, 1), {});
      if (!plan) continue;
      const LoadPlan wanted = *plan;
      const uint64_t job = next_job_++;
      if (auto queued = depot_->submit_load(job, std::move(*plan)); !queued)
        violated(Verdict::broken, "a load is refused: " + queued.error().message);
      const Completion ended = wait_for(job);
      check(wanted, ended, 0, keys, promised_ns);
      if (ended.failures.empty()) loaded.insert(keys[chunk]);
    }
  }
}

// --- the end
// -----------------------------------------------------------------------------------------------------

}  // namespace tokendepot::sim
