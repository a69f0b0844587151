// The steps of a store: take space, gather and digest, write, journal, report. Bytes before journal.
#include <algorithm>
#include <cstring>

#include "base/errors.h"
#include "base/log.h"
#include "io/mapping.h"
#include "transfer/tasks.h"
#include "transfer/transfers.h"

namespace tokendepot {
namespace {

bool suits(const StoreItem& item, const PagedCache& cache) {
  return item.blocks.size() == cache.shape.blocks() && std::ranges::all_of(item.blocks, [&](int32_t block) {
           return block >= 0 && static_cast<uint32_t>(block) < cache.block_count;
         });
}

}  // namespace

Status Transfers::submit_store(uint64_t id, StorePlan plan, Keeper& keeper) {
  RootWriter* writer = keeper.store_target();
  std::unique_lock lock(mutex_);
  const auto begun = begin_job_locked(id, JobKind::store);
  if (!begun) return std::unexpected(begun.error());
  for (uint32_t i = 0; i < plan.items.size(); ++i) {
    StoreItem& item = plan.items[i];
    const auto cache = caches_.find(item.group);
    if (cache == caches_.end()) continue;  // this worker holds nothing of the group
    queue_store_locked(**begun, i, std::move(item), plan.ns, *cache->second, keeper, writer);
  }
  end_job_locked(id);
  wake_dispatchers_locked();
  return {};
}

void Transfers::queue_store_locked(Job& job, uint32_t index, StoreItem item, const NamespaceDigest& ns,
                                   const PagedCache& cache, Keeper& keeper, RootWriter* writer,
                                   std::unique_ptr<PagedCache> own) {
  ++job.unresolved;
  if (!suits(item, cache)) return resolve_locked(job, index, item.chunk, item.group, Reason::mismatch, 0);
  const uint64_t bytes = extent_bytes(cache.shape);
  if (writer == nullptr || store_bytes_ + bytes > store_queue_bytes_) {
    ++(writer == nullptr ? drops_.no_root : drops_.queue_full);
    return resolve_locked(job, index, item.chunk, item.group, Reason::dropped, 0);
  }
  auto owned = std::make_unique<StoreTask>();
  StoreTask& task = *owned;
  store_tasks_.emplace(&task, std::move(owned));
  task.transfers = this;
  task.job = job.completion.job;
  task.item_index = index;
  task.item = std::move(item);
  task.ns = ns;
  task.cache = &cache;
  task.own_cache = std::move(own);
  task.writer = writer;
  ++source_of(writer).stores;
  task.keeper = &keeper;
  task.bytes = bytes;
  task.header_bytes = extent_header_bytes(cache.shape.shards());
  task.submitted_ns = job.submitted_ns;
  task.mark = mark_;
  store_bytes_ += bytes;
  ++ungathered_;
  queued_stores_.push_back(&task);
}

Transfers::Start Transfers::start_store(StoreTask& task) {
  const bool mapped = task.writer->root().mapped();
  if (!task.place.segment) {
    if (!mapped && !take_store_memory(task, task.writer->root().gds())) return Start::later;
    auto place = task.writer->reserve(task.bytes);
    if (task.writer->wants_spare()) task.keeper->wake();
    if (!place) {
      if (place.error().kind == ErrorKind::busy) {
        // It may wait for long: loads shall not wait for its staging.
        give_store_memory(task);
        return Start::later;
      }
      if (task.writer->space_is_pinned()) {
        finish_store(task, false, Reason::pinned);
      } else {
        drop_store(task, &DropCounts::no_space);
      }
      return Start::over;
    }
    task.place = std::move(*place);
    task.direct = task.place.segment->direct;
    segments_.acquire(task.place.slot);
    if (task.lane != nullptr && !task.place.segment->gds) give_store_memory(task);  // not taken by cuFile
  }
  // The place is kept while it waits for memory: whoever comes next would find the same segment.
  if (!mapped && task.staging == nullptr && !take_store_memory(task, nullptr)) return Start::later;
  {
    std::unique_lock lock(mutex_);
    task.starting = false;
    if (task.given_up) {
      lock.unlock();
      drop_store(task, &DropCounts::late);
      return Start::over;
    }
  }
  ExtentHeader& header = task.header;
  const GroupShape& shape = task.cache->shape;
  header.key = task.item.key;
  header.ns = task.ns;
  header.segment = task.place.where.segment;
  header.offset = task.place.where.offset;
  header.set_shape(shape);
  header.stored_at_ns = clock_.wall_ns();
  header.shard_digests.resize(shape.shards());
  std::byte* const extent =
      mapped ? task.place.segment->mapping.data() + task.place.where.offset : task.staging;
  task.gather.cache = task.cache;
  task.gather.blocks = task.item.blocks;
  task.gather.payload = {task.lane != nullptr ? task.device_run : extent + task.header_bytes,
                         task.bytes - task.header_bytes};
  task.gather.on_device = task.lane != nullptr;
  task.gather.digests = header.shard_digests;
  task.gather.after = task.mark;
  task.gather.guarded = mapped;
  task.gather.owner = &task;
  task.gather.done = [](GatherWork* self, bool ok) {
    auto* store = static_cast<StoreTask*>(self->owner);
    store->transfers->gathered(*store, ok);
  };
  device_.submit(&task.gather);
  return Start::started;
}

void Transfers::gathered(StoreTask& task, bool ok) {
  bool spoilt = false;
  {
    std::lock_guard lock(mutex_);
    --ungathered_;
    task.counted_ungathered = false;
    spoilt = task.spoilt;
    settled_.notify_all();
  }
  if (spoilt) return drop_store(task, &DropCounts::late);
  if (!ok) return finish_store(task, false, Reason::io_error);
  if (!task.gather.guarded) {
    encode_extent_header(task.header, {task.staging, task.header_bytes});
    return write_pieces(task);
  }
  std::byte* const extent = task.gather.payload.data() - task.header_bytes;
  std::vector<std::byte> encoded(task.header_bytes);
  encode_extent_header(task.header, encoded);
  auto copy_header = [&encoded, extent] { std::memcpy(extent, encoded.data(), encoded.size()); };
  const bool written = guard_mapping(std::span<const std::byte>(extent, task.header_bytes), copy_header);
  if (!written) return finish_store(task, false, Reason::io_error);
  pieces_written(task);
}

void Transfers::write_pieces(StoreTask& task) {
  IoOperation pattern;
  pattern.fd = task.place.segment->file.fd();
  pattern.write = true;
  pattern.owner = &task;
  pattern.done = [](IoOperation* self, int error) {
    auto* store = static_cast<StoreTask*>(self->owner);
    if (error != 0) store->io_error.store(error, std::memory_order_relaxed);
    if (store->pieces_left.fetch_sub(1, std::memory_order_acq_rel) == 1)
      store->transfers->pieces_written(*store);
  };
  task.pieces.clear();
  cut_pieces(task.pieces, pattern, task.staging, task.place.where.offset, task.staged_bytes,
             task.piece_bytes);
  const size_t staged = task.pieces.size();
  GdsLane* const lane = task.lane;
  if (lane != nullptr) {
    pattern.handle = task.place.segment->gds.get();
    pattern.done = [](IoOperation* self, int error) {
      auto* store = static_cast<StoreTask*>(self->owner);
      if (error != 0) store->gds_error.store(error, std::memory_order_relaxed);
      if (store->pieces_left.fetch_sub(1, std::memory_order_acq_rel) == 1)
        store->transfers->pieces_written(*store);
    };
    cut_pieces(task.pieces, pattern, task.device_run, task.place.where.offset + task.header_bytes,
               task.bytes - task.header_bytes, task.piece_bytes);
  }
  task.pieces_left = static_cast<uint32_t>(task.pieces.size());
  // The last completion may end the task while the loops still run.
  IoEngine& engine = task.writer->root().engine();
  IoOperation* const first = task.pieces.data();
  const size_t count = task.pieces.size();
  for (size_t i = 0; i < staged; ++i) engine.submit(first + i);
  for (size_t i = staged; i < count; ++i) lane->engine().submit(first + i);
}

void Transfers::pieces_written(StoreTask& task) {
  const int gds_error = task.gds_error.exchange(0);
  if (gds_error != 0) task.lane->note_error(CuFile::words(gds_error));
  if (const int error = task.io_error.load(); error != 0) {
    note_failure(task.job, fmt::format("chunk {} of group {} to \"{}\": {}", task.item.chunk, task.item.group,
                                       task.writer->root().path(), CuFile::words(error)));
    return finish_store(task, false, Reason::io_error);
  }
  if (gds_error != 0) return rewrite_without_gds(task);
  Record put;
  put.kind = task.header.kind;
  put.group = task.header.group;
  put.key = task.header.key;
  put.ns_prefix = prefix_of(task.header.ns);
  put.part = task.header.part;
  put.tokens = task.header.tokens;
  if (auto known = task.writer->acknowledge(task.place, put); !known) {
    note_failure(task.job, fmt::format("chunk {} of group {}: {}", task.item.chunk, task.item.group,
                                       known.error().message));
    return finish_store(task, false, Reason::io_error);
  }
  WriteThrough* const next = task.keeper->write_through();
  if (next == nullptr) return finish_store(task, true, Reason::dropped);
  // It is served from now on, but may be lost with this root: the store is not done yet. Loads shall not wait
  // for its staging meanwhile.
  task.written_by = task.lane;
  give_store_memory(task);
  put.where = task.place.where;
  put.time_ns = task.header.stored_at_ns;
  task.passage = {task.place.slot, put, &task, [](WriteThrough::Passage* self, bool stored) {
                    auto* store = static_cast<StoreTask*>(self->owner);
                    if (stored) return store->transfers->finish_store(*store, true, Reason::dropped);
                    store->transfers->drop_store(*store, &DropCounts::next_root);
                  }};
  next->submit(&task.passage);
}

void Transfers::drop_store(StoreTask& task, uint64_t DropCounts::* why) {
  {
    std::lock_guard lock(mutex_);
    ++(drops_.*why);
  }
  finish_store(task, false, Reason::dropped);
}

void Transfers::finish_store(StoreTask& task, bool stored, Reason reason) {
  const GdsLane* const lane = task.lane != nullptr ? task.lane : task.written_by;
  const bool begun = static_cast<bool>(task.place.segment);
  give_store_memory(task);
  if (begun) {
    task.place.segment = SegmentLease();
    segments_.release(task.place.slot);
  }
  std::lock_guard lock(mutex_);
  if (begun) store_stats_.queue.add(task.waited_ns);
  if (task.counted_ungathered) --ungathered_;
  store_bytes_ -= task.bytes;
  if (stored) {
    const double tokens = tokens_locked(*task.cache, task.cache->shape.part);
    count_path(store_stats_, task.writer->root(), lane, task.direct, task.header_bytes,
               task.bytes - task.header_bytes, tokens);
    RootTraffic& root = traffic_[task.writer->root().index()].stored;
    root.bytes += task.bytes;
    root.tokens += tokens;
  }
  Job& job = jobs_.at(task.job);
  resolve_locked(job, task.item_index, task.item.chunk, task.item.group,
                 stored ? std::nullopt : std::optional(reason), task.bytes);
  end_job_locked(task.job);
  --source_of(task.writer).stores;
  store_tasks_.erase(&task);
  wake_dispatchers_locked();
  settled_.notify_all();
}

}  // namespace tokendepot
