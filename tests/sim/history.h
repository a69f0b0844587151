// One run: processes that store and load through Depot on simulated roots, what happens to them, and what
// must hold afterwards.
#pragma once

#include <cstdint>

namespace tokendepot::sim {

/// What a seed stands for.
struct Scenario {
  enum class Kind : uint8_t {
    kills,   // kill -9 at any point; the disk is honest
    errors,  // and system calls fail, are cut short, are slow
    rot,     // and stored bits flip
    liar,    // and writes are lost or go elsewhere, reads bring other bytes
    power,   // and the power fails: unflushed writes are kept, dropped or torn
  };
  Kind kind = Kind::kills;
  bool pressure = false;  // more is stored than fits, the disk fills up
  bool memory = false;    // a memory root comes first
  bool direct = false;    // O_DIRECT on the disk root
  int processes = 1;
  uint32_t grace_ms = 0;       // of evicted segments
  bool write_through = false;  // from the memory root to the disk
  bool leases = false;         // run_lease_history()
};
Scenario scenario_of(uint64_t seed);

/// Runs the whole life of `seed`; inside run_simulation().
void run_history(uint64_t seed);
/// One process whose loads and stores are slow while more is stored than fits: what it reads and writes is
/// the coldest, and nothing but its being in use keeps it.
void run_lease_history(uint64_t seed);
/// A short history of one process on an honest disk. With `crash_at` > 0 it dies in its n-th change of the
/// disk, with `again_at` > 0 the process that recovers from that dies in its own. Report::writes says how
/// many changes there were.
void run_short_history(uint64_t seed, uint64_t crash_at, uint64_t again_at);

}  // namespace tokendepot::sim
