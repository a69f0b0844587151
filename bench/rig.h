// A depot in a directory of its own with a paged cache, and loops that keep N jobs in flight.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "result.h"
#include "tokendepot/depot.h"

namespace tokendepot::bench {

[[noreturn]] inline void stop(const std::string& why) {
  std::fprintf(stderr, "bench: %s\n", why.c_str());
  std::exit(2);
}

/// The value, or the end of the program with the error's sentence.
template <typename T>
T unwrap(Result<T> result) {
  if (!result) stop(result.error().message);
  return std::move(*result);
}

/// 256 tokens in blocks of 16, 128 values of 2 bytes a row.
inline GroupShape shape_of_mib(double mib) {
  GroupShape shape;
  shape.tokens = 256;
  shape.block_tokens = 16;
  shape.row_bytes = 256;
  // One head of one layer is 128 KiB (K and V).
  const auto units = static_cast<uint16_t>(mib * 8);
  const uint16_t heads = units % 8 == 0 ? 8 : 4;
  shape.part = {0, static_cast<uint16_t>(units / heads), 0, heads};
  return shape;
}

/// "1MiB", "2.5MiB".
inline std::string size_name(double mib) {
  std::string number = std::to_string(mib);
  number.erase(number.find_last_not_of('0') + 1);
  if (number.ends_with('.')) number.pop_back();
  return number + "MiB";
}

inline void fill_random(std::span<std::byte> memory) {
  std::mt19937_64 random(7);
  for (uint64_t at = 0; at + 8 <= memory.size(); at += 8) {
    const uint64_t value = random();
    std::memcpy(memory.data() + at, &value, 8);
  }
}

/// Memory of the paged cache, filled with random bytes, and what gives it back.
using CacheMemory = std::unique_ptr<std::byte, std::function<void(std::byte*)>>;

inline CacheMemory host_cache(uint64_t bytes) {
  auto* memory = static_cast<std::byte*>(
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0));
  if (memory == MAP_FAILED) stop("no memory for the paged cache");
  fill_random({memory, bytes});
  return {memory, [bytes](std::byte* at) { munmap(at, bytes); }};
}

/// A MiB of memory, mapped and given back: the kernel locks the process's memory map for both.
inline void map_and_give_back() {
  constexpr size_t kBytes = 1 << 20;
  void* const mapped = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) stop("the system refused a MiB of memory");
  munmap(mapped, kBytes);
}

struct RigPlan {
  std::string base;  // where the depot's directory is made
  double mib = 0;    // payload of an extent
  size_t extents = 0;
  uint64_t segment_bytes = 0;  // 0 = the depot's choice
  uint64_t capacity = 0;
  // At least 512 MiB by default, so that neither source nor destination stays in the CPU's caches.
  uint64_t cache_bytes = 512ull << 20;
  size_t job_extents = 1;      // extents of one job
  bool heads_first = true;     // blocks as (head, token, row): runs of 4 KiB; else (token, head, row)
  bool drops_allowed = false;  // stores that the depot drops are counted and sent again
  Options options = {};        // a root in it says how bytes move; its path and sizes are the rig's
  CacheMemory (*memory)(uint64_t bytes) = host_cache;
};

class Rig {
 public:
  explicit Rig(RigPlan plan) : plan_(std::move(plan)), shape_(shape_of_mib(plan_.mib)) {
    std::string pattern = plan_.base + "/tokendepot-bench-XXXXXX";
    if (mkdtemp(pattern.data()) == nullptr) stop("cannot make a directory in " + plan_.base);
    directory_ = pattern;
    const auto fitting = static_cast<size_t>(static_cast<double>(plan_.cache_bytes >> 20) / plan_.mib);
    chunks_ = std::max<size_t>(4, std::min(plan_.extents, fitting));
    const uint64_t plane = uint64_t{shape_.block_tokens} * shape_.part.heads() * shape_.row_bytes;
    blocks_ = static_cast<uint32_t>(chunks_ * shape_.blocks());
    layer_bytes_ = 2 * plane * blocks_;
    bytes_ = layer_bytes_ * shape_.part.layers();
    memory_ = plan_.memory(bytes_);
    if (plan_.options.roots.empty()) plan_.options.roots.emplace_back();
    RootOptions& root = plan_.options.roots[0];
    root.path = directory_ + "/root";
    root.capacity_bytes = plan_.capacity;
    // Nobody else was promised what is evicted: what is measured is no grace.
    plan_.options.eviction_grace_ms = 0;
    root.segment_bytes = plan_.segment_bytes;
    plan_.options.free_space_reserve = 0;
    plan_.options.store_queue_bytes = 4ull << 30;
    open();
    std::mt19937_64 random(7);
    std::vector<uint32_t> tokens(plan_.extents * 256);
    for (uint32_t& token : tokens) token = static_cast<uint32_t>(random() % 128000);
    KeyChain chain(ns_, 256);
    chain.append(tokens);
    keys_ = chain.keys();
  }
  ~Rig() {
    depot_.reset();
    memory_.reset();
    std::filesystem::remove_all(directory_);
  }
  Rig(const Rig&) = delete;
  Rig& operator=(const Rig&) = delete;

  /// Closes the depot if it is open, and opens it. Seconds that Depot::open() took.
  double open() {
    depot_.reset();
    const double begin = now_s();
    auto opened = Depot::open(plan_.options);
    const double took = now_s() - begin;
    if (!opened) stop(opened.error().message);
    depot_ = std::move(*opened);
    const auto ns = depot_->register_namespace(R"({"model":"bench"})");
    if (!ns) stop(ns.error().message);
    ns_ = *ns;
    const uint64_t plane = layer_bytes_ / blocks_ / 2;
    const auto row = static_cast<int64_t>(shape_.row_bytes);
    const int64_t head = plan_.heads_first ? row * shape_.block_tokens : row;
    const int64_t token = plan_.heads_first ? row : row * static_cast<int64_t>(shape_.part.heads());
    PagedCache cache;
    cache.shape = shape_;
    cache.block_count = blocks_;
    for (uint32_t layer = 0; layer < shape_.part.layers(); ++layer) {
      std::byte* const base = memory_.get() + layer * layer_bytes_;
      cache.layers.push_back({{base, static_cast<int64_t>(2 * plane), head, token, 0},
                              {base + plane, static_cast<int64_t>(2 * plane), head, token, 0}});
    }
    if (auto attached = depot_->attach(cache); !attached) stop(attached.error().message);
    return took;
  }

  struct Run {
    double gb_per_s = 0;
    double cpu_s_per_gb = 0;
    uint64_t dropped = 0;
  };
  uint64_t extent_payload() const { return shape_.payload_bytes(); }
  const std::string& directory() const { return directory_; }
  std::byte* memory() const { return memory_.get(); }
  uint64_t memory_bytes() const { return bytes_; }
  DepotStats stats() const { return depot_->stats(); }
  /// See Depot::engine_step().
  void engine_step(bool begins) { depot_->engine_step(begins); }
  std::string transport() const {
    const RootStats root = stats().roots[0];
    return root.transport + " (" + root.reason + ")";
  }

  /// Stores every extent under new keys, `flight` jobs at a time; again and again until `seconds` are over.
  Run store(size_t flight, double seconds = 0) {
    Run run = drive(flight, seconds, [&](size_t first, size_t count, uint64_t job) {
      if (first == 0) new_keys();
      return submit_store(first, count, job);
    });
    for (int attempt = 0; !dropped_.empty(); ++attempt) {
      if (attempt == 100) stop("the depot drops every store");
      store_dropped();
    }
    return run;
  }
  /// Loads every extent, job by job in a shuffled order; again and again until `seconds` are over.
  Run load(size_t flight, double seconds = 0) {
    std::vector<size_t> order(jobs());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random_);
    return drive(flight, seconds, [&](size_t first, size_t, uint64_t job) {
      const size_t from = order[first / plan_.job_extents] * plan_.job_extents;
      const size_t count = std::min(plan_.job_extents, plan_.extents - from);
      std::vector<int32_t> blocks;
      for (size_t i = from; i < from + count; ++i) append_blocks(i, blocks);
      const GroupWant want{0, shape_.kind, shape_.part, shape_.tokens, 0};
      const Depot::LoadGroup group{want, static_cast<uint32_t>(from), shape_.blocks(), blocks};
      auto plan = depot_->plan_load(ns_, keys_, std::span(&group, 1), std::chrono::seconds(60));
      if (!plan) stop(plan.error().message);
      return depot_->submit_load(job, std::move(*plan));
    });
  }

 private:
  size_t jobs() const { return (plan_.extents + plan_.job_extents - 1) / plan_.job_extents; }

  void new_keys() {
    ++generation_;
    for (Key& key : keys_) std::memcpy(&key.bytes[24], &generation_, sizeof generation_);
  }
  void append_blocks(size_t chunk, std::vector<int32_t>& blocks) const {
    const auto first = static_cast<int32_t>(chunk % chunks_ * shape_.blocks());
    for (uint32_t b = 0; b < shape_.blocks(); ++b) blocks.push_back(first + static_cast<int32_t>(b));
  }
  StoreItem item(size_t chunk) const {
    StoreItem made{keys_[chunk], static_cast<uint32_t>(chunk), 0, {}};
    append_blocks(chunk, made.blocks);
    return made;
  }
  Status submit_store(size_t first, size_t count, uint64_t job) {
    StorePlan plan;
    plan.ns = ns_;
    for (size_t i = first; i < first + count; ++i) plan.items.push_back(item(i));
    return depot_->submit_store(job, std::move(plan));
  }
  /// One by one, so that the loads that follow find the last generation complete.
  void store_dropped() {
    std::vector<uint32_t> again;
    again.swap(dropped_);
    std::ranges::sort(again);
    again.erase(std::ranges::unique(again).begin(), again.end());
    for (const uint32_t chunk : again) {
      if (auto sent = submit_store(chunk, 1, next_job_++); !sent) stop(sent.error().message);
      while (collect() == 0) depot_->wait_ended(std::chrono::seconds(1));
    }
  }

  /// Number of jobs that ended since the last call.
  size_t collect() {
    const auto done = depot_->poll();
    for (const Completion& completion : done) {
      moved_ += completion.items_ok;
      for (const ItemFailure& failure : completion.failures) {
        const bool dropped = failure.reason == ItemFailure::Reason::dropped;
        if (!plan_.drops_allowed || !dropped || completion.kind != JobKind::store)
          stop("an extent failed: " + std::string(name(failure.reason)));
        dropped_.push_back(failure.chunk);
      }
    }
    return done.size();
  }

  /// Sends whole passes over all extents until the time is over, and waits for their end.
  template <typename Submit>
  Run drive(size_t flight, double seconds, const Submit& submit) {
    size_t in_flight = 0;
    size_t next = 0;
    moved_ = 0;
    const double cpu = cpu_s();
    const double begin = now_s();
    while (true) {
      while (next < plan_.extents && in_flight < flight) {
        const size_t count = std::min(plan_.job_extents, plan_.extents - next);
        if (auto sent = submit(next, count, next_job_++); !sent) stop(sent.error().message);
        next += count;
        ++in_flight;
        if (next == plan_.extents && now_s() - begin < seconds) next = 0;
      }
      if (in_flight == 0) break;
      const size_t ended = collect();
      in_flight -= ended;
      if (ended == 0) depot_->wait_ended(std::chrono::seconds(1));
    }
    const double gb = static_cast<double>(moved_ * extent_payload()) * 1e-9;
    return {gb / (now_s() - begin), gb > 0 ? (cpu_s() - cpu) / gb : 0, dropped_.size()};
  }

  RigPlan plan_;
  GroupShape shape_;
  size_t chunks_;
  uint32_t blocks_;
  uint64_t layer_bytes_;
  uint64_t bytes_;
  CacheMemory memory_;
  std::string directory_;
  std::unique_ptr<Depot> depot_;
  NamespaceDigest ns_;
  std::vector<Key> keys_;
  uint64_t generation_ = 0;
  uint64_t next_job_ = 1;
  uint64_t moved_ = 0;
  std::vector<uint32_t> dropped_;  // chunks of stores that the depot dropped
  std::mt19937 random_{11};
};

}  // namespace tokendepot::bench
