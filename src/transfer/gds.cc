// Loads and stores past the host: shards go between files and the device's slab through cuFile; headers, and
// whatever cuFile fails, go the ordinary way.
#include <utility>

#include "base/errors.h"
#include "transfer/tasks.h"
#include "transfer/transfers.h"

namespace tokendepot {

GdsLane* Transfers::lane_of(const LoadTask& task) const {
  // What is held waits in the host's slab: the device's is needed by those that move.
  if (task.hold || task.avoid_gds || !task.segment->gds) return nullptr;
  GdsLane* const lane = tiers_[task.tier].root->gds();
  return lane != nullptr && task.run_bytes <= lane->slab().size() ? lane : nullptr;
}

bool Transfers::read_with_gds(LoadTask& task) {
  GdsLane& lane = *task.lane;
  task.staging = device_.slab().allocate(task.header_bytes);
  task.device_run = lane.slab().allocate(task.run_bytes);
  if (task.staging == nullptr || task.device_run == nullptr) {
    let_go(task);
    return false;
  }
  IoOperation pattern;
  pattern.fd = task.segment->file.fd();
  pattern.owner = &task;
  pattern.done = [](IoOperation* self, int error) {
    auto* load = static_cast<LoadTask*>(self->owner);
    if (error != 0) load->io_error.store(error, std::memory_order_relaxed);
    if (load->pieces_left.fetch_sub(1, std::memory_order_acq_rel) == 1) load->transfers->pieces_read(*load);
  };
  task.pieces.clear();
  task.io_error = 0;
  const uint64_t at = task.item.where.offset;
  cut_pieces(task.pieces, pattern, task.staging, at, task.header_bytes, task.piece_bytes);
  const size_t headers = task.pieces.size();
  pattern.handle = task.segment->gds.get();
  pattern.done = [](IoOperation* self, int error) {
    auto* load = static_cast<LoadTask*>(self->owner);
    if (error != 0) load->gds_error.store(error, std::memory_order_relaxed);
    if (load->pieces_left.fetch_sub(1, std::memory_order_acq_rel) == 1) load->transfers->pieces_read(*load);
  };
  cut_pieces(task.pieces, pattern, task.device_run, at + task.header_bytes + task.run_offset, task.run_bytes,
             task.piece_bytes);
  task.pieces_left = static_cast<uint32_t>(task.pieces.size());
  // The last completion may end the task while the loops still run: nothing of it is touched after that.
  IoEngine& engine = tiers_[task.tier].root->engine();
  IoOperation* const first = task.pieces.data();
  const size_t count = task.pieces.size();
  for (size_t i = 0; i < headers; ++i) engine.submit(first + i);
  for (size_t i = headers; i < count; ++i) lane.engine().submit(first + i);
  return true;
}

void Transfers::retry_without_gds(LoadTask& task, std::string what) {
  let_go(task);
  task.suspect = std::exchange(task.lane, nullptr);
  task.complaint = std::move(what);
  task.avoid_gds = true;
  task.gds_error = 0;
  std::lock_guard lock(mutex_);
  if (!task.resolved && !stop_) return move_on_locked(task, task.tier);
  leave_motion_locked(task);
  resolve_load_locked(task, Reason::cancelled);
  retire(task);
}

bool Transfers::take_store_memory(StoreTask& task, GdsLane* lane) {
  if (lane != nullptr && task.bytes - task.header_bytes > lane->slab().size()) lane = nullptr;
  if (!take_staging(task, lane != nullptr ? task.header_bytes : task.bytes)) return false;
  if (lane == nullptr || take_run(task, *lane)) return true;
  give_store_memory(task);
  return false;
}

// Half of each slab stays free for loads, unless a single extent needs more.
bool Transfers::take_staging(StoreTask& task, uint64_t bytes) {
  {
    std::lock_guard lock(mutex_);
    if (staged_store_bytes_ > 0 && staged_store_bytes_ + bytes > device_.slab().size() / 2) return false;
  }
  task.staging = device_.slab().allocate(bytes);
  if (task.staging == nullptr) return false;
  task.staged_bytes = bytes;
  std::lock_guard lock(mutex_);
  staged_store_bytes_ += bytes;
  return true;
}

bool Transfers::take_run(StoreTask& task, GdsLane& lane) {
  const uint64_t payload = task.bytes - task.header_bytes;
  {
    std::lock_guard lock(mutex_);
    if (lane_store_bytes_ > 0 && lane_store_bytes_ + payload > lane.slab().size() / 2) return false;
  }
  task.device_run = lane.slab().allocate(payload);
  if (task.device_run == nullptr) return false;
  task.lane = &lane;
  std::lock_guard lock(mutex_);
  lane_store_bytes_ += payload;
  return true;
}

void Transfers::give_staging(StoreTask& task) {
  if (task.staging == nullptr) return;
  device_.slab().release(std::exchange(task.staging, nullptr));
  std::lock_guard lock(mutex_);
  staged_store_bytes_ -= std::exchange(task.staged_bytes, 0);
}

void Transfers::give_run(StoreTask& task) {
  GdsLane* const lane = std::exchange(task.lane, nullptr);
  if (lane == nullptr) return;
  lane->slab().release(std::exchange(task.device_run, nullptr));
  std::lock_guard lock(mutex_);
  lane_store_bytes_ -= task.bytes - task.header_bytes;
}

void Transfers::give_store_memory(StoreTask& task) {
  give_staging(task);
  give_run(task);
}

void Transfers::rewrite_without_gds(StoreTask& task) {
  give_staging(task);  // else those that wait could hold among them what each of them waits for
  {
    std::lock_guard lock(mutex_);
    if (!stop_) {
      rewrites_.push_back(&task);
      return wake_dispatchers_locked();
    }
  }
  finish_store(task, false, Reason::cancelled);
}

bool Transfers::start_rewrite(StoreTask& task) {
  if (!take_staging(task, task.bytes)) return false;
  std::byte* const payload = task.staging + task.header_bytes;
  const bool copied = device_.copy_from_file_slab(payload, task.device_run, task.bytes - task.header_bytes);
  give_run(task);
  if (!copied) {
    note_failure(task.job, fmt::format("chunk {} of group {}: the device cannot be read", task.item.chunk,
                                       task.item.group));
    finish_store(task, false, Reason::io_error);
    return true;
  }
  encode_extent_header(task.header, {task.staging, task.header_bytes});
  write_pieces(task);
  return true;
}

void Transfers::count_path(TransferStats& stats, const Root& root, const GdsLane* lane, bool direct,
                           uint64_t header, uint64_t payload, double tokens) {
  PathBytes& bytes = stats.by_path;
  PathTokens& carried = stats.tokens_by_path;
  if (root.mapped()) {
    bytes.mapped += header + payload;
    carried.mapped += tokens;
  } else if (lane != nullptr) {
    (direct ? bytes.direct : bytes.buffered) += header;
    (lane->p2p() ? bytes.gds_p2p : bytes.gds_compat) += payload;
    (lane->p2p() ? carried.gds_p2p : carried.gds_compat) += tokens;
  } else {
    (direct ? bytes.direct : bytes.buffered) += header + payload;
    (direct ? carried.direct : carried.buffered) += tokens;
  }
}

}  // namespace tokendepot
