// A depot in a directory of its own with a paged cache on the host, and loops that keep N extents in flight.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "result.h"
#include "tokendepot/depot.h"

namespace tokendepot::bench {

[[noreturn]] inline void stop(const std::string& why) {
  std::fprintf(stderr, "bench: %s\n", why.c_str());
  std::exit(2);
}

/// 256 tokens in blocks of 16, 128 values of 2 bytes a row, blocks as (head, token, row): runs of 4 KiB.
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

class Rig {
 public:
  Rig(const std::string& base, double mib, size_t extents, uint64_t segment_bytes, uint64_t capacity)
      : shape_(shape_of_mib(mib)), extents_(extents) {
    std::string pattern = base + "/tokendepot-bench-XXXXXX";
    if (mkdtemp(pattern.data()) == nullptr) stop("cannot make a directory in " + base);
    directory_ = pattern;
    // A paged cache of at least 512 MiB, so that neither source nor destination stays in the CPU's caches.
    chunks_ = std::max<size_t>(4, std::min<size_t>(extents, static_cast<size_t>(512.0 / mib)));
    const uint64_t plane = uint64_t{shape_.block_tokens} * shape_.part.heads() * shape_.row_bytes;
    blocks_ = static_cast<uint32_t>(chunks_ * shape_.blocks());
    layer_bytes_ = 2 * plane * blocks_;
    bytes_ = layer_bytes_ * shape_.part.layers();
    memory_ = static_cast<std::byte*>(
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0));
    if (memory_ == MAP_FAILED) stop("no memory for the paged cache");
    std::mt19937_64 random(7);
    for (uint64_t at = 0; at < bytes_; at += 8) {
      const uint64_t value = random();
      std::memcpy(memory_ + at, &value, 8);
    }
    options_.roots.push_back(
        {.path = directory_ + "/root", .capacity_bytes = capacity, .segment_bytes = segment_bytes});
    options_.free_space_reserve = 0;
    options_.store_queue_bytes = 4ull << 30;
    open();
    std::vector<uint32_t> tokens(extents * 256);
    for (uint32_t& token : tokens) token = static_cast<uint32_t>(random() % 128000);
    KeyChain chain(ns_, 256);
    chain.append(tokens);
    keys_ = chain.keys();
  }
  ~Rig() {
    depot_.reset();
    munmap(memory_, bytes_);
    std::filesystem::remove_all(directory_);
  }
  Rig(const Rig&) = delete;
  Rig& operator=(const Rig&) = delete;

  void open() {
    depot_.reset();
    auto opened = Depot::open(options_);
    if (!opened) stop(opened.error().message);
    depot_ = std::move(*opened);
    const auto ns = depot_->register_namespace(R"({"model":"bench"})");
    if (!ns) stop(ns.error().message);
    ns_ = *ns;
    const uint64_t plane = layer_bytes_ / blocks_ / 2;
    PagedCache cache;
    cache.shape = shape_;
    cache.block_count = blocks_;
    for (uint32_t layer = 0; layer < shape_.part.layers(); ++layer) {
      std::byte* const base = memory_ + layer * layer_bytes_;
      const auto head = static_cast<int64_t>(shape_.block_tokens * shape_.row_bytes);
      cache.layers.push_back({{base, static_cast<int64_t>(2 * plane), head, shape_.row_bytes, 0},
                              {base + plane, static_cast<int64_t>(2 * plane), head, shape_.row_bytes, 0}});
    }
    if (auto attached = depot_->attach(cache); !attached) stop(attached.error().message);
  }

  struct Run {
    double gb_per_s = 0;
    double cpu_s_per_gb = 0;
  };
  uint64_t extent_payload() const { return shape_.payload_bytes(); }
  const std::string& directory() const { return directory_; }
  std::byte* memory() const { return memory_; }
  uint64_t memory_bytes() const { return bytes_; }
  const std::string transport() const {
    return depot_->stats().roots[0].transport + " (" + depot_->stats().roots[0].reason + ")";
  }

  /// Stores every extent once, `flight` at a time, under keys that differ by `generation`.
  Run store(size_t flight, uint32_t generation = 0) {
    if (generation != 0) {
      for (Key& key : keys_) key.bytes[31] = static_cast<uint8_t>(key.bytes[31] + 1);
    }
    return drive(flight, [&](size_t i, uint64_t job) {
      StorePlan plan;
      plan.ns = ns_;
      plan.items.push_back({keys_[i], static_cast<uint32_t>(i), 0, blocks_of(i)});
      return depot_->submit_store(job, std::move(plan));
    });
  }
  /// Loads every extent once, in a shuffled order.
  Run load(size_t flight) {
    const GroupWant want{0, shape_.kind, shape_.part, shape_.tokens, 0};
    std::vector<size_t> order(extents_);
    for (size_t i = 0; i < extents_; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random_);
    return drive(flight, [&](size_t n, uint64_t job) {
      const size_t i = order[n];
      const auto blocks = blocks_of(i);
      const Depot::LoadGroup group{want, static_cast<uint32_t>(i), shape_.blocks(), blocks};
      auto plan = depot_->plan_load(ns_, keys_, std::span(&group, 1), std::chrono::seconds(60));
      if (!plan) stop(plan.error().message);
      return depot_->submit_load(job, std::move(*plan));
    });
  }

 private:
  std::vector<int32_t> blocks_of(size_t chunk) const {
    std::vector<int32_t> blocks(shape_.blocks());
    const auto first = static_cast<int32_t>(chunk % chunks_ * shape_.blocks());
    for (size_t b = 0; b < blocks.size(); ++b) blocks[b] = first + static_cast<int32_t>(b);
    return blocks;
  }
  template <typename Submit>
  Run drive(size_t flight, const Submit& submit) {
    size_t submitted = 0;
    size_t ended = 0;
    const double begin = now_s();
    const double cpu = cpu_s();
    while (ended < extents_) {
      while (submitted < extents_ && submitted - ended < flight) {
        if (auto sent = submit(submitted, next_job_++); !sent) stop(sent.error().message);
        ++submitted;
      }
      const auto done = depot_->poll();
      for (const Completion& completion : done) {
        if (completion.items_ok != 1)
          stop("an extent failed: " + std::string(name(completion.failures[0].reason)));
      }
      ended += done.size();
      if (done.empty()) depot_->wait_ended(std::chrono::seconds(1));
    }
    const double gb = static_cast<double>(extents_ * extent_payload()) * 1e-9;
    return {gb / (now_s() - begin), (cpu_s() - cpu) / gb};
  }

  GroupShape shape_;
  size_t extents_;
  size_t chunks_;
  uint32_t blocks_;
  uint64_t layer_bytes_;
  uint64_t bytes_;
  std::byte* memory_;
  std::string directory_;
  Options options_;
  std::unique_ptr<Depot> depot_;
  NamespaceDigest ns_;
  std::vector<Key> keys_;
  uint64_t next_job_ = 1;
  std::mt19937 random_{11};
};

}  // namespace tokendepot::bench
