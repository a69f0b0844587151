#include "tokendepot/workload.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <numeric>

#include "base/errors.h"
#include "device/open_device.h"
#include "io/file.h"
#include "workload/extent_shape.h"
#include "workload/meter.h"
#include "workload/open_workload.h"
#include "workload/page_cache.h"
#include "workload/stamp_word.h"

namespace tokendepot {
namespace {

// More than the CPU's caches, each way.
constexpr uint64_t kCacheMemory = 256ull << 20;
constexpr uint32_t kMostInFlight = 1024;
constexpr uint32_t kProcesses = 2048;
constexpr uint32_t kNobody = UINT32_MAX;  // serial of what is overwritten before a comparison
constexpr auto kPatience = std::chrono::milliseconds(100);
constexpr auto kDeadline = std::chrono::minutes(10);
constexpr double kIdleSeconds = 0.2;  // before a burst
constexpr unsigned kTicketBits = 16;

Traffic traffic_of(WorkloadKind kind) {
  switch (kind) {
    case WorkloadKind::write:
      return Traffic::write;
    case WorkloadKind::mixed:
      return Traffic::mixed;
    case WorkloadKind::read:
    case WorkloadKind::burst:
      break;
  }
  return Traffic::read;
}

Key key_of(const PayloadId& id) {
  Key key;
  for (size_t i = 0; i < key.bytes.size() / sizeof(uint64_t); ++i) {
    const uint64_t word = stamp_word(id.process, id.serial, i);
    std::memcpy(key.bytes.data() + i * sizeof word, &word, sizeof word);
  }
  return key;
}

PathBytes operator-(PathBytes a, const PathBytes& b) {
  return {a.mapped - b.mapped, a.direct - b.direct, a.buffered - b.buffered, a.gds_p2p - b.gds_p2p,
          a.gds_compat - b.gds_compat};
}

PathBytes& operator+=(PathBytes& a, const PathBytes& b) {
  a = {a.mapped + b.mapped, a.direct + b.direct, a.buffered + b.buffered, a.gds_p2p + b.gds_p2p,
       a.gds_compat + b.gds_compat};
  return a;
}

/// Adds to a run what passes between its making and its end.
class Stretch {
 public:
  Stretch(const Depot& depot, WorkloadRun& run) : depot_(depot), run_(run), stats_(depot.stats()) {}
  ~Stretch() {
    run_.seconds += steady_s() - begin_;
    run_.cpu_seconds += process_cpu_s() - cpu_;
    run_.client_seconds += thread_cpu_s() - client_;
    run_.device_read_bytes += device_read_bytes() - read_;
    const DepotStats now = depot_.stats();
    run_.loaded += now.load.by_path - stats_.load.by_path;
    run_.stored += now.store.by_path - stats_.store.by_path;
  }
  Stretch(const Stretch&) = delete;
  Stretch& operator=(const Stretch&) = delete;
  double seconds() const { return steady_s() - begin_; }

 private:
  const Depot& depot_;
  WorkloadRun& run_;
  DepotStats stats_;
  uint64_t read_ = device_read_bytes();
  double cpu_ = process_cpu_s();
  double client_ = thread_cpu_s();
  double begin_ = steady_s();
};

}  // namespace

Result<std::unique_ptr<Workload>> Workload::open(const WorkloadSpec& spec) {
  auto workload = std::make_unique<OpenWorkload>(spec);
  if (auto opened = workload->open(); !opened) return std::unexpected(opened.error());
  return workload;
}

Status OpenWorkload::check_spec() const {
  const auto refuse = [](const char* what, uint64_t value, const char* allowed) {
    return fail(ErrorKind::invalid_argument, "{} is {}, expected {}", what, value, allowed);
  };
  if (spec_.options.roots.size() != 1) return refuse("the number of roots", spec_.options.roots.size(), "1");
  if (spec_.extent_bytes.empty() || spec_.extent_bytes.size() > 16)
    return refuse("the number of extent sizes", spec_.extent_bytes.size(), "1 to 16");
  for (const uint64_t bytes : spec_.extent_bytes) {
    if (bytes < kSmallestExtent || bytes > kLargestExtent || bytes % kPageBytes != 0)
      return refuse("an extent's size", bytes, "a multiple of 4096 from 4096 to 268435456 bytes");
  }
  if (spec_.in_flight < 1 || spec_.in_flight > kMostInFlight)
    return refuse("in_flight", spec_.in_flight, "1 to 1024");
  if (spec_.request_extents < 1 || spec_.request_extents > kMostInFlight)
    return refuse("request_extents", spec_.request_extents, "1 to 1024");
  if (spec_.process >= kProcesses) return refuse("process", spec_.process, "less than 2048");
  if (spec_.kind == WorkloadKind::burst && spec_.extent_bytes.size() != 1)
    return refuse("the number of extent sizes of a burst", spec_.extent_bytes.size(), "1");
  const uint64_t burst =
      spec_.kind == WorkloadKind::burst ? uint64_t{spec_.in_flight} * spec_.request_extents : 1;
  if (spec_.volume_bytes < one_each() * burst) {
    return fail(ErrorKind::invalid_argument,
                "volume_bytes is {}, expected at least the {} bytes of {} of each size", spec_.volume_bytes,
                one_each() * burst, burst == 1 ? "one extent" : "all extents of a burst");
  }
  return {};
}

Status OpenWorkload::open() {
  if (auto checked = check_spec(); !checked) return checked;
  random_.seed(spec_.process + 1);
  // Nobody else uses the root, so nothing is promised across processes; what is measured is the path, not the
  // wait.
  spec_.options.eviction_grace_ms = 0;
  auto depot = Depot::open(spec_.options);
  if (!depot) return std::unexpected(depot.error());
  depot_ = std::move(*depot);
  const std::string& root = spec_.options.roots[0].path;
  const auto system = file_system_of(root);
  if (!system) return std::unexpected(system.error());
  file_system_ = system->type;
  in_memory_ = system->memory;
  drops_cache_ =
      !in_memory_ && !spec_.keep_cache && depot_->stats().roots[0].transport.starts_with("buffered");
  const auto ns = depot_->register_namespace(R"({"model":"workload"})");
  if (!ns) return std::unexpected(ns.error());
  ns_ = *ns;
  tickets_.resize(spec_.in_flight);
  for (uint32_t i = 0; i < spec_.in_flight; ++i) unused_tickets_.push_back(i);
  if (auto made = make_cache(); !made) return made;
  return time_payload();
}

Status OpenWorkload::make_cache() {
  const auto classes = static_cast<uint32_t>(spec_.extent_bytes.size());
  const uint64_t wanted = std::min(kCacheMemory, spec_.volume_bytes) / classes;
  const uint32_t burst = spec_.kind == WorkloadKind::burst ? spec_.request_extents : 1;
  const uint32_t flight = (spec_.in_flight + classes - 1) / classes * burst;
  uint64_t total = 0;
  for (const uint64_t bytes : spec_.extent_bytes) {
    SizeClass& size = sizes_.emplace_back();
    size.bytes = bytes;
    size.memory_at = total;
    size.shape = shape_of_bytes(static_cast<uint16_t>(sizes_.size() - 1), bytes);
    const auto enough = [&](bool measured) {
      return static_cast<uint32_t>(measured ? std::max<uint64_t>(flight, wanted / bytes)
                                            : std::max<uint64_t>(2, (64 << 20) / bytes));
    };
    size.sources = enough(stores());
    size.slots = size.sources + enough(loads());
    size.loaded.resize(size.slots);
    for (uint32_t slot = 0; slot < size.slots; ++slot)
      (slot < size.sources ? size.free_sources : size.free_targets).push_back(slot);
    total += size.slots * bytes;
    recent_most_ += std::max<uint64_t>(1, spec_.volume_bytes / classes / bytes);
  }
  const auto device = parse_device(spec_.options.device);
  auto memory = device && device->cuda_ordinal ? make_cuda_memory(*device->cuda_ordinal, total)
                                               : make_host_memory(total);
  if (!memory) return std::unexpected(memory.error());
  memory_ = std::move(*memory);
  std::vector<std::byte> tile;
  for (const SizeClass& size : sizes_) {
    const uint64_t end = slot_at(size, size.sources);
    for (uint64_t at = size.memory_at; at < end; at += tile.size()) {
      tile.resize(std::min<uint64_t>(4 << 20, end - at));
      fill_tile(tile, spec_.process, at);
      if (auto written = memory_->write(at, tile); !written) return written;
    }
    if (auto s = depot_->attach(cache_of_slots(size.shape, memory_->data() + size.memory_at, size.slots)); !s)
      return s;
  }
  return {};
}

/// Under a serial that no store uses.
Status OpenWorkload::time_payload() {
  const double begin = steady_s();
  uint64_t bytes = 0;
  for (const SizeClass& size : sizes_) {
    for (uint32_t slot = 0; slot < size.sources; ++slot) {
      if (auto s = stamp(size, slot, {spec_.process, kNobody, slot_at(size, slot)}); !s) return s;
      bytes += size.bytes;
    }
  }
  std::byte last[8];
  if (auto s = memory_->read(0, last); !s) return s;  // on a GPU, behind all stamps
  payload_gb_per_s_ = static_cast<double>(bytes) * 1e-9 / (steady_s() - begin);
  return {};
}

Status OpenWorkload::stamp(const SizeClass& size, uint32_t slot, const PayloadId& id) {
  return memory_->stamp(slot_at(size, slot), size.bytes, id);
}

// --- jobs
// --------------------------------------------------------------------------------------------------------

Status OpenWorkload::submit_store(uint16_t index) {
  SizeClass& size = sizes_[index];
  const uint32_t slot = size.free_sources.front();
  const double began = steady_s();
  Extent extent{{}, {spec_.process, serial_++, slot_at(size, slot)}, index, false};
  extent.key = key_of(extent.payload);
  if (auto s = stamp(size, slot, extent.payload); !s) return s;
  if (auto s = depot_->mark_stream(memory_->stream()); !s) return s;
  StorePlan plan;
  plan.ns = ns_;
  StoreItem& item = plan.items.emplace_back(StoreItem{extent.key, 0, index, {}});
  const uint32_t blocks = size.shape.blocks();
  for (uint32_t b = 0; b < blocks; ++b) item.blocks.push_back(static_cast<int32_t>(slot * blocks + b));
  const uint32_t ticket = unused_tickets_.back();
  if (auto s = depot_->submit_store(jobs_++ << kTicketBits | ticket, std::move(plan)); !s) return s;
  size.free_sources.pop_front();
  unused_tickets_.pop_back();
  in_flight_.push_back(ticket);
  tickets_[ticket] = {true, index, began, {slot}, {}, extent};
  return {};
}

/// Extents of one size, each with a free target. One that has gone is lost and counts as a failure when its
/// ticket ends.
Status OpenWorkload::submit_load(std::span<const size_t> which) {
  SizeClass& size = sizes_[stored_[which.front()].size];
  const uint32_t ticket = unused_tickets_.back();
  tickets_[ticket] = {false, stored_[which.front()].size, steady_s(), {}, {which.begin(), which.end()}, {}};
  Ticket& made = tickets_[ticket];
  LoadPlan all;
  all.ns = ns_;
  const uint32_t blocks = size.shape.blocks();
  for (size_t i = 0; i < which.size(); ++i) {
    const uint32_t slot = size.free_targets.front();
    size.free_targets.pop_front();
    made.slots.push_back(slot);
    std::vector<int32_t> ids(blocks);
    std::iota(ids.begin(), ids.end(), static_cast<int32_t>(slot * blocks));
    const Extent& extent = stored_[which[i]];
    const GroupWant want{extent.size, size.shape.kind, size.shape.part, size.shape.tokens, 0};
    const Depot::LoadGroup group{want, 0, blocks, ids};
    auto plan = depot_->plan_load(ns_, std::span(&extent.key, 1), std::span(&group, 1), kDeadline);
    if (!plan) continue;
    all.deadline_ns = plan->deadline_ns;
    for (LoadItem& item : plan->items) {
      item.chunk = static_cast<uint32_t>(i);
      all.items.push_back(std::move(item));
    }
  }
  unused_tickets_.pop_back();
  in_flight_.push_back(ticket);
  return depot_->submit_load(jobs_++ << kTicketBits | ticket, std::move(all));
}

bool OpenWorkload::collect(WorkloadRun* run) {
  const auto ended = depot_->poll();
  for (const Completion& completion : ended) end_ticket(completion, run);
  if (ended.empty()) depot_->wait_ended(kPatience);
  return !ended.empty();
}

void OpenWorkload::end_ticket(const Completion& completion, WorkloadRun* run) {
  const double now = steady_s();
  const auto number = static_cast<uint32_t>(completion.job & ((1u << kTicketBits) - 1));
  Ticket& ticket = tickets_[number];
  SizeClass& size = sizes_[ticket.size];
  std::erase(in_flight_, number);
  unused_tickets_.push_back(number);
  const size_t extents = ticket.slots.size();
  std::vector<bool> ok(extents, completion.items_ok + completion.failures.size() == extents);
  std::string why = "absent";
  uint64_t dropped = 0;
  for (const ItemFailure& failure : completion.failures) {
    ok[failure.chunk] = false;
    if (ticket.write && failure.reason == ItemFailure::Reason::dropped) ++dropped;
    why = name(failure.reason);
  }
  full_ = full_ || dropped > 0;
  const auto good = static_cast<uint64_t>(std::ranges::count(ok, true));
  if (ticket.write) {
    size.free_sources.push_back(ticket.slots[0]);
    if (good > 0) {
      recently_stored_.push_back(ticket.storing);
      if (recently_stored_.size() > recent_most_) recently_stored_.pop_front();
    }
  } else {
    for (size_t i = 0; i < extents; ++i) {
      Extent& extent = stored_[ticket.stored[i]];
      size.free_targets.push_back(ticket.slots[i]);
      size.loaded[ticket.slots[i]] = ok[i] ? std::optional(extent) : std::nullopt;
      extent.lost = extent.lost || !ok[i];
    }
  }
  if (run == nullptr) return;
  run->extents += good;
  run->bytes += good * size.bytes;
  run->dropped += dropped;
  if (const uint64_t failed = extents - good - dropped; failed > 0) {
    if (run->failed == 0) run->failure = why;
    run->failed += failed;
  }
  if (good != extents) return;  // the time of a failure is no latency
  WorkloadClass& counted = run->classes[ticket.size + (ticket.write ? sizes_.size() : 0)];
  ++counted.count;
  counted.latency.add(static_cast<uint64_t>((now - ticket.began) * 1e9));
}

void OpenWorkload::finish_all() {
  while (!in_flight_.empty()) collect(nullptr);
}

// --- fill
// --------------------------------------------------------------------------------------------------------

Status OpenWorkload::fill(const Interrupted& interrupted) {
  if (stores()) {
    if (auto s = recycle(interrupted); !s) return s;
  }
  if (loads()) {
    if (auto s = store_volume(interrupted); !s) return s;
  }
  wait_for_registration(interrupted);
  return {};
}

/// `rounds` times one extent of each size.
Status OpenWorkload::store_and_wait(uint64_t rounds) {
  constexpr size_t kFlight = 8;
  for (uint64_t i = 0; i < rounds * sizes_.size(); ++i) {
    const auto index = static_cast<uint16_t>(i % sizes_.size());
    while (in_flight_.size() >= std::min(kFlight, tickets_.size()) || !can_store(index)) collect(nullptr);
    if (auto s = submit_store(index); !s) return s;
  }
  finish_all();
  return {};
}

Status OpenWorkload::recycle(const Interrupted& interrupted) {
  // Twice the capacity at most: it may be more than the file system lets a root have.
  const uint64_t most = 2 * spec_.options.roots[0].capacity_bytes / one_each();
  for (uint64_t done = 0; done < most && depot_->stats().roots[0].evicted_segments == 0; ++done) {
    if (interrupted()) return {};
    if (auto s = store_and_wait(1); !s) return s;
  }
  return {};
}

Status OpenWorkload::store_volume(const Interrupted& interrupted) {
  constexpr int kMostAttempts = 100;
  constexpr uint64_t kStep = 256ull << 20;  // between two looks at `interrupted`
  const uint64_t wanted = spec_.volume_bytes / one_each() * sizes_.size();
  recently_stored_.clear();
  recent_most_ = std::max<size_t>(recent_most_, wanted);
  for (int attempt = 0; recently_stored_.size() < wanted && !interrupted(); ++attempt) {
    const size_t before = recently_stored_.size();
    const uint64_t missing = (wanted - before + sizes_.size() - 1) / sizes_.size();
    if (auto s = store_and_wait(std::clamp<uint64_t>(kStep / one_each(), 1, missing)); !s) return s;
    if (recently_stored_.size() > before) {
      attempt = 0;
    } else if (attempt == kMostAttempts) {
      return fail(ErrorKind::no_space, "root \"{}\" takes no more stores after {} of {} extents",
                  spec_.options.roots[0].path, before, wanted);
    } else {
      ::usleep(20'000);  // a segment is being made ready
    }
  }
  stored_.assign(recently_stored_.begin(), recently_stored_.end());
  recently_stored_.clear();
  order_.clear();
  order_at_ = 0;
  return {};
}

/// A device registers mapped segments in the background, or registers no more; until then copies are slower.
void OpenWorkload::wait_for_registration(const Interrupted& interrupted) const {
  constexpr double kLongEnough = 3;  // without progress
  if (depot_->stats().device.name == "host" || depot_->stats().device.mapped_bytes == 0) return;
  double changed = steady_s();
  uint64_t registered = 0;
  while (!interrupted() && steady_s() - changed < kLongEnough) {
    const DeviceUse now = depot_->stats().device;
    if (now.registered_bytes >= now.mapped_bytes) return;
    if (now.registered_bytes != registered) changed = steady_s();
    registered = now.registered_bytes;
    ::usleep(10'000);
  }
}

// --- run
// ---------------------------------------------------------------------------------------------------------

Status OpenWorkload::start_pass() {
  order_.clear();
  for (size_t i = 0; i < stored_.size(); ++i) {
    if (!stored_[i].lost) order_.push_back(i);
  }
  if (loads() && order_.empty()) return fail(ErrorKind::not_found, "no stored extent is left to be loaded");
  std::ranges::shuffle(order_, random_);
  order_at_ = 0;
  if (!drops_cache_) return {};
  return drop_cached_pages(spec_.options.roots[0].path + "/segments");
}

Result<WorkloadRun> OpenWorkload::run(double seconds, const Interrupted& interrupted) {
  WorkloadRun run;
  const uint64_t request = spec_.kind == WorkloadKind::burst ? spec_.request_extents : 1;
  for (const bool write : {false, true}) {
    for (const SizeClass& size : sizes_) run.classes.push_back({write, size.bytes * request, 0, {}});
  }
  for (SizeClass& size : sizes_) std::ranges::fill(size.loaded, std::nullopt);
  do {
    // Where the last run ended within a pass, this one goes on: between two loads of an extent lie two passes
    // at most, and with them a bounded number of stores.
    if (spec_.kind == WorkloadKind::burst || order_at_ == order_.size()) {
      if (auto s = start_pass(); !s) return std::unexpected(s.error());
    }
    const auto s = spec_.kind == WorkloadKind::burst ? drive_burst(run, interrupted)
                                                     : drive(run, seconds - run.seconds, interrupted);
    if (!s) return std::unexpected(s.error());
    // Bursts of small extents are over in no time: the idleness before them counts as well.
  } while (run.seconds + kIdleSeconds * static_cast<double>(run.bursts.size()) < seconds && !interrupted());
  std::erase_if(run.classes, [](const WorkloadClass& counted) { return counted.count == 0; });
  return run;
}

/// Submits one job if a ticket and memory are free. False: nothing more to submit now.
Result<bool> OpenWorkload::submit_next(size_t& submitted) {
  if (unused_tickets_.empty()) return false;
  const size_t classes = sizes_.size();
  const bool write = spec_.kind == WorkloadKind::write ||
                     (spec_.kind == WorkloadKind::mixed && submitted / classes % 2 == 1);
  if (write) {
    const auto index = static_cast<uint16_t>(submitted % classes);
    if (!can_store(index)) return false;
    if (full_) ::usleep(1000);  // no use in asking again at once
    full_ = false;
    if (auto s = submit_store(index); !s) return std::unexpected(s.error());
  } else {
    while (order_at_ < order_.size() && stored_[order_[order_at_]].lost) ++order_at_;
    if (order_at_ == order_.size()) {
      if (drops_cache_) return false;  // the pass is over
      if (auto s = start_pass(); !s) return std::unexpected(s.error());
    }
    if (!can_load(order_[order_at_])) return false;
    if (auto s = submit_load(std::span(&order_[order_at_++], 1)); !s) return std::unexpected(s.error());
  }
  ++submitted;
  return true;
}

Status OpenWorkload::drive(WorkloadRun& run, double seconds, const Interrupted& interrupted) {
  const Stretch stretch(*depot_, run);
  size_t submitted = 0;
  double asked = 0;
  while (true) {
    const double now = stretch.seconds();
    bool going_on = now < seconds || submitted == 0;
    if (now - asked > 0.1) {
      asked = now;
      if (interrupted()) going_on = false;
    }
    if (!going_on) seconds = 0;
    while (going_on) {
      auto sent = submit_next(submitted);
      if (!sent) return std::unexpected(sent.error());
      going_on = *sent;
    }
    if (in_flight_.empty()) return {};
    collect(&run);
  }
}

Status OpenWorkload::drive_burst(WorkloadRun& run, const Interrupted& interrupted) {
  for (double idle = 0; idle < kIdleSeconds && !interrupted(); idle += 0.1) ::usleep(100'000);
  const size_t extents = size_t{spec_.in_flight} * spec_.request_extents;
  if (order_.size() < extents)
    return fail(ErrorKind::not_found, "{} stored extents are left, a burst loads {}", order_.size(), extents);
  const Stretch stretch(*depot_, run);
  double first = 0;
  for (uint32_t request = 0; request < spec_.in_flight; ++request) {
    const auto which =
        std::span(order_).subspan(size_t{request} * spec_.request_extents, spec_.request_extents);
    if (auto s = submit_load(which); !s) return s;
  }
  while (!in_flight_.empty()) {
    if (collect(&run) && first == 0) first = stretch.seconds();
  }
  run.bursts.emplace_back(first, stretch.seconds());
  return {};
}

Result<std::vector<WorkloadLimit>> OpenWorkload::limits(double seconds) {
  if (!limits_) {
    LimitsPlan plan;
    const std::string& root = spec_.options.roots[0].path;
    plan.directory = root.substr(0, root.rfind('/'));
    plan.in_memory = in_memory_;
    if (const auto device = parse_device(spec_.options.device)) plan.gpu = device->cuda_ordinal;
    plan.traffic = traffic_of(spec_.kind);
    plan.piece = std::ranges::max(spec_.extent_bytes);
    plan.pieces = std::max<size_t>(1, spec_.volume_bytes / plan.piece);
    plan.depth = spec_.in_flight;
    if (spec_.kind == WorkloadKind::burst)
      plan.burst_pieces = size_t{spec_.in_flight} * spec_.request_extents;
    auto made = Limits::make(plan);
    if (!made) return std::unexpected(made.error());
    limits_ = std::move(*made);
  }
  return limits_->measure(seconds);
}

// --- verify
// ------------------------------------------------------------------------------------------------------

void OpenWorkload::compare(const SizeClass& size, uint32_t slot, const Extent& extent, WorkloadCheck& check) {
  std::vector<std::byte> bytes(size.bytes);
  ++check.extents;
  check.bytes += size.bytes;
  std::string what;
  if (auto read = memory_->read(slot_at(size, slot), bytes); !read) {
    what = read.error().message;
  } else if (const auto at = first_difference(bytes, extent.payload)) {
    what = fmt::format("byte {} is not what was stored", *at);
  } else {
    return;
  }
  if (check.wrong++ == 0)
    check.first_wrong = fmt::format("extent {} of {} bytes: {}", extent.payload.serial, size.bytes, what);
}

Result<WorkloadCheck> OpenWorkload::verify(uint32_t every, const Interrupted& interrupted) {
  WorkloadCheck check;
  for (SizeClass& size : sizes_) {
    for (uint32_t slot = size.sources; slot < size.slots; ++slot) {
      if (size.loaded[slot]) compare(size, slot, *size.loaded[slot], check);
      size.loaded[slot].reset();
    }
  }
  const size_t volume = stored_.size();
  // What a run stored may have been evicted since; what it loads from may not.
  stored_.insert(stored_.end(), recently_stored_.begin(), recently_stored_.end());
  Status status;
  for (size_t i = 0; i < stored_.size() && status; i += every) {
    if (interrupted()) break;
    SizeClass& size = sizes_[stored_[i].size];
    const uint32_t slot = size.free_targets.front();
    uint8_t there = 1;
    const GroupWant want{stored_[i].size, size.shape.kind, size.shape.part, size.shape.tokens, 0};
    if (i >= volume) depot_->stored(std::span(&stored_[i].key, 1), want, std::span(&there, 1));
    if (there == 0) continue;
    status = stamp(size, slot, {spec_.process, kNobody, 0});
    if (status) status = depot_->mark_stream(memory_->stream());
    if (status) status = submit_load(std::span(&i, 1));
    finish_all();
    if (!status) break;
    if (size.loaded[slot]) {
      compare(size, slot, stored_[i], check);
      continue;
    }
    ++check.extents;
    if (check.wrong++ == 0)
      check.first_wrong =
          fmt::format("extent {} of {} bytes cannot be loaded", stored_[i].payload.serial, size.bytes);
  }
  stored_.resize(volume);
  order_at_ = order_.size();  // what was loaded here is cached: the next run begins a pass
  if (!status) return std::unexpected(status.error());
  return check;
}

}  // namespace tokendepot
