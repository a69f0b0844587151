// The simulated world of one run and the processes in it.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <vector>

#include "disk.h"
#include "history.h"
#include "scheduler.h"
#include "tokendepot/depot.h"

namespace tokendepot::sim {

inline constexpr uint64_t kMs = 1'000'000;
inline constexpr uint32_t kChunkTokens = 32;
inline constexpr uint32_t kChunksPerPrompt = 4;
inline constexpr uint64_t kHeardWithin = 1100 * kMs;     // of a condemn record, by every process
inline constexpr uint64_t kPatience = 600 * 1000 * kMs;  // of a job or of an open, in virtual time

/// Of the one group that all processes store.
GroupShape shape();
GroupWant want();

class Cache;
struct World;

/// What one engine process does: opens the depot, stores and loads as an engine would.
class Process {
 public:
  Process(World& world, ProcessId id, uint32_t rounds);

  void run();
  bool open_depot();
  void close_depot() { depot_.reset(); }
  /// Chunks [first, last) of a prompt; items that are stored already are left out.
  void store(size_t prompt, size_t first, size_t last);
  /// The stored prefix of a prompt, into staging first where `hold`; so many other prompts are stored before
  /// its end is waited for.
  void load(size_t prompt, bool hold, size_t stores_meanwhile);
  /// Promises whatever is stored, and loads it when almost the whole grace of what was evicted meanwhile has
  /// passed.
  void load_late();
  std::vector<uint8_t> stored(size_t prompt);
  /// Loads every chunk that is there, each for itself.
  void load_all(std::set<Key>& loaded);
  Depot& depot() { return *depot_; }
  const std::set<Key>& forgotten() const { return forgotten_; }

 private:
  /// Whether this very place is still in the index.
  bool promises(const LoadItem& item);
  void begin_store(size_t prompt, size_t first, size_t last);
  void end_stores();
  /// Those of stores that end earlier are kept.
  Completion wait_for(uint64_t job);
  void check(const LoadPlan& plan, const Completion& ended, size_t first_chunk, const std::vector<Key>& keys,
             uint64_t promised_ns);

  World& world_;
  const ProcessId id_;
  const uint32_t rounds_;
  std::unique_ptr<Depot> depot_;
  Cache* const cache_;  // threads of a killed process may still point there
  NamespaceDigest ns_;
  uint64_t next_job_ = 1;
  std::map<uint64_t, std::vector<StoreItem>> stores_;  // begun, by job
  std::map<uint64_t, Completion> ended_;               // not asked for yet, by job
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
  /// Whether nobody but the process itself could have written over what it uses, and nothing else harms it.
  bool leases_hold() const {
    return scenario.kind == Scenario::Kind::kills && scenario.processes == 1 && !crowded;
  }
  /// Whether what was looked up then must still load, though another process may have evicted it.
  bool promise_holds(uint64_t promised_ns) const;
  void check_end();
  void check_owed(const std::set<Key>& loaded) const;
};

}  // namespace tokendepot::sim
