#include "device/cuda/flight.h"

#include <cstring>

namespace tokendepot::cuda {

Job job_of(const Flight& flight) {
  if (const ScatterWork* const load = flight.scatter; load != nullptr) {
    const GroupShape shape = load->header->shape();
    auto* const payload = const_cast<std::byte*>(load->payload.data());
    return {load->cache,    shape,        load->first_shard,
            load->shards,   load->blocks, {payload, load->shards * shape.shard_stride()},
            load->on_device};
  }
  const GatherWork& store = *flight.gather;
  const GroupShape& shape = store.cache->shape;
  return {store.cache,    shape, 0, shape.shards(), store.blocks, store.payload.first(shape.payload_bytes()),
          store.on_device};
}

void describe(const Job& job, const DeviceCache& known, std::byte* payload, std::byte* digests,
              Flight& flight) {
  flight.device = payload;
  flight.aligned = known.aligned;
  Move& move = flight.move;
  const GroupShape& cache = job.cache->shape;
  Fit& fit = move.fit;
  fit.planes = known.planes;
  fit.planes_per_layer = Divisor(known.planes_per_layer);
  fit.opaque = cache.kind == LayoutKind::opaque;
  if (fit.opaque) {
    fit.page_bytes = Divisor(cache.page_bytes);
  } else {
    fit.row_bytes = Divisor(cache.row_bytes);
    fit.block_tokens = Divisor(cache.block_tokens);
    fit.tokens = Divisor(job.shape.tokens);
  }
  fit.cache_layer_begin = cache.part.layer_begin;
  fit.cache_layer_end = cache.part.layer_end;
  fit.cache_head_begin = cache.part.head_begin;
  fit.cache_head_end = cache.part.head_end;
  fit.layer_begin = job.shape.part.layer_begin;
  fit.head_begin = job.shape.part.head_begin;
  fit.first_shard = job.first_shard;
  move.shards = job.shards;
  move.shard_bytes = job.shape.shard_bytes();
  move.shard_stride = job.shape.shard_stride();
  move.payload = reinterpret_cast<uint8_t*>(flight.device);
  move.page_digests = reinterpret_cast<uint64_t*>(digests);
  move.counters = flight.counters;

  const bool few_blocks = job.blocks.size() <= kFewBlocks;
  std::memcpy(few_blocks ? fit.few_blocks : reinterpret_cast<int32_t*>(flight.note), job.blocks.data(),
              job.blocks.size() * 4);
  fit.blocks = few_blocks ? nullptr : reinterpret_cast<const int32_t*>(flight.note);
  flight.note_digests = reinterpret_cast<uint64_t*>(flight.note + align_up(job.blocks.size() * 4, 8));
  flight.note_outcome = reinterpret_cast<uint32_t*>(flight.note_digests + job.shards);
  move.shard_digests = flight.note_digests;
  move.outcome = flight.note_outcome;
  if (flight.scatter == nullptr) return;
  const bool few_digests = job.shards <= kFewDigests;
  std::memcpy(few_digests ? move.few_digests : flight.note_digests,
              flight.scatter->header->shard_digests.data() + job.first_shard, job.shards * 8);
  if (few_digests) move.shard_digests = nullptr;
  *flight.note_outcome = kNoOutcome;
}

}  // namespace tokendepot::cuda
