#include "history.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <iterator>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "base/bytes.h"
#include "base/check.h"
#include "disk.h"
#include "format/extent.h"
#include "report.h"
#include "scheduler.h"
#include "store/journal_file.h"
#include "tokendepot/depot.h"

namespace tokendepot::sim {
namespace {

constexpr uint64_t kMs = 1'000'000;
constexpr uint64_t kSecond = 1000 * kMs;
constexpr uint32_t kBlockTokens = 16;
constexpr uint32_t kChunkTokens = 32;
constexpr uint32_t kBlocksPerChunk = kChunkTokens / kBlockTokens;
constexpr uint32_t kRowBytes = 64;
constexpr uint32_t kHeads = 2;
constexpr uint32_t kChunksPerPrompt = 4;
constexpr uint32_t kSlots = 16;  // chunks that a process's cache has blocks for
constexpr uint64_t kPlaneBytes = uint64_t{kBlockTokens} * kHeads * kRowBytes;
constexpr uint64_t kSegmentBytes = 64 << 10;
constexpr uint64_t kHeardWithin = 1100 * kMs;  // of a condemn record, by every process
constexpr uint64_t kPatience = 600 * kSecond;  // of a job or of an open, in virtual time
constexpr char kDiskRoot[] = "/simulated/disk";
constexpr char kMemoryRoot[] = "/simulated/memory";
constexpr char kManifest[] = R"({"model":"simulated"})";

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

struct World;

/// What one engine process does: opens the depot, stores and loads as an engine would.
class Process {
 public:
  Process(World& world, ProcessId id, uint32_t rounds) : world_(world), id_(id), rounds_(rounds) {}

  void run();
  bool open_depot();
  void close_depot() { depot_.reset(); }
  /// Chunks [first, last) of a prompt; items that are stored already are left out.
  void store(size_t prompt, size_t first, size_t last);
  /// The stored prefix of a prompt. `all`: every acknowledged chunk must be in it and load.
  void load(size_t prompt, bool hold);
  /// Promises whatever is stored, and loads it when almost the whole grace of what was evicted meanwhile has
  /// passed.
  void load_late();
  std::vector<uint8_t> stored(size_t prompt);
  /// Loads every chunk that is there, each for itself.
  void load_all(std::set<Key>& loaded);
  Depot& depot() { return *depot_; }
  const std::set<Key>& forgotten() const { return forgotten_; }

 private:
  Completion wait_for(uint64_t job);
  void check(const LoadPlan& plan, const Completion& ended, size_t first_chunk, const std::vector<Key>& keys,
             uint64_t promised_ns);

  World& world_;
  const ProcessId id_;
  const uint32_t rounds_;
  std::unique_ptr<Depot> depot_;
  Cache* const cache_ = new Cache;  // threads of a killed process may still point there
  NamespaceDigest ns_;
  uint64_t next_job_ = 1;
  std::set<Key> forgotten_;
};

struct World {
  Scenario scenario;
  bool faults_on = false;
  bool flawless = true;  // nothing has happened that could excuse a bad extent
  // Others have filled the disk, now or earlier: files went without a grace, perhaps without a record, for
  // which there was no room.
  bool crowded = false;
  uint64_t disk_capacity = 0;
  uint64_t memory_capacity = 0;
  NamespaceDigest ns;
  std::vector<std::vector<Key>> prompts;
  std::set<Key> acknowledged;
  std::set<Key> written_back;  // acknowledged, and on the disk for good
  std::set<Key> damaged;
  ProcessId next_process = 1;
  std::vector<std::unique_ptr<Process>> dead_and_alive;

  explicit World(uint64_t seed, const Scenario& what);
  Options options(ProcessId process) const;
  Process& new_process(uint32_t rounds) {
    return *dead_and_alive.emplace_back(std::make_unique<Process>(*this, next_process++, rounds));
  }
  ProcessId start(uint32_t rounds);
  Faults faults() const;
  /// Whether what was looked up then must still load, though another process may have evicted it.
  bool promise_holds(uint64_t promised_ns) const;
  void check_end();
  void check_owed(const std::set<Key>& loaded) const;
};

World::World(uint64_t seed, const Scenario& what)
    : scenario(what), flawless(what.kind != Scenario::Kind::liar) {
  Random random(seed ^ 0x77);
  const uint64_t segments = what.pressure ? random.between(4, 10) : 128;
  disk_capacity = segments * kSegmentBytes + random.below(kPageBytes);
  memory_capacity = (what.pressure ? random.between(3, 6) : 128) * kSegmentBytes;
  disk().add_volume(kDiskRoot, false, disk_capacity + (8 << 20), disk_capacity);
  if (what.memory) disk().add_volume(kMemoryRoot, true, memory_capacity + (4 << 20), memory_capacity);
  if (what.kind == Scenario::Kind::power) disk().expect_power_cuts();
}

Options World::options(ProcessId /*process*/) const {
  Options options;
  if (scenario.memory) {
    options.roots.push_back({.path = kMemoryRoot,
                             .capacity_bytes = memory_capacity,
                             .segment_bytes = kSegmentBytes,
                             .write_through = scenario.write_through});
  }
  options.roots.push_back({.path = kDiskRoot,
                           .capacity_bytes = disk_capacity,
                           .segment_bytes = kSegmentBytes,
                           .transport = scenario.direct ? TransportChoice::direct : TransportChoice::buffered,
                           .io = IoChoice::threads});
  options.slab_bytes = 256 << 10;
  options.io_depth = 2;
  options.device_threads = 1;
  options.free_space_reserve = 0;
  options.eviction_grace_ms = scenario.grace_ms;
  return options;
}

bool World::promise_holds(uint64_t promised_ns) const {
  const bool excused = scenario.kind != Scenario::Kind::kills || crowded;
  return !excused && now_ns() + kHeardWithin < promised_ns + scenario.grace_ms * kMs;
}

ProcessId World::start(uint32_t rounds) {
  Process& process = new_process(rounds);
  const ProcessId id = next_process - 1;
  if (chance().chance(0.3)) {
    count(Injected::clock_skew);
    set_skew(id, static_cast<int64_t>(chance().below(172'800)) * 1'000'000'000 - 86'400ll * 1'000'000'000);
  }
  start_fiber(id, [&process] { process.run(); });
  return id;
}

Faults World::faults() const {
  Faults faults;
  if (scenario.kind == Scenario::Kind::kills || scenario.kind == Scenario::Kind::power) return faults;
  Random& random = chance();
  const auto sometimes = [&random](double most) {
    return random.chance(0.5) ? 0.0 : most * static_cast<double>(random.below(1000)) / 1000;
  };
  faults.read_error = sometimes(0.1);
  faults.short_read = sometimes(0.3);
  faults.write_error = sometimes(0.1);
  faults.short_write = sometimes(0.3);
  faults.torn_write = sometimes(0.1);
  faults.other_error = sometimes(0.02);
  faults.interrupted = sometimes(0.1);
  faults.slow = sometimes(0.02);
  if (scenario.pressure) faults.no_space = sometimes(0.1);
  if (scenario.kind == Scenario::Kind::liar) {
    faults.rot_in_transit = sometimes(0.05);
    faults.lost_write = sometimes(0.2);
    faults.misdirected_write = sometimes(0.3);
  }
  return faults;
}

// --- one process
// -----------------------------------------------------------------------------------------------------

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
    if (!excused && !world_.faults_on)
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
        load(prompt, true);
        break;
      case 4:
      case 5:
      case 6:
        load(prompt, false);
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
      if (ended.job != job) violated(Verdict::broken, "a job was reported that was not submitted");
      ++report().operations;
      return std::move(ended);
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
  const std::vector<StoreItem> items = plan.items;
  const uint64_t job = next_job_++;
  if (auto queued = depot_->submit_store(job, std::move(plan)); !queued)
    violated(Verdict::broken, "a store is refused: " + queued.error().message);
  if (depot_->wait_gathered(std::chrono::seconds(2))) {
    for (const StoreItem& item : items) cache_->spoil(item.chunk);  // the engine goes on with its blocks
  }
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

void Process::load(size_t prompt, bool hold) {
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
  Completion ended = wait_for(job);
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

void World::check_owed(const std::set<Key>& loaded) const {
  const bool strict = !scenario.pressure && scenario.kind != Scenario::Kind::liar;
  if (!strict) return;
  const std::set<Key>& owed = scenario.kind == Scenario::Kind::power ? written_back : acknowledged;
  size_t missing = 0;
  for (const Key& key : owed) {
    if (loaded.contains(key) || damaged.contains(key)) continue;
    ++missing;
    disk().explain(key);
  }
  if (missing > 0) {
    violated(Verdict::lost, std::to_string(missing) + " of " + std::to_string(owed.size()) +
                                " acknowledged chunks are not served after a restart");
  }
}

/// The faults are over: a new process finds what was acknowledged, another one finds the same, and stores
/// work.
void World::check_end() {
  disk().set_faults({});
  faults_on = false;
  Process& last = new_process(0);
  const ProcessId id = next_process - 1;
  bool done = false;
  start_fiber(id, [&] {
    if (last.open_depot()) {
      std::set<Key> first_time;
      last.load_all(first_time);
      // Of a chunk that several have stored the index knows one copy. Where that one is damaged, it is
      // condemned when it is loaded, and the next start finds another.
      if (flawless) check_owed(first_time);
      last.close_depot();
      // Recovery again, of what recovery left: nothing more to do, nothing less to find.
      (void)last.open_depot();
      std::set<Key> second_time;
      last.load_all(second_time);
      check_owed(second_time);
      // More may be found: a bad copy that the first one condemned hides another copy no longer.
      std::set<Key> gone;
      std::ranges::set_difference(first_time, second_time, std::inserter(gone, gone.end()));
      std::erase_if(gone, [&](const Key& key) { return damaged.contains(key); });
      const bool same = gone.empty() && (!flawless || first_time == second_time);
      if (!same && scenario.kind != Scenario::Kind::liar && !scenario.pressure) {
        for (const Key& key : gone) disk().explain(key);
        violated(Verdict::lost, "a second recovery finds other extents than the first");
      }
      // Stores work again, if need be by evicting; where roots are small, for longer than they have room.
      const uint64_t room = memory_capacity + disk_capacity;
      size_t wanted = scenario.pressure ? room / extent_bytes(shape()) : 1;
      uint64_t patience = now_ns() + kPatience;
      for (size_t prompt = 0; wanted > 0; prompt = (prompt + 1) % prompts.size()) {
        if (now_ns() > patience) violated(Verdict::hang, "stores never work again after the faults");
        const Key& key = prompts[prompt][0];
        const bool before = acknowledged.erase(key) > 0;
        last.depot().forget(key, 0);
        last.store(prompt, 0, 1);
        if (acknowledged.contains(key)) {
          --wanted;
          patience = now_ns() + kPatience;
          continue;
        }
        if (before) acknowledged.insert(key);
        if (prompt + 1 == prompts.size()) sleep_ns(100 * kMs);
      }
      std::set<Key> third_time;
      last.load_all(third_time);
      last.close_depot();
    }
    done = true;
  });
  while (!done) sleep_ns(10 * kMs);
}

void make_prompts(World& world, size_t prompts) {
  // Registered in the first process; the digest is the manifest's, whoever registers it.
  world.prompts.clear();
  Random tokens(17);
  for (size_t i = 0; i < prompts; ++i) {
    KeyChain chain(NamespaceDigest{}, kChunkTokens);
    std::vector<uint32_t> ids(kChunksPerPrompt * kChunkTokens);
    for (uint32_t& id : ids) id = static_cast<uint32_t>(tokens.below(32'000));
    chain.append(ids);
    world.prompts.push_back(chain.keys());
  }
}

void wait_until_dead(ProcessId process) {
  while (has_fibers(process)) sleep_ns(10 * kMs);
}

}  // namespace

Scenario scenario_of(uint64_t seed) {
  Random random(seed * 2 + 1);
  Scenario scenario;
  constexpr Scenario::Kind kKinds[] = {Scenario::Kind::kills,  Scenario::Kind::kills, Scenario::Kind::errors,
                                       Scenario::Kind::errors, Scenario::Kind::rot,   Scenario::Kind::rot,
                                       Scenario::Kind::liar,   Scenario::Kind::power};
  scenario.kind = kKinds[random.below(std::size(kKinds))];
  scenario.pressure = random.chance(0.35);
  scenario.memory = scenario.kind != Scenario::Kind::power && random.chance(0.4);
  scenario.direct = random.chance(0.5);
  scenario.processes = static_cast<int>(random.between(1, 3));
  if (random.chance(0.7)) scenario.grace_ms = static_cast<uint32_t>(random.between(2500, 8000));
  scenario.write_through = scenario.memory && random.chance(0.3);
  return scenario;
}

void run_history(uint64_t seed) {
  World& world = *new World(seed, scenario_of(seed));
  const Scenario& scenario = world.scenario;
  Random& random = chance();
  make_prompts(world, scenario.pressure ? 40 : 10);
  std::vector<ProcessId> alive;
  const auto rounds = [&random] { return static_cast<uint32_t>(random.between(5, 40)); };
  for (int i = 0; i < scenario.processes; ++i) alive.push_back(world.start(rounds()));

  const auto start_faults = [&world] {
    world.faults_on = true;
    disk().set_faults(world.faults());
  };
  if (random.chance(0.7)) start_faults();
  const uint64_t events = random.between(4, 16);
  for (uint64_t event = 0; event < events; ++event) {
    sleep_ns(random.chance(0.5) ? random.between(1, 200) * kMs : random.between(200, 6000) * kMs);
    std::erase_if(alive, [](ProcessId process) { return !has_fibers(process); });
    const bool power = scenario.kind == Scenario::Kind::power;
    switch (random.below(6)) {
      case 0:
      case 1:
        if (!alive.empty()) {
          const size_t victim = random.below(alive.size());
          if (random.chance(0.5)) {
            disk().crash_at(alive[victim], random.between(1, 12));
          } else {
            count(Injected::kill);
            ++report().crashes;
            disk().close_all(alive[victim]);
            kill_process(alive[victim]);
            alive.erase(alive.begin() + static_cast<ptrdiff_t>(victim));
          }
        }
        break;
      case 2:
        start_faults();
        break;
      case 3:
        disk().set_faults({});  // what began under faults may still fail of them: faults_on stays
        break;
      case 4:
        if (scenario.kind == Scenario::Kind::rot) {
          world.flawless = false;
          for (uint64_t flips = random.between(1, 6); flips > 0; --flips) disk().rot(world.damaged);
        }
        if (scenario.pressure) {
          const uint64_t foreign = random.chance(0.5) ? 0 : (8 << 20) + random.below(world.disk_capacity);
          world.crowded |= foreign > 0;
          disk().set_foreign_bytes(kDiskRoot, foreign);
        }
        break;
      default:
        if (power && random.chance(0.5)) {
          disk().settle();
          tell("everything is written back");
          world.written_back = world.acknowledged;
        } else if (power) {
          for (const ProcessId process : alive) {
            disk().close_all(process);
            kill_process(process);
          }
          alive.clear();
          world.flawless = false;
          world.acknowledged = world.written_back;
          tell("the power fails");
          disk().cut_power();
          ++report().crashes;
        }
    }
    while (alive.size() < static_cast<size_t>(scenario.processes)) alive.push_back(world.start(rounds()));
  }
  disk().set_faults({});
  disk().set_foreign_bytes(kDiskRoot, 0);
  for (const ProcessId process : alive) wait_until_dead(process);
  world.check_end();
}

void run_short_history(uint64_t seed, uint64_t crash_at, uint64_t again_at) {
  Scenario scenario = scenario_of(seed);
  scenario.kind = Scenario::Kind::kills;
  scenario.processes = 1;
  World& world = *new World(seed, scenario);
  make_prompts(world, 6);
  const ProcessId process = world.start(25);
  if (crash_at > 0) disk().crash_at(process, crash_at);
  wait_until_dead(process);
  report().writes = disk().changes_of(process);
  if (again_at > 0) {
    const ProcessId heir = world.start(1);
    disk().crash_at(heir, again_at);
    wait_until_dead(heir);
  }
  world.check_end();
}

}  // namespace tokendepot::sim
