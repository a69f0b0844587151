// The steps of a load: find the place, read, check who it is, verify and scatter, report.
#include <algorithm>
#include <cstring>

#include "base/errors.h"
#include "format/digest.h"
#include "format/shape.h"
#include "io/mapping.h"
#include "transfer/tasks.h"
#include "transfer/transfers.h"

namespace tokendepot {
namespace {

constexpr uint64_t kTouchIntervalNs = 60ull * 1000 * 1000 * 1000;

/// Whether a plan's item can be read into this cache at all.
bool suits(const LoadItem& item, const PagedCache& cache) {
  const GroupShape& shape = cache.shape;
  if (item.kind != shape.kind || item.tokens != shape.tokens) return false;
  if (item.kind == LayoutKind::opaque &&
      (item.part.head_begin != shape.part.head_begin || item.part.head_end != shape.part.head_end)) {
    return false;
  }
  if (item.blocks.size() != shape.blocks()) return false;
  return std::ranges::all_of(item.blocks, [&](int32_t block) {
    return block == kSkipBlock || (block >= 0 && static_cast<uint32_t>(block) < cache.block_count);
  });
}

Record record_of(const LoadItem& item) {
  Record record;
  record.kind = item.kind;
  record.group = item.group;
  record.key = item.key;
  record.where = item.where;
  record.part = item.part;
  record.tokens = item.tokens;
  return record;
}

GroupShape shape_of_extent(const LoadItem& item, const PagedCache& cache) {
  GroupShape shape = cache.shape;
  shape.part = item.part;
  return shape;
}

}  // namespace

Status Transfers::submit_load(uint64_t id, LoadPlan plan, bool hold) {
  std::unique_lock lock(mutex_);
  const auto begun = begin_job_locked(id, JobKind::load, plan.deadline_ns);
  if (!begun) return std::unexpected(begun.error());
  for (uint32_t i = 0; i < plan.items.size(); ++i) {
    LoadItem& item = plan.items[i];
    const auto cache = caches_.find(item.group);
    if (cache == caches_.end() || !item.part.intersects(cache->second->shape.part))
      continue;  // another rank's
    queue_load_locked(**begun, i, std::move(item), plan.ns, *cache->second, hold);
  }
  end_job_locked(id);
  wake_dispatchers_locked();
  return {};
}

void Transfers::queue_load_locked(Job& job, uint32_t index, LoadItem item, const NamespaceDigest& ns,
                                  const PagedCache& cache, bool hold, std::unique_ptr<PagedCache> own) {
  ++job.unresolved;
  if (!suits(item, cache) || !check_shape(shape_of_extent(item, cache))) {
    resolve_locked(job, index, item.chunk, item.group, Reason::mismatch, 0);
    return;
  }
  // A hold verifies everything and writes nothing.
  if (hold) std::ranges::fill(item.blocks, kSkipBlock);
  if (!hold && std::ranges::all_of(item.blocks, [](int32_t block) { return block == kSkipBlock; })) {
    resolve_locked(job, index, item.chunk, item.group, std::nullopt, 0);
    return;
  }
  auto owned = std::make_unique<LoadTask>();
  LoadTask& task = *owned;
  load_tasks_.emplace(&task, std::move(owned));
  task.transfers = this;
  task.job = job.completion.job;
  task.hold = hold;
  task.item_index = index;
  task.ns = ns;
  task.cache = &cache;
  task.own_cache = std::move(own);
  task.submitted_ns = job.submitted_ns;
  task.deadline_ns = job.deadline_ns;
  task.mark = hold ? 0 : mark_;
  const GroupShape extent = shape_of_extent(item, cache);
  const Part& mine = cache.shape.part;
  if (item.kind == LayoutKind::canonical) {
    const uint16_t begin = std::max(mine.head_begin, item.part.head_begin);
    task.first_shard = begin - item.part.head_begin;
    task.shards = std::min(mine.head_end, item.part.head_end) - begin;
  } else {
    const uint16_t begin = std::max(mine.layer_begin, item.part.layer_begin);
    task.first_shard = begin - item.part.layer_begin;
    task.shards = std::min(mine.layer_end, item.part.layer_end) - begin;
  }
  task.header_bytes = extent_header_bytes(extent.shards());
  task.run_offset = task.first_shard * extent.shard_stride();
  task.run_bytes = task.shards * extent.shard_stride();
  task.item = std::move(item);
  std::optional<Reason> refused;
  if (task.item.where.bytes != task.header_bytes + extent.payload_bytes()) refused = Reason::mismatch;
  // Written by a rank with more layers than ours; it would wait for a slab that is never large enough.
  if ((staged_ || hold) && task.header_bytes + task.run_bytes > device_.slab().size())
    refused = Reason::dropped;
  if (refused) {
    resolve_locked(job, index, task.item.chunk, task.item.group, refused, 0);
    load_tasks_.erase(&task);
    return;
  }
  job.loads.push_back(&task);
  queue_at_locked(task, std::min(find_tier(task, 0), tiers_.size() - 1));
  sources_[task.tier]->first = true;
}

void Transfers::queue_at_locked(LoadTask& task, size_t tier) {
  Source& source = *sources_[tier];
  task.tier = tier;
  task.state = LoadTask::State::queued;
  source.queued.emplace(task.deadline_ns, &task);
}

void Transfers::move_on_locked(LoadTask& task, size_t tier) {
  --sources_[task.tier]->in_motion;
  queue_at_locked(task, tier);
  wake_dispatchers_locked();
}

void Transfers::leave_motion_locked(const LoadTask& task) {
  --sources_[task.tier]->in_motion;
  wake_dispatchers_locked();
}

size_t Transfers::find_tier(const LoadTask& task, size_t tier) const {
  const auto known = segments_.find(task.item.where.segment);
  // A segment that this process has not heard of yet may be anywhere: the plan's maker has seen it.
  uint32_t mask = known ? segments_.present_in(*known) : 0;
  if (known && task.evicted_too) mask = condemned_in(*known);
  while (mask != 0 && tier < tiers_.size() && (mask >> tiers_[tier].root->index() & 1u) == 0) ++tier;
  return tier;
}

bool Transfers::start_load(LoadTask& task) {
  task.page_digests.clear();  // of an attempt at another root
  size_t tier = find_tier(task, task.tier);
  if (tier == task.tier && !open_place(task)) tier = find_tier(task, tier + 1);
  if (tier == tiers_.size()) {
    condemn_missing(task);
    fail_load(task, task.open_failed ? Reason::io_error : Reason::absent, false);
    return true;
  }
  if (tier != task.tier) {
    std::lock_guard lock(mutex_);
    if (task.resolved) {
      leave_motion_locked(task);
      retire(task);
    } else {
      move_on_locked(task, tier);
    }
    return true;
  }
  const bool mapped = tiers_[task.tier].root->mapped();
  task.lane = mapped ? nullptr : lane_of(task);
  if (mapped && !task.hold) {
    read_mapped(task);
    return true;
  }
  if (task.lane != nullptr) return read_with_gds(task);
  Source& source = *sources_[task.tier];
  const uint64_t staged = task.header_bytes + task.run_bytes;
  if (task.hold || source.staged_bytes == 0 || source.staged_bytes + staged <= source.most_staged_bytes)
    task.staging = device_.slab().allocate(staged);
  if (task.staging == nullptr) {
    let_go(task);
    if (!task.hold) return false;
    fail_load(task, Reason::dropped, false);  // waiting for what others hold might never end
    return true;
  }
  task.staged_bytes = staged;
  source.staged_bytes += staged;
  if (mapped) {
    copy_mapped(task);
  } else {
    read_staged(task);
  }
  return true;
}

uint32_t Transfers::condemned_in(uint32_t slot) const {
  uint32_t mask = 0;
  for (const Tier& tier : tiers_)
    mask |= uint32_t{segments_.condemned(slot, tier.root->index())} << tier.root->index();
  return mask;
}

bool Transfers::open_place(LoadTask& task) {
  const ExtentRef& where = task.item.where;
  Root& root = *tiers_[task.tier].root;
  auto segment = root.files().open(where.segment);
  const bool there = segment && where.bytes <= (*segment)->bytes &&
                     where.offset <= (*segment)->bytes - where.bytes && where.offset % kPageBytes == 0;
  if (!there) {
    // Its size may be that of a moment ago: whoever asks next opens it again.
    if (segment) root.files().drop(where.segment);
    const auto known = segments_.find(where.segment);
    const uint32_t should_be_in = known ? segments_.present_in(*known) : 0;
    if (segment || segment.error().kind == ErrorKind::not_found)
      task.missing_in |= should_be_in & (1u << root.index());
    if (!segment && segment.error().kind == ErrorKind::io) {
      task.open_failed = true;
      note_failure(task.job, fmt::format("chunk {} of group {}: {}", task.item.chunk, task.item.group,
                                         segment.error().message));
    }
    return false;
  }
  task.segment = std::move(*segment);
  task.direct = task.segment->direct;
  task.slot = segments_.slot_of(where.segment);
  segments_.acquire(task.slot);
  task.slot_held = true;
  return true;
}

void Transfers::read_mapped(LoadTask& task) {
  const std::span<const std::byte> extent(task.segment->mapping.data() + task.item.where.offset,
                                          task.item.where.bytes);
  std::vector<std::byte> copy(task.header_bytes);
  auto copy_header = [&copy, extent] { std::memcpy(copy.data(), extent.data(), copy.size()); };
  if (!guard_mapping(extent, copy_header)) return fail_load(task, Reason::absent, true);
  if (!check_header(task, copy)) return;
  start_scatter(task, extent.subspan(task.header_bytes + task.run_offset, task.run_bytes), true);
}

void Transfers::copy_mapped(LoadTask& task) {
  const std::span<const std::byte> extent(task.segment->mapping.data() + task.item.where.offset,
                                          task.item.where.bytes);
  auto copy = [&task, extent] {
    std::memcpy(task.staging, extent.data(), task.header_bytes);
    std::memcpy(task.staging + task.header_bytes, extent.data() + task.header_bytes + task.run_offset,
                task.run_bytes);
  };
  if (!guard_mapping(extent, copy)) return fail_load(task, Reason::absent, true);
  if (!check_header(task, {task.staging, task.header_bytes})) return;
  start_scatter(task, {task.staging + task.header_bytes, task.run_bytes}, false);
}

void Transfers::read_staged(LoadTask& task) {
  IoOperation pattern;
  pattern.fd = task.segment->file.fd();
  pattern.owner = &task;
  pattern.done = [](IoOperation* self, int error) {
    auto* load = static_cast<LoadTask*>(self->owner);
    load->transfers->read_ended(*load->transfers->sources_[load->tier], self->bytes);
    if (error != 0) {
      load->io_error.store(error, std::memory_order_relaxed);
    } else {
      load->transfers->piece_read(*load, *self);
    }
    if (load->pieces_left.fetch_sub(1, std::memory_order_acq_rel) == 1) load->transfers->pieces_read(*load);
  };
  task.pieces.clear();
  task.io_error = 0;
  IoEngine& engine = tiers_[task.tier].root->engine();
  if (engine.completes_in_parallel() && device_.takes_page_digests())
    task.page_digests.resize(task.run_bytes / kPageBytes);
  const uint64_t at = task.item.where.offset;
  if (task.run_offset == 0) {
    cut_pieces(task.pieces, pattern, task.staging, at, task.header_bytes + task.run_bytes, task.piece_bytes);
  } else {
    cut_pieces(task.pieces, pattern, task.staging, at, task.header_bytes, task.piece_bytes);
    cut_pieces(task.pieces, pattern, task.staging + task.header_bytes,
               at + task.header_bytes + task.run_offset, task.run_bytes, task.piece_bytes);
  }
  task.pieces_left = static_cast<uint32_t>(task.pieces.size());
  // The last completion may end the task while the loop still runs: nothing of it is touched after its
  // submit.
  IoOperation* const first = task.pieces.data();
  const size_t count = task.pieces.size();
  Source& source = *sources_[task.tier];
  source.reads += static_cast<uint32_t>(count);
  for (const IoOperation& piece : task.pieces) source.read_bytes += piece.bytes;
  for (size_t i = 0; i < count; ++i) engine.submit(first + i);
}

void Transfers::piece_read(LoadTask& task, const IoOperation& piece) {
  if (task.page_digests.empty()) return;
  // The first pieces hold the header, which carries a digest of its own.
  std::byte* const run = task.staging + task.header_bytes;
  std::byte* const end = piece.buffer + piece.bytes;
  std::byte* const begin = std::min(end, std::max(piece.buffer, run));
  const auto digests =
      std::span(task.page_digests).subspan(static_cast<size_t>(std::max(begin, run) - run) / kPageBytes);
  digest_pages({begin, end}, digests);
}

void Transfers::pieces_read(LoadTask& task) {
  if (const int error = task.gds_error.load(); error != 0)
    return retry_without_gds(task, CuFile::words(error));
  if (const int error = task.io_error.load(); error != 0) {
    return fail_load(task, error == ENODATA ? Reason::absent : Reason::io_error, error == ENODATA);
  }
  if (!check_header(task, {task.staging, task.header_bytes})) return;
  if (task.lane != nullptr) return start_scatter(task, {task.device_run, task.run_bytes}, false);
  start_scatter(task, {task.staging + task.header_bytes, task.run_bytes}, false,
                tiers_[task.tier].root->engine().completes_in_parallel());
}

bool Transfers::check_header(LoadTask& task, std::span<const std::byte> header_bytes) {
  auto header = decode_extent_header(header_bytes);
  if (!header) {
    fail_load(task, header.error().kind == ErrorKind::unsupported ? Reason::mismatch : Reason::corrupt, true);
    return false;
  }
  const bool at_home = header->segment == task.item.where.segment &&
                       header->offset == task.item.where.offset && header->key == task.item.key &&
                       header->ns == task.ns && header->group == task.item.group;
  if (!at_home) {
    fail_load(task, Reason::absent, false);  // recycled since the promise
    return false;
  }
  const GroupShape& mine = task.cache->shape;
  const GroupShape found = header->shape();
  bool same = found.kind == mine.kind && found.part == task.item.part && found.tokens == mine.tokens &&
              found.planes == mine.planes && found.row_bytes == mine.row_bytes &&
              found.page_bytes == mine.page_bytes;
  if (found.kind == LayoutKind::opaque) same = same && found.block_tokens == mine.block_tokens;
  if (!same) {
    fail_load(task, Reason::mismatch, false);
    return false;
  }
  task.header = std::move(*header);
  return true;
}

void Transfers::start_scatter(LoadTask& task, std::span<const std::byte> run, bool guarded, bool here) {
  {
    std::unique_lock lock(mutex_);
    if (task.resolved) {
      lock.unlock();
      let_go(task);  // outside: it may unmap a whole segment
      lock.lock();
      leave_motion_locked(task);
      return retire(task);
    }
    task.state = LoadTask::State::scattering;
  }
  submit_scatter(task, run, guarded, here);
}

void Transfers::submit_scatter(LoadTask& task, std::span<const std::byte> run, bool guarded, bool here) {
  task.scatter = ScatterWork{};
  task.scatter.cache = task.cache;
  task.scatter.header = &task.header;
  task.scatter.payload = run;
  task.scatter.page_digests = task.page_digests;
  task.scatter.first_shard = task.first_shard;
  task.scatter.shards = task.shards;
  task.scatter.blocks = task.item.blocks;
  task.scatter.after = task.mark;
  task.scatter.on_device = run.data() == task.device_run;
  task.scatter.guarded = guarded;
  task.scatter.owner = &task;
  task.scatter.done = [](ScatterWork* self, ScatterOutcome outcome) {
    auto* load = static_cast<LoadTask*>(self->owner);
    load->transfers->scattered(*load, outcome);
  };
  if (!here || !device_.run_here(&task.scatter)) device_.submit(&task.scatter);
}

void Transfers::scattered(LoadTask& task, ScatterOutcome outcome) {
  if (outcome == ScatterOutcome::corrupt && task.lane != nullptr)
    return retry_without_gds(task, "a digest differs");
  if (outcome == ScatterOutcome::corrupt) return fail_load(task, Reason::corrupt, true);
  if (outcome == ScatterOutcome::gone) return fail_load(task, Reason::absent, true);
  if (outcome == ScatterOutcome::failed) return fail_load(task, Reason::io_error, false);
  // A mapped payload is read twice, to verify and to copy. A segment is renamed before it is written anew, so
  // while it has its name nothing has changed in between.
  if (task.scatter.guarded && !task.segment->file.is_at_its_path()) {
    // Recycled, or removed by somebody, who told nobody: unless another root has a copy, it is gone for good.
    // A path that cannot be looked up just now tells neither.
    const uint32_t elsewhere = segments_.present_in(task.slot) & ~(1u << tiers_[task.tier].root->index());
    return fail_load(task, Reason::absent, elsewhere == 0 && task.segment->file.was_removed());
  }
  if (task.suspect != nullptr) task.suspect->note_error(task.complaint);
  const bool touch_due = segments_.touch_due(task.slot, clock_.wall_ns(), kTouchIntervalNs);
  if (promotion_ != nullptr) {
    Record put = record_of(task.item);
    put.ns_prefix = prefix_of(task.ns);
    promotion_->note_load(task.tier, task.slot, put, task.header.stored_at_ns);
  }
  if (task.hold) {
    leave_place(task);  // the bytes are ours now; the segment may be evicted
  } else {
    let_go(task);
  }
  std::lock_guard lock(mutex_);
  const bool wanted = !task.resolved && !stop_;
  resolve_load_locked(task, std::nullopt);
  // By the root's own dispatcher: a journal may be on a file system that has stopped answering.
  if (touch_due && tiers_[task.tier].writer != nullptr) sources_[task.tier]->touched.push_back(task.slot);
  leave_motion_locked(task);
  if (!task.hold || !wanted) return retire(task);
  task.state = LoadTask::State::held;
  held_[task.job].push_back(&task);
}

void Transfers::let_go(LoadTask& task) {
  sources_[task.tier]->staged_bytes -= std::exchange(task.staged_bytes, 0);
  if (task.staging != nullptr) device_.slab().release(std::exchange(task.staging, nullptr));
  if (task.device_run != nullptr) task.lane->slab().release(std::exchange(task.device_run, nullptr));
  leave_place(task);
}

void Transfers::leave_place(LoadTask& task) {
  if (std::exchange(task.slot_held, false)) segments_.release(task.slot);
  task.segment = SegmentLease();
}

void Transfers::condemn_missing(LoadTask& task) {
  for (size_t i = 0; i < tiers_.size(); ++i) {
    const Tier& tier = tiers_[i];
    if (tier.writer == nullptr || tier.root->network() || (task.missing_in >> tier.root->index() & 1u) == 0)
      continue;
    const Record condemned = tier.writer->condemn_here(record_of(task.item));
    std::lock_guard lock(mutex_);
    sources_[i]->condemned.push_back(condemned);
  }
}

bool Transfers::is_unfinished_copy(const LoadTask& task) const {
  const SegmentTable::Segment segment = segments_.get(task.slot);
  const uint64_t here = segment.roots[tiers_[task.tier].root->index()].extents;
  return std::ranges::any_of(segment.roots, [here](const auto& root) { return root.extents > here; });
}

void Transfers::fail_load(LoadTask& task, Reason reason, bool bad_on_medium) {
  const bool had_place = static_cast<bool>(task.segment);
  // What has not passed through to a copy is not damage of it, and may still come.
  if (bad_on_medium && is_unfinished_copy(task)) {
    reason = Reason::absent;
    bad_on_medium = false;
  }
  // Nor is what a recycled segment holds by now: it loses its name before it is written anew.
  const Root& root = *tiers_[task.tier].root;
  if (bad_on_medium && reason != Reason::absent && had_place && !root.network() &&
      !task.segment->file.is_at_its_path()) {
    reason = Reason::absent;
    bad_on_medium = false;
  }
  // Another host may have journaled what has not arrived here yet. A condemnation is for ever, so none is
  // written for it: the engine forgets the chunk and stores it again.
  std::optional<Record> condemned;
  if (had_place && bad_on_medium && tiers_[task.tier].writer != nullptr && !root.network())
    condemned = tiers_[task.tier].writer->condemn_here(record_of(task.item));
  let_go(task);
  task.suspect = nullptr;  // the medium's fault, or nobody's
  std::lock_guard lock(mutex_);
  if (condemned) sources_[task.tier]->condemned.push_back(*condemned);
  if (!task.resolved && had_place) {
    note_failure_locked(
        task.job, fmt::format("chunk {} of group {} in \"{}\" {} at {}: {}", task.item.chunk, task.item.group,
                              root.path(), segment_name(task.item.where.segment), task.item.where.offset,
                              tokendepot::name(reason)));
  }
  if (!task.resolved && had_place && !stop_) {
    const uint32_t elsewhere = segments_.present_in(task.slot);
    for (size_t next = task.tier + 1; next < tiers_.size(); ++next) {
      if ((elsewhere >> tiers_[next].root->index() & 1u) != 0) return move_on_locked(task, next);
    }
    // The copy in a lower root may lack what has not passed through to it; the evicted file may still be
    // there.
    const uint32_t untried = condemned_in(task.slot) & ~(1u << tiers_[task.tier].root->index());
    if (untried != 0 && !std::exchange(task.evicted_too, true))
      return move_on_locked(task, find_tier(task, 0));
  }
  leave_motion_locked(task);
  resolve_load_locked(task, reason);
  retire(task);
}

void Transfers::resolve_load_locked(LoadTask& task, std::optional<Reason> failure) {
  if (std::exchange(task.resolved, true)) return;
  const auto found = jobs_.find(task.job);
  TD_CHECK(found != jobs_.end());
  Job& job = found->second;
  std::erase(job.loads, &task);
  // Here, so that whoever hears of the end finds it counted.
  if (task.waited_ns > 0) load_stats_.queue.add(task.waited_ns);
  if (failure == Reason::timed_out) ++traffic_[tiers_[task.tier].root->index()].timed_out_loads;
  if (!failure && !std::exchange(task.counted_path, true)) {
    const Root& root = *tiers_[task.tier].root;
    const double tokens = tokens_locked(*task.cache, task.item.part);
    count_path(load_stats_, root, task.lane, task.direct, task.header_bytes, task.run_bytes, tokens);
    RootTraffic& loaded = traffic_[root.index()].loaded;
    loaded.bytes += task.header_bytes + task.run_bytes;
    loaded.tokens += tokens;
  }
  resolve_locked(job, task.item_index, task.item.chunk, task.item.group, failure,
                 task.header_bytes + task.run_bytes);
  end_job_locked(task.job);
}

void Transfers::retire(LoadTask& task) {
  let_go(task);
  task.state = LoadTask::State::over;
  load_tasks_.erase(&task);
  settled_.notify_all();
}

void Transfers::abandon(LoadTask& task, Reason reason) {
  const bool queued = task.state == LoadTask::State::queued;
  if (queued) {
    auto& queue = sources_[task.tier]->queued;
    const auto [begin, end] = queue.equal_range(task.deadline_ns);
    const auto found = std::find_if(begin, end, [&](const auto& entry) { return entry.second == &task; });
    if (found == end) return;  // the dispatcher has it in hand and will see `resolved`
    queue.erase(found);
  }
  resolve_load_locked(task, reason);
  if (queued) retire(task);
}

void Transfers::enforce_deadlines() {
  const uint64_t now = clock_.steady_ns();
  std::vector<LoadTask*> late;
  for (const auto& [id, job] : jobs_) {
    if (job.deadline_ns > now) continue;
    for (LoadTask* task : job.loads) {
      if (task->state != LoadTask::State::scattering) late.push_back(task);
    }
  }
  for (LoadTask* task : late) abandon(*task, Reason::timed_out);
}

void Transfers::cancel(uint64_t id) {
  std::lock_guard lock(mutex_);
  const auto found = jobs_.find(id);
  if (found == jobs_.end() || found->second.completion.kind != JobKind::load) return;
  const std::vector<LoadTask*> tasks = found->second.loads;
  for (LoadTask* task : tasks) {
    if (task->state != LoadTask::State::scattering) abandon(*task, Reason::cancelled);
  }
}

}  // namespace tokendepot
