// The workload behind the interface: a depot, its paged cache, and loops that keep extents in flight.
#pragma once

#include <deque>
#include <numeric>
#include <optional>
#include <random>

#include "workload/cache_memory.h"
#include "workload/limits.h"

namespace tokendepot {

class OpenWorkload final : public Workload {
 public:
  explicit OpenWorkload(const WorkloadSpec& spec) : spec_(spec) {}

  /// Once, before anything else.
  Status open();
  Status fill(const Interrupted& interrupted) override;
  Result<WorkloadRun> run(double seconds, const Interrupted& interrupted) override;
  Result<std::vector<WorkloadLimit>> limits(double seconds) override;
  Result<WorkloadCheck> verify(uint32_t every, const Interrupted& interrupted) override;
  double payload_gb_per_s() const override { return payload_gb_per_s_; }
  std::string file_system() const override { return file_system_; }
  bool in_memory() const override { return in_memory_; }
  DepotStats stats() const override { return depot_->stats(); }

 private:
  struct Extent {
    Key key;
    PayloadId payload;
    uint16_t size = 0;  // class
    bool lost = false;  // could not be loaded
  };
  /// The memory of one size class: extents are stored from its first slots and loaded into the others.
  struct SizeClass {
    uint64_t bytes = 0;
    uint64_t memory_at = 0;
    GroupShape shape;
    uint32_t sources = 0;
    uint32_t slots = 0;
    std::deque<uint32_t> free_sources;  // the longest unused first: neither end stays in the CPU's caches
    std::deque<uint32_t> free_targets;
    std::vector<std::optional<Extent>> loaded;  // by slot: what the last load left there
  };
  /// One job in flight.
  struct Ticket {
    bool write = false;
    uint16_t size = 0;
    double began = 0;
    std::vector<uint32_t> slots;
    std::vector<size_t> stored;  // loads: places in stored_
    Extent storing;              // stores
  };

  bool loads() const { return spec_.kind != WorkloadKind::write; }
  bool stores() const { return spec_.kind == WorkloadKind::write || spec_.kind == WorkloadKind::mixed; }
  uint64_t slot_at(const SizeClass& size, uint32_t slot) const { return size.memory_at + slot * size.bytes; }

  uint64_t one_each() const {
    return std::accumulate(spec_.extent_bytes.begin(), spec_.extent_bytes.end(), uint64_t{0});
  }
  Status check_spec() const;
  Status make_cache();
  Status recycle(const Interrupted& interrupted);
  Status store_volume(const Interrupted& interrupted);
  Status store_and_wait(uint64_t rounds);
  void wait_for_registration(const Interrupted& interrupted) const;
  Status time_payload();

  Status stamp(const SizeClass& size, uint32_t slot, const PayloadId& id);
  Status submit_store(uint16_t size);
  Status submit_load(std::span<const size_t> which);
  bool can_store(uint16_t size) const { return !sizes_[size].free_sources.empty(); }
  bool can_load(size_t which) const { return !sizes_[stored_[which].size].free_targets.empty(); }
  Result<bool> submit_next(size_t& submitted);
  Status start_pass();
  /// Waits for the end of a job; false when none has ended yet.
  bool collect(WorkloadRun* run);
  void end_ticket(const Completion& completion, WorkloadRun* run);
  Status drive(WorkloadRun& run, double seconds, const Interrupted& interrupted);
  Status drive_burst(WorkloadRun& run, const Interrupted& interrupted);
  void finish_all();
  void compare(const SizeClass& size, uint32_t slot, const Extent& extent, WorkloadCheck& check);

  WorkloadSpec spec_;
  std::unique_ptr<CacheMemory> memory_;  // before the depot, which is lent it
  std::unique_ptr<Depot> depot_;
  NamespaceDigest ns_;
  std::vector<SizeClass> sizes_;
  std::vector<Extent> stored_;          // what loads choose from
  std::deque<Extent> recently_stored_;  // by runs, as much as the volume holds
  size_t recent_most_ = 0;
  std::vector<size_t> order_;  // of the pass over stored_
  size_t order_at_ = 0;
  std::vector<Ticket> tickets_;
  std::vector<uint32_t> unused_tickets_;
  std::vector<uint32_t> in_flight_;  // tickets
  uint64_t jobs_ = 0;
  uint32_t serial_ = 0;
  bool drops_cache_ = false;  // each pass begins with it
  bool full_ = false;         // the depot dropped a store since the last one was sent
  bool in_memory_ = false;
  std::string file_system_;
  double payload_gb_per_s_ = 0;
  std::unique_ptr<Limits> limits_;
  std::mt19937 random_;
};

}  // namespace tokendepot
