// Loads in two halves: verified into staging first, written into the cache once the engine has promised them.
#include <algorithm>

#include "base/errors.h"
#include "transfer/tasks.h"
#include "transfer/transfers.h"

namespace tokendepot {

Status Transfers::place(uint64_t id, uint64_t held_job, std::span<const Depot::HeldBlocks> blocks) {
  std::vector<LoadTask*> started;
  {
    std::lock_guard lock(mutex_);
    if (stop_) return fail(ErrorKind::closed, "the depot is closed");
    if (id_in_use_locked(id)) return fail(ErrorKind::busy, "job {} is in use", id);
    const auto found = held_.find(held_job);
    if (found == held_.end()) return fail(ErrorKind::not_found, "nothing is held under job {}", held_job);
    for (const LoadTask* task : found->second) {
      const auto wanted = std::ranges::find_if(blocks, [task](const auto& entry) {
        return entry.chunk == task->item.chunk && entry.group == task->item.group;
      });
      if (wanted == blocks.end()) continue;
      const bool fits = wanted->blocks.size() == task->item.blocks.size() &&
                        std::ranges::all_of(wanted->blocks, [task](int32_t block) {
                          return block == kSkipBlock ||
                                 (block >= 0 && static_cast<uint32_t>(block) < task->cache->block_count);
                        });
      if (!fits) {
        return fail(ErrorKind::invalid_argument,
                    "chunk {} of group {}: {} block ids do not fit; expected {} below {}", wanted->chunk,
                    wanted->group, wanted->blocks.size(), task->item.blocks.size(), task->cache->block_count);
      }
    }
    const std::vector<LoadTask*> tasks = std::move(found->second);
    held_.erase(found);
    Job& job = jobs_[id];
    job.completion.job = id;
    job.completion.kind = JobKind::load;
    job.submitted_ns = clock_.steady_ns();
    for (LoadTask* task : tasks) {
      const auto wanted = std::ranges::find_if(blocks, [task](const auto& entry) {
        return entry.chunk == task->item.chunk && entry.group == task->item.group;
      });
      if (wanted == blocks.end()) {
        retire(*task);
        continue;
      }
      task->item.blocks = wanted->blocks;
      task->hold = false;
      task->resolved = false;
      task->job = id;
      task->submitted_ns = job.submitted_ns;
      task->deadline_ns = UINT64_MAX;
      task->mark = mark_;
      task->state = LoadTask::State::scattering;
      ++job.unresolved;
      ++sources_[task->tier]->in_motion;
      job.loads.push_back(task);
      started.push_back(task);
    }
    end_job_locked(id);
  }
  for (LoadTask* task : started)
    submit_scatter(*task, {task->staging + task->header_bytes, task->run_bytes}, false);
  return {};
}

void Transfers::drop_held(uint64_t held_job) {
  std::lock_guard lock(mutex_);
  const auto found = held_.find(held_job);
  if (found == held_.end()) return;
  const std::vector<LoadTask*> tasks = std::move(found->second);
  held_.erase(found);
  for (LoadTask* task : tasks) retire(*task);
  wake_dispatchers_locked();
}

}  // namespace tokendepot
