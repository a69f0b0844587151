#include "history.h"

#include <algorithm>
#include <iterator>
#include <set>
#include <string>
#include <vector>

#include "format/extent.h"
#include "report.h"
#include "store/journal_file.h"
#include "world.h"

namespace tokendepot::sim {
namespace {

constexpr uint64_t kSegmentBytes = 64 << 10;
constexpr char kDiskRoot[] = "/simulated/disk";
constexpr char kMemoryRoot[] = "/simulated/memory";

}  // namespace

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
  if (scenario.leases) {  // the healthy disk of a busy machine
    faults.slow_transfer = 0.3;
    faults.short_read = 0.3;
    faults.short_write = 0.3;
  }
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

namespace {

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

void run_lease_history(uint64_t seed) {
  Scenario scenario = scenario_of(seed);
  scenario.kind = Scenario::Kind::kills;
  scenario.pressure = true;
  scenario.processes = 1;
  scenario.grace_ms = 0;
  scenario.leases = true;
  World& world = *new World(seed, scenario);
  make_prompts(world, 40);
  disk().set_faults(world.faults());
  wait_until_dead(world.start(40));
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
