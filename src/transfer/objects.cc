// Objects in the caller's memory: each is the only block of a paged cache of its own. From there on they are
// loads and stores like all others.
#include "base/errors.h"
#include "format/shape.h"
#include "transfer/tasks.h"
#include "transfer/transfers.h"

namespace tokendepot {

std::unique_ptr<PagedCache> Transfers::cache_of(const Depot::Object& object) const {
  if (object.memory.empty() || object.memory.size() > kMaxRowBytes) return nullptr;
  const GroupWant want = Depot::object_want();
  const auto bytes = static_cast<uint32_t>(object.memory.size());
  auto cache = std::make_unique<PagedCache>();
  cache->shape.group = want.group;
  cache->shape.kind = want.kind;
  cache->shape.part = want.part;
  cache->shape.tokens = want.tokens;
  cache->shape.block_tokens = want.tokens;
  cache->shape.planes = 0;
  cache->shape.page_bytes = bytes;
  cache->block_count = 1;
  cache->layers = {{{.base = object.memory.data(), .block_stride = bytes, .piece_bytes = bytes}}};
  return cache;
}

Status Transfers::submit_store_objects(uint64_t id, std::span<const ObjectItem> items, Keeper& keeper) {
  RootWriter* writer = keeper.store_target();
  std::unique_lock lock(mutex_);
  const auto begun = begin_job_locked(id, JobKind::store);
  if (!begun) return std::unexpected(begun.error());
  Job& job = **begun;
  uint64_t largest = 0;
  for (uint32_t i = 0; i < items.size(); ++i) {
    const Depot::Object& object = items[i].object;
    auto cache = cache_of(object);
    if (!cache) {
      ++job.unresolved;
      note_failure_locked(id, fmt::format("object {} has {} bytes; allowed are 1 to {}", i,
                                          object.memory.size(), kMaxRowBytes));
      resolve_locked(job, i, i, 0, Reason::mismatch, 0);
      continue;
    }
    const uint64_t bytes = extent_bytes(cache->shape);
    if (items[i].where.bytes == bytes) {
      ++job.unresolved;
      resolve_locked(job, i, i, 0, std::nullopt, 0);
      continue;
    }
    if (bytes > largest) {
      if (auto fits = fit_extent(bytes, "an object"); !fits) {
        ++job.unresolved;
        note_failure_locked(id, fits.error().message);
        resolve_locked(job, i, i, 0, Reason::dropped, 0);
        continue;
      }
      largest = bytes;
    }
    const PagedCache& lent = *cache;
    queue_store_locked(job, i, {object.key, i, lent.shape.group, {0}}, object.ns, lent, keeper, writer,
                       std::move(cache));
  }
  end_job_locked(id);
  wake_dispatchers_locked();
  lock.unlock();
  if (largest > 0) keeper.wake();  // the next segment may have to be larger now
  return {};
}

Status Transfers::submit_load_objects(uint64_t id, std::span<const ObjectItem> items, uint64_t deadline_ns) {
  const GroupWant want = Depot::object_want();
  std::unique_lock lock(mutex_);
  const auto begun = begin_job_locked(id, JobKind::load, deadline_ns);
  if (!begun) return std::unexpected(begun.error());
  Job& job = **begun;
  for (uint32_t i = 0; i < items.size(); ++i) {
    const Depot::Object& object = items[i].object;
    auto cache = cache_of(object);
    if (!cache || items[i].where.bytes == 0) {
      ++job.unresolved;
      resolve_locked(job, i, i, 0, cache ? Reason::absent : Reason::mismatch, 0);
      continue;
    }
    const PagedCache& lent = *cache;
    queue_load_locked(job, i,
                      {object.key, i, want.group, want.kind, want.part, want.tokens, items[i].where, {0}},
                      object.ns, lent, false, std::move(cache));
  }
  end_job_locked(id);
  wake_dispatchers_locked();
  return {};
}

}  // namespace tokendepot
