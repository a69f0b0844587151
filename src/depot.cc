// The façade: section by section the life of a prompt. Everything below is in the rooms that it names.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <set>

#include "base/clock.h"
#include "base/errors.h"
#include "base/log.h"
#include "device/device.h"
#include "device/gds/cufile.h"
#include "device/open_device.h"
#include "format/manifest.h"
#include "io/io_thread.h"
#include "open_depot.h"
#include "store/catalog.h"
#include "store/first_replay.h"
#include "store/keeper.h"
#include "store/replay.h"
#include "store/root.h"
#include "store/root_writer.h"
#include "store/scrub.h"
#include "tokendepot/depot.h"
#include "transfer/transfers.h"

namespace tokendepot {

namespace {

constexpr auto kThreadPatience = std::chrono::seconds(10);
constexpr uint64_t kNsPerMs = 1'000'000;

class OpenDepot final : public Depot {
 public:
  static Result<std::unique_ptr<Depot>> open(const Options& options, std::unique_ptr<Device> device,
                                             const std::string& cufile_library);
  ~OpenDepot() override;

  Result<NamespaceDigest> register_namespace(std::string_view manifest_json) override;
  size_t longest_prefix(std::span<const Key> keys, std::span<const GroupWant> wants) override;
  void stored(std::span<const Key> keys, const GroupWant& want, std::span<uint8_t> out) override;
  Result<LoadPlan> plan_load(const NamespaceDigest& ns, std::span<const Key> keys,
                             std::span<const LoadGroup> groups, std::chrono::nanoseconds deadline) override;
  void forget(const Key& key, uint16_t group) override;
  void condemn(std::span<const Key> keys, const GroupWant& want, std::span<uint8_t> out) override;
  Status attach(const PagedCache& cache) override;
  Status mark_stream(void* stream) override;
  void engine_step(bool begins) override {
    if (!forked()) transfers_->engine_step(begins);
  }
  Status submit_load(uint64_t job, LoadPlan plan) override;
  Status submit_hold(uint64_t job, LoadPlan plan) override;
  Status place(uint64_t job, uint64_t held_job, std::span<const HeldBlocks> blocks) override;
  void drop_held(uint64_t held_job) override;
  Status submit_store(uint64_t job, StorePlan plan) override;
  Status submit_store_objects(uint64_t job, std::span<const Object> objects) override;
  Status submit_load_objects(uint64_t job, std::span<const Object> objects,
                             std::chrono::nanoseconds deadline) override;
  bool wait_gathered(std::chrono::nanoseconds timeout) override;
  void cancel(uint64_t job) override;
  std::vector<Completion> poll() override;
  bool wait_ended(std::chrono::nanoseconds timeout) override;
  bool flush(std::chrono::nanoseconds timeout) override;
  void refresh() override;
  KeyHistory history(const Key& key) const override;
  DepotStats stats() const override;

 private:
  struct Tier {
    std::unique_ptr<Root> root;
    std::unique_ptr<Replay> replay;
    std::unique_ptr<RootWriter> writer;
  };

  /// Gives up all that threads may still use.
  void leak();
  /// Threads do not survive fork(): a child must not touch locks that one of them may have held.
  bool forked() const { return getpid() != pid_; }
  Status plan_chunk(LoadPlan& plan, const Key& key, uint32_t chunk, const GroupWant& want,
                    const std::vector<std::vector<PartId>>& covers, std::span<const int32_t> blocks);

  Status takes_objects() const;
  std::vector<Transfers::ObjectItem> find_objects(std::span<const Object> objects, bool touch);

  Status open_cufile(const Options& options, const std::string& library);
  /// With their replays and, in a depot that writes, the writers of those that can be written.
  Status open_roots(const Options& options);
  /// Whether it is asked for only where stores can pass through: at the first writer of several.
  Status check_write_through() const;
  /// Of a depot that writes they have been read: a writer must know its root. False: they are being read
  /// still.
  Result<bool> read_journals(const Options& options);

  const pid_t pid_ = getpid();
  std::unique_ptr<SegmentTable> segments_ = std::make_unique<SegmentTable>();
  std::unique_ptr<Catalog> catalog_;
  std::unique_ptr<Device> device_;  // before the roots: they give their mappings back to it
  std::unique_ptr<CuFile> cufile_;  // before the roots: their files are registered with it
  std::vector<Tier> tiers_;
  std::unique_ptr<FirstReplay> first_replay_;
  std::unique_ptr<Promotion> promotion_;
  std::unique_ptr<Rewriting> rewriting_;
  std::unique_ptr<Transfers> transfers_;
  std::unique_ptr<Keeper> keeper_;
  std::unique_ptr<Scrubber> scrubber_;
  std::atomic<uint64_t> lookups_ = 0;
  uint64_t open_ns_ = 0;
};

Status OpenDepot::open_cufile(const Options& options, const std::string& library) {
  for (const RootOptions& root : options.roots) {
    if (!root.require_gds || root.transport == TransportChoice::gds) continue;
    return fail(ErrorKind::invalid_argument, "root \"{}\": require_gds=true is for transport=gds only",
                root.path);
  }
  if (device_->stats().name == "host")
    return {};  // the paged cache is host memory: there is nothing to spare
  const auto some = [&options](auto what) { return std::ranges::any_of(options.roots, what); };
  const bool asked = some([](const RootOptions& root) { return root.transport == TransportChoice::gds; });
  const bool automatic = CuFile::host_has_driver() && some([](const RootOptions& root) {
                           return root.transport == TransportChoice::automatic;
                         });
  if (!asked && !automatic) return {};
  auto opened = CuFile::open(*device_, asked ? CuFile::Compat::allowed : CuFile::Compat::forbidden, library);
  if (opened) {
    cufile_ = std::move(*opened);
    return {};
  }
  for (const RootOptions& root : options.roots) {
    if (!root.require_gds) continue;
    return fail(ErrorKind::unsupported, "root \"{}\": require_gds=true, but {}", root.path,
                opened.error().message);
  }
  log(asked ? LogLevel::warning : LogLevel::info, "no GPUDirect Storage, going on without: {}",
      opened.error().message);
  return {};
}

Result<bool> OpenDepot::read_journals(const Options& options) {
  if (options.writer) {
    if (catalog_) catalog_->sweep();
    return true;
  }
  std::vector<Replay*> replays;
  for (const Tier& tier : tiers_) replays.push_back(tier.replay.get());
  first_replay_ = std::make_unique<FirstReplay>(std::move(replays), catalog_.get(), system_clock());
  return first_replay_->wait(std::chrono::milliseconds(options.open_wait_ms));
}

Status OpenDepot::open_roots(const Options& options) {
  for (const RootOptions& wanted : options.roots) {
    Tier& tier = tiers_.emplace_back();
    auto root =
        Root::open(wanted, static_cast<RootIndex>(tiers_.size() - 1), options, device_.get(), cufile_.get());
    if (!root) return std::unexpected(root.error());
    tier.root = std::move(*root);
    tier.replay = std::make_unique<Replay>(*tier.root, *segments_, catalog_.get());
    if (!options.writer) continue;
    if (auto read = tier.replay->first(); !read) return std::unexpected(read.error());
    if (!tier.root->writable()) continue;
    auto writer = RootWriter::open(*tier.root, *tier.replay, *segments_, system_clock(),
                                   options.free_space_reserve, options.eviction_grace_ms * kNsPerMs);
    if (!writer) return std::unexpected(writer.error());
    tier.writer = std::move(*writer);
  }
  return {};
}

Status OpenDepot::check_write_through() const {
  const auto writes = [](const Tier& tier) { return tier.writer != nullptr; };
  const auto first = std::ranges::find_if(tiers_, writes);
  for (const Tier& tier : tiers_) {
    if (!tier.root->write_through()) continue;
    const bool first_of_several = first != tiers_.end() && tier.root == first->root &&
                                  std::find_if(first + 1, tiers_.end(), writes) != tiers_.end();
    if (first_of_several) continue;
    return fail(
        ErrorKind::invalid_argument,
        "root \"{}\": write_through=true wants the first root that can be written, and another one that "
        "can be written after it",
        tier.root->path());
  }
  return {};
}

Result<std::unique_ptr<Depot>> OpenDepot::open(const Options& options, std::unique_ptr<Device> device,
                                               const std::string& cufile_library) {
  if (auto checked = check_ranges(options); !checked) return std::unexpected(checked.error());
  const uint64_t began = system_clock().steady_ns();
  auto depot = std::make_unique<OpenDepot>();
  if (!device) {
    auto opened =
        open_device({options.device, options.device_threads, options.slab_bytes, options.device_slab_bytes});
    if (!opened) return std::unexpected(opened.error());
    device = std::move(*opened);
  }
  depot->device_ = std::move(device);
  if (auto cufile = depot->open_cufile(options, cufile_library); !cufile)
    return std::unexpected(cufile.error());
  if (options.catalog) depot->catalog_ = std::make_unique<Catalog>(*depot->segments_);
  if (auto opened = depot->open_roots(options); !opened) return std::unexpected(opened.error());
  if (options.writer) {
    if (auto checked = depot->check_write_through(); !checked) return std::unexpected(checked.error());
  }
  if (std::ranges::none_of(depot->tiers_, [](const Tier& tier) { return tier.root->has_gds(); }))
    depot->cufile_.reset();  // nobody wants it: the device has its whole slab again
  const auto whole = depot->read_journals(options);
  if (!whole) return std::unexpected(whole.error());
  std::vector<Transfers::Tier> transfer_tiers;
  std::vector<Keeper::Tier> keeper_tiers;
  for (const Tier& tier : depot->tiers_) {
    transfer_tiers.push_back({tier.root.get(), tier.writer.get()});
    keeper_tiers.push_back({tier.root.get(), tier.replay.get(), tier.writer.get()});
  }
  depot->promotion_ = std::make_unique<Promotion>(keeper_tiers, *depot->segments_, system_clock());
  depot->rewriting_ = std::make_unique<Rewriting>(options.rewrite_percent, depot->promotion_->use(),
                                                  *depot->segments_, system_clock());
  depot->transfers_ =
      std::make_unique<Transfers>(*depot->device_, transfer_tiers, *depot->segments_, system_clock(),
                                  options.store_queue_bytes, depot->promotion_.get());
  depot->keeper_ = std::make_unique<Keeper>(
      keeper_tiers, *depot->segments_, depot->catalog_.get(), *depot->promotion_, *depot->rewriting_,
      options.poll_ms, [transfers = depot->transfers_.get()] { transfers->space_ready(); });
  std::vector<RootWriter*> writers;
  for (const Tier& tier : depot->tiers_) {
    if (tier.writer) writers.push_back(tier.writer.get());
  }
  depot->scrubber_ =
      std::make_unique<Scrubber>(writers, *depot->segments_, system_clock(), options.scrub_bytes_per_second);
  if (!depot->transfers_->running() || !depot->keeper_->running() || !depot->scrubber_->running()) {
    return thread_refused("the depot's background threads");
  }
  depot->open_ns_ = system_clock().steady_ns() - began;
  const DepotStats found = depot->stats();
  uint64_t segments = 0;
  for (const RootStats& root : found.roots) segments += root.segments;
  log(LogLevel::info,
      "ready after {:.3f} s: {}{} segments, {} journal records read, {} depot threads in this process{}",
      static_cast<double>(found.open_nanoseconds) * 1e-9,
      options.catalog ? fmt::format("{} extents in ", found.entries) : "", segments, found.journal_records,
      io_threads_running(), *whole ? "" : "; the rest is being read, until then it is missed");
  return depot;
}

OpenDepot::~OpenDepot() {
  if (forked()) {
    leak();  // the parent's threads are not here to be joined, and its files are not ours to unlock
    return;
  }
  // The keeper's callback and the transfers' wake-ups point at each other: work ends first, then the threads.
  const bool settled = !transfers_ || transfers_->close();
  // One patience for both: what hangs is a file system, and they wait for the same one.
  const auto until = std::chrono::steady_clock::now() + kThreadPatience;
  const auto left = [&]() -> std::chrono::nanoseconds {
    if (!settled) return std::chrono::nanoseconds(0);
    return until - std::chrono::steady_clock::now();
  };
  const bool read = !first_replay_ || first_replay_->stop(left());
  const bool scrubbed = !scrubber_ || scrubber_->stop(left());
  const bool ended = !keeper_ || keeper_->stop(left());
  if (settled && read && scrubbed && ended) {
    scrubber_.reset();
    keeper_.reset();
    transfers_.reset();
    return;
  }
  log(LogLevel::error,
      "closed while a file system does not answer: threads that wait for it and their memory are left "
      "behind");
  leak();
}

void OpenDepot::leak() {
  first_replay_.release();  // NOLINT(bugprone-unused-return-value)
  scrubber_.release();      // NOLINT(bugprone-unused-return-value)
  keeper_.release();        // NOLINT(bugprone-unused-return-value)
  transfers_.release();     // NOLINT(bugprone-unused-return-value)
  rewriting_.release();     // NOLINT(bugprone-unused-return-value)
  promotion_.release();     // NOLINT(bugprone-unused-return-value)
  device_.release();        // NOLINT(bugprone-unused-return-value)
  cufile_.release();        // NOLINT(bugprone-unused-return-value)
  for (Tier& tier : tiers_) {
    tier.writer.release();  // NOLINT(bugprone-unused-return-value)
    tier.replay.release();  // NOLINT(bugprone-unused-return-value)
    tier.root.release();    // NOLINT(bugprone-unused-return-value)
  }
  catalog_.release();   // NOLINT(bugprone-unused-return-value)
  segments_.release();  // NOLINT(bugprone-unused-return-value)
}

// --- arrive
// ------------------------------------------------------------------------------------------------------

Result<NamespaceDigest> OpenDepot::register_namespace(std::string_view manifest_json) {
  if (forked())
    return fail(ErrorKind::closed, "this depot was opened before fork(); open it again in the child");
  const auto manifest = make_manifest(manifest_json);
  if (!manifest) return std::unexpected(manifest.error());
  for (const Tier& tier : tiers_) {
    if (!tier.root->writable()) continue;
    if (auto kept = tier.root->keep_manifest(*manifest); !kept) return std::unexpected(kept.error());
  }
  return manifest->digest;
}

// --- look up
// -----------------------------------------------------------------------------------------------------

size_t OpenDepot::longest_prefix(std::span<const Key> keys, std::span<const GroupWant> wants) {
  if (forked() || !catalog_) return 0;
  lookups_.fetch_add(1, std::memory_order_relaxed);
  return catalog_->longest_prefix(keys, wants);
}

void OpenDepot::stored(std::span<const Key> keys, const GroupWant& want, std::span<uint8_t> out) {
  if (forked() || !catalog_) {
    std::ranges::fill(out, uint8_t{0});
    return;
  }
  catalog_->presence(keys, want, out, false);
}

void OpenDepot::forget(const Key& key, uint16_t group) {
  if (!forked() && catalog_) catalog_->forget(key, group);
}

void OpenDepot::condemn(std::span<const Key> keys, const GroupWant& want, std::span<uint8_t> out) {
  TD_CHECK(out.size() == keys.size());
  std::ranges::fill(out, uint8_t{0});
  if (forked() || !catalog_) return;
  std::set<PartId> parts;
  for (const auto& cover : catalog_->covers(want)) parts.insert(cover.begin(), cover.end());
  for (size_t i = 0; i < keys.size(); ++i) {
    for (const PartId part : parts) {
      const auto found = catalog_->find(keys[i], part);
      if (!found) continue;
      out[i] = 1;
      const PartShape shape = catalog_->shape_of(part);
      Record record;
      record.kind = shape.kind;
      record.group = shape.group;
      record.key = keys[i];
      record.where = {segments_->id_of(found->slot), found->offset, found->bytes};
      record.part = shape.part;
      record.tokens = shape.tokens;
      const uint32_t roots = segments_->present_in(found->slot);
      for (const Tier& tier : tiers_) {
        if (tier.writer && (roots >> tier.root->index() & 1u) != 0) tier.writer->condemn_extent(record);
      }
    }
    if (out[i] != 0) catalog_->forget(keys[i], want.group);
  }
}

// --- promise
// -----------------------------------------------------------------------------------------------------

Status OpenDepot::plan_chunk(LoadPlan& plan, const Key& key, uint32_t chunk, const GroupWant& want,
                             const std::vector<std::vector<PartId>>& covers,
                             std::span<const int32_t> blocks) {
  for (const auto& cover : covers) {
    std::vector<LoadItem> items;
    for (const PartId id : cover) {
      const auto found = catalog_->find(key, id);
      if (!found) break;
      segments_->touch(found->slot, system_clock().wall_ns());
      items.push_back({key,
                       chunk,
                       want.group,
                       want.kind,
                       catalog_->shape_of(id).part,
                       want.tokens,
                       {segments_->id_of(found->slot), found->offset, found->bytes},
                       std::vector<int32_t>(blocks.begin(), blocks.end())});
    }
    if (items.size() != cover.size()) continue;
    std::ranges::move(items, std::back_inserter(plan.items));
    return {};
  }
  return fail(ErrorKind::not_found, "chunk {} of group {} has gone since the lookup", chunk, want.group);
}

Result<LoadPlan> OpenDepot::plan_load(const NamespaceDigest& ns, std::span<const Key> keys,
                                      std::span<const LoadGroup> groups, std::chrono::nanoseconds deadline) {
  if (forked())
    return fail(ErrorKind::closed, "this depot was opened before fork(); open it again in the child");
  if (!catalog_)
    return fail(ErrorKind::invalid_argument, "catalog=false: this depot was opened without lookups");
  LoadPlan plan;
  plan.ns = ns;
  plan.deadline_ns = deadline.count() > 0 ? static_cast<uint64_t>(deadline.count()) : 0;
  for (const LoadGroup& group : groups) {
    if (group.blocks_per_chunk == 0 || group.blocks.size() % group.blocks_per_chunk != 0) {
      return fail(ErrorKind::invalid_argument, "group {}: {} blocks do not divide into chunks of {}",
                  group.want.group, group.blocks.size(), group.blocks_per_chunk);
    }
    const size_t chunks = group.blocks.size() / group.blocks_per_chunk;
    if (group.first_chunk + chunks > keys.size()) {
      return fail(ErrorKind::invalid_argument, "group {}: chunks [{}, {}) but {} keys", group.want.group,
                  group.first_chunk, group.first_chunk + chunks, keys.size());
    }
    const auto covers = catalog_->covers(group.want);
    for (size_t i = 0; i < chunks; ++i) {
      const auto blocks = group.blocks.subspan(i * group.blocks_per_chunk, group.blocks_per_chunk);
      if (std::ranges::all_of(blocks, [](int32_t block) { return block == kSkipBlock; })) continue;
      const auto chunk = static_cast<uint32_t>(group.first_chunk + i);
      if (auto planned = plan_chunk(plan, keys[chunk], chunk, group.want, covers, blocks); !planned) {
        return std::unexpected(planned.error());
      }
    }
  }
  return plan;
}

// --- load, store
// -------------------------------------------------------------------------------------------------

Status OpenDepot::attach(const PagedCache& cache) {
  if (forked())
    return fail(ErrorKind::closed, "this depot was opened before fork(); open it again in the child");
  if (auto attached = transfers_->attach(cache); !attached) return attached;
  keeper_->wake();  // the next segment may have to be larger now
  return {};
}

Status OpenDepot::mark_stream(void* stream) {
  if (forked())
    return fail(ErrorKind::closed, "this depot was opened before fork(); open it again in the child");
  return transfers_->mark_stream(stream);
}

Status OpenDepot::submit_load(uint64_t job, LoadPlan plan) {
  if (forked())
    return fail(ErrorKind::closed, "this depot was opened before fork(); open it again in the child");
  return transfers_->submit_load(job, std::move(plan));
}

Status OpenDepot::submit_hold(uint64_t job, LoadPlan plan) {
  if (forked())
    return fail(ErrorKind::closed, "this depot was opened before fork(); open it again in the child");
  return transfers_->submit_load(job, std::move(plan), true);
}

Status OpenDepot::place(uint64_t job, uint64_t held_job, std::span<const HeldBlocks> blocks) {
  if (forked())
    return fail(ErrorKind::closed, "this depot was opened before fork(); open it again in the child");
  return transfers_->place(job, held_job, blocks);
}

void OpenDepot::drop_held(uint64_t held_job) {
  if (!forked()) transfers_->drop_held(held_job);
}

Status OpenDepot::submit_store(uint64_t job, StorePlan plan) {
  if (forked())
    return fail(ErrorKind::closed, "this depot was opened before fork(); open it again in the child");
  return transfers_->submit_store(job, std::move(plan), *keeper_);
}

std::vector<Transfers::ObjectItem> OpenDepot::find_objects(std::span<const Object> objects, bool touch) {
  std::vector<Transfers::ObjectItem> items;
  items.reserve(objects.size());
  const auto covers = catalog_->covers(object_want());
  for (const Object& object : objects) {
    Transfers::ObjectItem& item = items.emplace_back(object, ExtentRef{});
    for (const auto& cover : covers) {
      const auto found = catalog_->find(object.key, cover.front());
      if (!found) continue;
      if (touch) segments_->touch(found->slot, system_clock().wall_ns());
      item.where = {segments_->id_of(found->slot), found->offset, found->bytes};
      break;
    }
  }
  return items;
}

// A device with a memory of its own knows caches by their addresses, and that of an object ends with its
// task.
Status OpenDepot::takes_objects() const {
  if (forked())
    return fail(ErrorKind::closed, "this depot was opened before fork(); open it again in the child");
  if (!catalog_)
    return fail(ErrorKind::invalid_argument, "catalog=false: this depot was opened without lookups");
  if (!device_->on_host()) {
    return fail(ErrorKind::unsupported, "device={}: objects are in host memory; expected device=host",
                device_->stats().name);
  }
  return {};
}

Status OpenDepot::submit_store_objects(uint64_t job, std::span<const Object> objects) {
  if (auto takes = takes_objects(); !takes) return takes;
  return transfers_->submit_store_objects(job, find_objects(objects, false), *keeper_);
}

Status OpenDepot::submit_load_objects(uint64_t job, std::span<const Object> objects,
                                      std::chrono::nanoseconds deadline) {
  if (auto takes = takes_objects(); !takes) return takes;
  return transfers_->submit_load_objects(job, find_objects(objects, true),
                                         static_cast<uint64_t>(std::max<int64_t>(0, deadline.count())));
}

bool OpenDepot::wait_gathered(std::chrono::nanoseconds timeout) {
  return forked() || transfers_->wait_gathered(static_cast<uint64_t>(std::max<int64_t>(0, timeout.count())));
}

void OpenDepot::cancel(uint64_t job) {
  if (!forked()) transfers_->cancel(job);
}

bool OpenDepot::wait_ended(std::chrono::nanoseconds timeout) {
  return !forked() && transfers_->wait_ended(static_cast<uint64_t>(std::max<int64_t>(0, timeout.count())));
}

std::vector<Completion> OpenDepot::poll() {
  return forked() ? std::vector<Completion>() : transfers_->poll();
}

bool OpenDepot::flush(std::chrono::nanoseconds timeout) {
  return forked() || transfers_->flush(static_cast<uint64_t>(std::max<int64_t>(0, timeout.count())));
}

// --- keep
// --------------------------------------------------------------------------------------------------------

void OpenDepot::refresh() {
  if (!forked()) keeper_->poll_journals();
}

KeyHistory OpenDepot::history(const Key& key) const {
  return forked() || !catalog_ ? KeyHistory::never : catalog_->history(key);
}

DepotStats OpenDepot::stats() const {
  DepotStats stats;
  if (forked()) return stats;
  if (catalog_) {
    stats.entries = catalog_->entries();
    stats.catalog_bytes = catalog_->memory_bytes();
  }
  stats.lookups = lookups_;
  stats.open_nanoseconds = open_ns_;
  stats.device = device_->stats();
  for (const Tier& tier : tiers_) {
    stats.journal_records += tier.replay->records();
    stats.bad_records += tier.replay->bad_records();
    RootStats& root = stats.roots.emplace_back();
    root.path = tier.root->path();
    root.id = tier.root->id();
    root.transport = tier.root->transport();
    root.reason = tier.root->reason();
    root.read_bytes_per_second = tier.root->read_bytes_per_second();
    root.capacity_bytes = tier.root->capacity();
    root.writable = tier.root->writable();
    stats.device.mapped_bytes += tier.root->files().mapped_bytes();
    // Files go round while they are counted: ready, filled, leaving, ready. In this order, with the one that
    // was ready not counted again, and with those that leave being the ones that two looks find, one that
    // moves on is rather missed than counted twice.
    const auto leaving = tier.writer ? tier.writer->leaving_files() : std::map<SegmentId, uint64_t>();
    const RootWriter::Spare spare = tier.writer ? tier.writer->spare() : RootWriter::Spare();
    root.used_bytes += spare.bytes;
    for (const auto& [slot, segment] : segments_->present_segments(tier.root->index())) {
      if (spare.bytes == 0 || segment.id != spare.id)
        root.used_bytes += segment.roots[tier.root->index()].file_bytes;
      ++root.segments;
    }
    if (tier.writer) {
      root.evicted_segments = tier.writer->evicted_segments();
      root.written_bytes = tier.writer->written_bytes();
      root.suspended = tier.writer->failing();
      for (const auto& [id, bytes] : tier.writer->leaving_files())
        if (leaving.contains(id)) root.leaving_bytes += bytes;
      root.used_bytes += root.leaving_bytes;
      if (tier.writer.get() == keeper_->store_target()) {
        root.promoted_extents = promotion_->extents();
        root.promoted_bytes = promotion_->bytes();
        root.rewritten_extents = rewriting_->extents();
        root.rewritten_bytes = rewriting_->bytes();
        root.written_bytes += root.promoted_bytes + root.rewritten_bytes;
      }
    }
    root.evicted_bytes = tier.replay->evicted();
    root.pinned_bytes = tier.replay->policies().pinned_bytes();
    root.damaged_policies = tier.replay->policies().damaged();
    root.gds_errors = tier.root->gds_errors();
    root.mended_manifests = tier.root->mended_manifests();
    const Keeper::Lag lag = keeper_->demotion_lag(tier.root->index());
    root.demotion_lag_bytes = lag.bytes;
    if (const uint64_t now = system_clock().wall_ns(); lag.since_ns > 0 && lag.since_ns < now)
      root.demotion_lag_ns = now - lag.since_ns;
    root.demoted_segments = keeper_->demoted(tier.root->index());
    root.journal_lag = tier.replay->lag();
    const Scrubber::Progress scrub = scrubber_->progress(tier.root->index());
    root.scrubbed_bytes = scrub.scrubbed_bytes;
    root.scrub_errors = scrub.errors;
    root.scrub_pass_bytes = scrub.pass_bytes;
    root.scrub_finished_ns = scrub.finished_ns;
  }
  transfers_->add_to(stats);
  return stats;
}

}  // namespace

Result<std::unique_ptr<Depot>> Depot::open(const Options& options) {
  return OpenDepot::open(options, nullptr, CuFile::kLibrary);
}

Result<std::unique_ptr<Depot>> open_depot_on(std::unique_ptr<Device> device, const Options& options,
                                             const std::string& cufile_library) {
  return OpenDepot::open(options, std::move(device), cufile_library);
}

}  // namespace tokendepot
