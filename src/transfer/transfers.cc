#include "transfer/transfers.h"

#include <algorithm>
#include <chrono>

#include "base/errors.h"
#include "base/log.h"
#include "io/io_thread.h"
#include "transfer/tasks.h"

namespace tokendepot {
namespace {

// Stores that have not started after this long inside wait_gathered() are dropped: law 5, never slow the
// engine.
constexpr uint64_t kStorePatienceNs = 1000ull * 1000 * 1000;
constexpr uint64_t kDeadlineTickMs = 10;
constexpr uint64_t kLongestWaitNs = 3600ull * 1000 * 1000 * 1000;  // adding more to a clock could overflow
// Mapped loads have no staging that bounds them; more in motion would only defeat earliest-deadline-first.
constexpr uint32_t kMostLoadsInMotion = 64;

/// A load is begun while its root's engine has fewer reads than this: enough that none of its slots waits for
/// the next. What is queued beyond that, and beyond the bytes that the root's medium needs, only spreads the
/// staging memory, and memory that has left the CPU's caches by the time it is read into costs: of plain
/// threads on a loop device (host with one H200), each reading 1 MiB into memory of its own, 8 had 5.7 GB/s,
/// 24 had 4.2 and 32 had 3.7; this depot had 0.76 to 0.87 of 16 of them with 24 MiB of reads under way, 0.98
/// to 1.00 with 12, 1.05 to 1.13 with 8 and 6.
///
/// Not beside stores into the same root, whose writes go through the same queue: loads of 10 MiB that came
/// after up to 128 of them, a few at a time, took 180 ms instead of 105.
uint32_t most_reads(uint32_t depth) {
  return depth + std::max(4u, depth / 2);
}

}  // namespace

void cut_pieces(std::vector<IoOperation>& pieces, const IoOperation& pattern, std::byte* memory,
                uint64_t offset, uint64_t bytes, uint64_t piece_bytes) {
  // Even pieces: a last one of a few pages would cost the disk as much as a whole one.
  const uint64_t count = std::max<uint64_t>(1, (bytes + piece_bytes / 2) / piece_bytes);
  const uint64_t even_bytes = align_up((bytes + count - 1) / count);
  for (uint64_t at = 0; at < bytes; at += even_bytes) {
    IoOperation& piece = pieces.emplace_back(pattern);
    piece.buffer = memory + at;
    piece.offset = offset + at;
    piece.bytes = static_cast<uint32_t>(std::min(even_bytes, bytes - at));
  }
}

Transfers::Transfers(Device& device, std::vector<Tier> tiers, SegmentTable& segments, const Clock& clock,
                     uint64_t store_queue_bytes, Promotion* promotion)
    : device_(device),
      tiers_(std::move(tiers)),
      segments_(segments),
      clock_(clock),
      store_queue_bytes_(store_queue_bytes),
      promotion_(promotion),
      staged_(std::ranges::any_of(tiers_, [](const Tier& tier) { return !tier.root->mapped(); })),
      traffic_(kMaxRoots) {
  const auto staged_roots = std::ranges::count_if(tiers_, [](const Tier& t) { return !t.root->mapped(); });
  for (const Tier& tier : tiers_) {
    Source& source = *sources_.emplace_back(std::make_unique<Source>());
    source.transfers = this;
    source.writer = tier.writer;
    if (!tier.root->mapped()) {
      source.most_reads = most_reads(tier.root->engine().depth());
      source.most_read_bytes = tier.root->most_read_bytes();
    }
    // What it holds while it does not answer must leave room for the other roots that need the slab.
    if (tier.root->network() && staged_roots > 1) source.most_staged_bytes = device_.slab().size() / 4;
  }
  dispatching_ = static_cast<uint32_t>(sources_.size()) + 1;
  store_dispatcher_ =
      start_io_thread([](void* self) { static_cast<Transfers*>(self)->run_stores(); }, this, "td-store");
  if (!store_dispatcher_.joinable()) --dispatching_;
  for (const auto& source : sources_) {
    source->dispatcher = start_io_thread(
        [](void* context) {
          auto& mine = *static_cast<Source*>(context);
          mine.transfers->run_loads(mine);
        },
        source.get(), "td-load");
    if (!source->dispatcher.joinable()) --dispatching_;
  }
}

Transfers::~Transfers() {
  TD_CHECK(stop_);
  if (store_dispatcher_.joinable()) store_dispatcher_.join();
  for (const auto& source : sources_) {
    if (source->dispatcher.joinable()) source->dispatcher.join();
  }
}

bool Transfers::running() const {
  return store_dispatcher_.joinable() &&
         std::ranges::all_of(sources_, [](const auto& source) { return source->dispatcher.joinable(); });
}

bool Transfers::close() {
  const auto end = std::chrono::steady_clock::now() + std::chrono::nanoseconds(kClosePatienceNs);
  std::unique_lock lock(mutex_);
  stop_ = true;
  for (const auto& source : sources_) source->wake.notify_all();
  wake_stores_.notify_all();
  give_up_starting_locked(UINT64_MAX);
  const bool idle = settled_.wait_until(lock, end, [this] { return dispatching_ == 0; });
  for (const auto& source : sources_) {
    while (!source->queued.empty()) abandon(*source->queued.begin()->second, Reason::cancelled);
  }
  queued_stores_.insert(queued_stores_.begin(), rewrites_.begin(), rewrites_.end());
  rewrites_.clear();
  while (!queued_stores_.empty()) {
    StoreTask& task = *queued_stores_.front();
    queued_stores_.pop_front();
    lock.unlock();
    finish_store(task, false, Reason::cancelled);
    lock.lock();
  }
  for (const auto& [job, tasks] : std::exchange(held_, {})) {
    for (LoadTask* task : tasks) retire(*task);
  }
  const bool settled =
      settled_.wait_until(lock, end, [this] { return load_tasks_.empty() && store_tasks_.empty(); });
  if (!settled) {
    // What is still being read shall end there and not go on to the paged cache.
    for (const auto& [task, owned] : load_tasks_) {
      if (task->state != LoadTask::State::scattering) abandon(*task, Reason::cancelled);
    }
  }
  lock.unlock();
  log_warnings();
  return idle && settled;
}

void Transfers::wake_dispatchers_locked() {
  for (const auto& source : sources_) {
    source->work = true;
    if (!source->queued.empty() || !source->touched.empty() || !source->condemned.empty() ||
        !warnings_.empty())
      source->wake.notify_one();
  }
  if (queued_stores_.empty() && rewrites_.empty()) return;
  store_work_ = true;
  wake_stores_.notify_one();
}

void Transfers::give_up_starting_locked(uint64_t submitted_until_ns) {
  for (const auto& [task, owned] : store_tasks_) {
    if (!task->starting || task->given_up || task->submitted_ns > submitted_until_ns) continue;
    task->given_up = true;
    task->counted_ungathered = false;
    --ungathered_;
  }
}

Status Transfers::fit_extent(uint64_t bytes, std::string_view what) {
  for (const Tier& tier : tiers_) {
    if (tier.root->mapped() || bytes <= device_.slab().size()) continue;
    return fail(ErrorKind::invalid_argument, "slab={} is smaller than {} ({} bytes)", device_.slab().size(),
                what, bytes);
  }
  for (const Tier& tier : tiers_) {
    if (tier.writer == nullptr) continue;
    if (auto fits = tier.root->fit_extent(bytes); !fits) return fits;
  }
  return {};
}

Status Transfers::attach(const PagedCache& cache) {
  if (auto valid = validate(cache); !valid) return valid;
  if (auto accepted = device_.accept(cache); !accepted) return accepted;
  if (auto fits =
          fit_extent(extent_bytes(cache.shape), fmt::format("one extent of group {}", cache.shape.group));
      !fits) {
    return fits;
  }
  std::lock_guard lock(mutex_);
  const auto [place, fresh] = caches_.try_emplace(cache.shape.group);
  if (!fresh) return fail(ErrorKind::invalid_argument, "group {} is attached already", cache.shape.group);
  place->second = std::make_unique<PagedCache>(cache);
  return {};
}

Result<Transfers::Job*> Transfers::begin_job_locked(uint64_t id, JobKind kind, uint64_t deadline_ns) {
  if (stop_) return fail(ErrorKind::closed, "the depot is closed");
  if (id_in_use_locked(id) || (kind == JobKind::load && held_.contains(id)))
    return fail(ErrorKind::busy, "job {} is in use", id);
  Job& job = jobs_[id];
  job.completion.job = id;
  job.completion.kind = kind;
  job.submitted_ns = clock_.steady_ns();
  if (deadline_ns != 0) {
    job.deadline_ns = job.submitted_ns + std::min(deadline_ns, UINT64_MAX - job.submitted_ns);
    reported_.notify_all();  // who waits is to wait no longer than that
  }
  return &job;
}

Status Transfers::mark_stream(void* stream) {
  const auto mark = device_.mark(stream);
  if (!mark) return std::unexpected(mark.error());
  std::lock_guard lock(mutex_);
  mark_ = std::max(mark_, *mark);
  return {};
}

void Transfers::count(FailureCounts& counts, Reason reason) {
  switch (reason) {
    case Reason::absent:
      ++counts.absent;
      break;
    case Reason::mismatch:
      ++counts.mismatch;
      break;
    case Reason::corrupt:
      ++counts.corrupt;
      break;
    case Reason::io_error:
      ++counts.io_error;
      break;
    case Reason::timed_out:
      ++counts.timed_out;
      break;
    case Reason::cancelled:
      ++counts.cancelled;
      break;
    case Reason::dropped:
      ++counts.dropped;
      break;
    case Reason::pinned:
      ++counts.pinned;
      break;
  }
}

void Transfers::resolve_locked(Job& job, uint32_t item, uint32_t chunk, uint16_t group,
                               std::optional<Reason> failure, uint64_t bytes) {
  TransferStats& stats = job.completion.kind == JobKind::load ? load_stats_ : store_stats_;
  if (failure) {
    job.completion.failures.push_back({item, chunk, group, *failure});
    count(stats.failures, *failure);
  } else {
    ++job.completion.items_ok;
    job.completion.bytes += bytes;
    stats.bytes += bytes;
    const uint64_t took = clock_.steady_ns() - job.submitted_ns;
    stats.nanoseconds += took;
    if (bytes > 0) {
      ++stats.extents;
      stats.latency.add(took);
    }
  }
  TD_CHECK(job.unresolved > 0);
  --job.unresolved;
}

void Transfers::note_failure(uint64_t id, std::string text) {
  std::lock_guard lock(mutex_);
  note_failure_locked(id, std::move(text));
}

void Transfers::note_failure_locked(uint64_t id, std::string text) {
  const auto found = jobs_.find(id);
  if (found != jobs_.end() && found->second.first_failure.empty())
    found->second.first_failure = std::move(text);
}

bool Transfers::id_in_use_locked(uint64_t id) const {
  return jobs_.contains(id) ||
         std::ranges::any_of(ended_, [id](const Completion& ended) { return ended.job == id; });
}

void Transfers::log_warnings() {
  std::vector<std::string> lines;
  {
    std::lock_guard lock(mutex_);
    lines.swap(warnings_);
  }
  for (const std::string& line : lines) log_line(LogLevel::warning, line);
}

void Transfers::end_job_locked(uint64_t id) {
  const auto found = jobs_.find(id);
  if (found == jobs_.end() || found->second.unresolved > 0) return;
  Job& job = found->second;
  if (!job.completion.failures.empty()) {
    // Stores that a bound dropped are counted, not told: they may be many and mean no harm.
    const bool load = job.completion.kind == JobKind::load;
    const ItemFailure& first = job.completion.failures.front();
    if (load || !job.first_failure.empty()) {
      warnings_.push_back(fmt::format("{} of {} extents {}; {}{}", job.completion.failures.size(),
                                      job.completion.failures.size() + job.completion.items_ok,
                                      load ? "did not load and are recomputed" : "were not stored",
                                      job.first_failure.empty()
                                          ? fmt::format("chunk {} of group {}: {}", first.chunk, first.group,
                                                        tokendepot::name(first.reason))
                                          : job.first_failure,
                                      job.completion.failures.size() > 1 ? ", and others" : ""));
      wake_dispatchers_locked();
    }
  }
  job.completion.nanoseconds = clock_.steady_ns() - job.submitted_ns;
  ended_.push_back(std::move(job.completion));
  jobs_.erase(found);
  reported_.notify_all();
}

std::vector<Completion> Transfers::poll() {
  std::lock_guard lock(mutex_);
  enforce_deadlines();
  return std::exchange(ended_, {});
}

bool Transfers::wait_ended(uint64_t timeout_ns) {
  const uint64_t end = clock_.steady_ns() + std::min(timeout_ns, kLongestWaitNs);
  std::unique_lock lock(mutex_);
  while (true) {
    enforce_deadlines();
    if (!ended_.empty()) return true;
    const uint64_t now = clock_.steady_ns();
    if (now >= end) return false;
    const uint64_t until = std::min(end, std::max(now, earliest_deadline_locked()));
    reported_.wait_for(lock, std::chrono::nanoseconds(until - now));
  }
}

uint64_t Transfers::earliest_deadline_locked() const {
  uint64_t earliest = UINT64_MAX;
  for (const auto& [id, job] : jobs_) {
    const bool can_end = std::ranges::any_of(
        job.loads, [](const LoadTask* task) { return task->state != LoadTask::State::scattering; });
    if (can_end) earliest = std::min(earliest, job.deadline_ns);
  }
  return earliest;
}

bool Transfers::wait_gathered(uint64_t timeout_ns) {
  const uint64_t begin = clock_.steady_ns();
  const uint64_t end = begin + std::min(timeout_ns, kLongestWaitNs);
  std::unique_lock lock(mutex_);
  const auto all = [this] { return ungathered_ == 0; };
  const auto patience = std::chrono::nanoseconds(std::min(timeout_ns, kStorePatienceNs));
  if (settled_.wait_for(lock, patience, all)) return true;
  // More than once: the dispatcher may have had one in its hands and put it back.
  while (true) {
    std::deque<StoreTask*> late;
    std::erase_if(queued_stores_, [&](StoreTask* task) {
      if (task->submitted_ns <= begin) late.push_back(task);
      return task->submitted_ns <= begin;
    });
    lock.unlock();
    for (StoreTask* task : late) drop_store(*task, &DropCounts::late);
    lock.lock();
    give_up_starting_locked(begin);
    const uint64_t now = clock_.steady_ns();
    const uint64_t rest = end > now ? end - now : 0;
    const uint64_t tick = std::min(rest, kDeadlineTickMs * 1000 * 1000);
    if (settled_.wait_for(lock, std::chrono::nanoseconds(tick), all)) return true;
    if (rest == 0) break;
  }
  // Who does not wait may write to the blocks: whatever is being read from them now must not be published.
  for (const auto& [task, owned] : store_tasks_) task->spoilt |= task->counted_ungathered;
  return false;
}

bool Transfers::flush(uint64_t timeout_ns) {
  std::unique_lock lock(mutex_);
  return settled_.wait_for(lock, std::chrono::nanoseconds(std::min(timeout_ns, kLongestWaitNs)),
                           [this] { return store_tasks_.empty(); });
}

void Transfers::space_ready() {
  std::lock_guard lock(mutex_);
  wake_dispatchers_locked();
}

void Transfers::run_loads(Source& source) {
  std::unique_lock lock(mutex_);
  while (!stop_) {
    // The tick serves loads that wait for slab, and deadlines when nobody polls.
    const auto woken = [this, &source] { return source.work || stop_; };
    if (!source.queued.empty() || source.in_motion > 0) {
      source.wake.wait_for(lock, std::chrono::milliseconds(kDeadlineTickMs), woken);
    } else {
      source.wake.wait(lock, woken);
    }
    source.work = false;
    if (!warnings_.empty()) {
      lock.unlock();
      log_warnings();
      lock.lock();
    }
    enforce_deadlines();
    start_loads(source, lock);
    source.first = false;
    if (!queued_stores_.empty()) wake_stores_.notify_one();
    write_journal(source, lock);
  }
  write_journal(source, lock);
  --dispatching_;
  settled_.notify_all();
}

void Transfers::start_loads(Source& source, std::unique_lock<std::mutex>& lock) {
  while (!stop_ && !source.queued.empty() && source.in_motion < kMostLoadsInMotion && source.may_read()) {
    LoadTask& task = *source.queued.begin()->second;
    source.queued.erase(source.queued.begin());
    task.state = LoadTask::State::reading;
    // Those that wait will be in motion soon: small pieces would only cost them.
    task.piece_bytes = piece_bytes_for(++source.in_motion + source.queued.size());
    const bool first = task.waited_ns == 0;
    if (first) task.waited_ns = std::max<uint64_t>(1, clock_.steady_ns() - task.submitted_ns);
    lock.unlock();
    const bool started = start_load(task);
    lock.lock();
    if (started) continue;
    if (first) task.waited_ns = 0;
    --source.in_motion;
    task.state = LoadTask::State::queued;
    if (task.resolved) {
      retire(task);
      continue;
    }
    source.queued.emplace(task.deadline_ns, &task);
    break;
  }
}

void Transfers::read_ended(Source& source, uint64_t bytes) {
  // Whoever makes room tells it, each bound for itself: the dispatcher looks at both.
  const bool one_fewer = source.reads.fetch_sub(1) == source.most_reads;
  const uint64_t before = source.read_bytes.fetch_sub(bytes);
  const bool fewer_bytes = before >= source.most_read_bytes && before - bytes < source.most_read_bytes;
  if (!one_fewer && !fewer_bytes) return;
  const std::lock_guard lock(mutex_);
  source.work = true;
  source.wake.notify_one();
}

void Transfers::write_journal(Source& source, std::unique_lock<std::mutex>& lock) {
  if (source.touched.empty() && source.condemned.empty()) return;
  const std::vector<uint32_t> slots = std::exchange(source.touched, {});
  const std::vector<Record> condemned = std::exchange(source.condemned, {});
  lock.unlock();
  for (const Record& record : condemned) source.writer->tell_condemned(record);
  for (const uint32_t slot : slots) source.writer->touch(slot);
  lock.lock();
}

Transfers::Source& Transfers::source_of(const RootWriter* writer) const {
  const auto found =
      std::ranges::find_if(sources_, [writer](const auto& source) { return source->writer == writer; });
  TD_CHECK(found != sources_.end());
  return **found;
}

bool Transfers::loads_first_locked() const {
  return std::ranges::any_of(sources_, [](const auto& source) { return source->first; });
}

void Transfers::run_stores() {
  constexpr auto kTick = std::chrono::milliseconds(kDeadlineTickMs);
  std::unique_lock lock(mutex_);
  while (true) {
    // The tick serves stores that wait for slab or segments.
    const auto woken = [this] { return store_work_ || stop_; };
    if (queued_stores_.empty() && rewrites_.empty()) {
      wake_stores_.wait(lock, woken);
    } else {
      wake_stores_.wait_for(lock, kTick, woken);
    }
    // Bounded, and once: loads may be held up by a root that does not answer.
    if (!wake_stores_.wait_for(lock, kTick, [this] { return !loads_first_locked() || stop_; })) {
      for (const auto& source : sources_) source->first = false;
    }
    if (stop_) break;
    store_work_ = false;
    if (!start_rewrites(lock)) continue;  // whoever started now could keep what they wait for
    while (!stop_ && !queued_stores_.empty() && rewrites_.empty()) {
      StoreTask& task = *queued_stores_.front();
      queued_stores_.pop_front();
      task.starting = true;
      task.piece_bytes = piece_bytes_for(store_tasks_.size());
      task.waited_ns = clock_.steady_ns() - task.submitted_ns;
      lock.unlock();
      const Start start = start_store(task);
      lock.lock();
      if (start != Start::later) continue;
      task.starting = false;
      if (task.given_up) {
        lock.unlock();
        drop_store(task, &DropCounts::late);
        lock.lock();
        continue;
      }
      queued_stores_.push_front(&task);
      break;
    }
  }
  --dispatching_;
  settled_.notify_all();
}

bool Transfers::start_rewrites(std::unique_lock<std::mutex>& lock) {
  while (!stop_ && !rewrites_.empty()) {
    StoreTask& task = *rewrites_.front();
    rewrites_.pop_front();
    lock.unlock();
    const bool started = start_rewrite(task);
    lock.lock();
    if (started) continue;
    rewrites_.push_front(&task);
    return false;
  }
  return true;
}

void Transfers::add_to(DepotStats& stats) const {
  std::lock_guard lock(mutex_);
  stats.load = load_stats_;
  stats.store = store_stats_;
  stats.drops = drops_;
  for (const Tier& tier : tiers_) {
    RootStats& root = stats.roots[tier.root->index()];
    root.loaded = traffic_[tier.root->index()].loaded;
    root.stored = traffic_[tier.root->index()].stored;
    root.timed_out_loads = traffic_[tier.root->index()].timed_out_loads;
    root.written_bytes += root.stored.bytes;
  }
}

double Transfers::tokens_locked(const PagedCache& cache, const Part& part) const {
  const GroupShape& shape = cache.shape;
  if (caches_.empty() || shape.group != caches_.begin()->first) return 0;  // an object, or another group
  const auto cells = [](uint32_t begin, uint32_t end, uint32_t from, uint32_t to) {
    return static_cast<double>(std::min(end, to) - std::max(begin, from));
  };
  const Part& mine = shape.part;
  const double common = cells(mine.layer_begin, mine.layer_end, part.layer_begin, part.layer_end) *
                        cells(mine.head_begin, mine.head_end, part.head_begin, part.head_end);
  const double all = static_cast<double>(mine.layer_end - mine.layer_begin) *
                     static_cast<double>(mine.head_end - mine.head_begin);
  return shape.tokens * common / all;
}

}  // namespace tokendepot
