#include "device/cuda/registry.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <optional>
#include <thread>
#include <utility>

#include "base/log.h"
#include "device/cuda/status.h"
#include "io/io_thread.h"
#include "tokendepot/layout.h"

namespace tokendepot::cuda {
namespace {

// Registering takes 43 ms a GiB where the pages are in this process's page table already and 250 where not,
// and all the while the driver keeps others waiting: an engine that started beside 33 GiB took 6 s longer. So
// the pages come first, without the driver, while the chunk before is registered, and it rests as long as
// registering takes where nobody else is at the driver. Not as long as it took: beside a working engine that
// is mostly waiting, and rests as long as that let stores get ahead of it.
//
// It waits for loads, also for those through pinned memory, which call the driver for each piece, and while
// the engine queues a step: on two H200 hosts of one kind, 50, 2,000 and 8,000 tokens after a restart took
// 108, 209 and 314 ms where it did not wait for steps, 40, 59 and 188 where it did (Llama 3.1 8B). Nor does
// it begin in the moment between two steps, where the next one's launches would meet it: beside stores into
// fresh segments an engine decoded 15 and 30 % slower so, 4 and 6 % since (one H200).
constexpr uint64_t kChunkBytes = 32ull << 20;
constexpr auto kRest = std::chrono::microseconds(1400);
constexpr auto kLongestWaitForLoads = std::chrono::milliseconds(50);
constexpr auto kLongestWaitForSteps = std::chrono::milliseconds(100);
constexpr auto kQuiet = std::chrono::milliseconds(5);  // without a step: the engine is at rest
constexpr auto kLook = std::chrono::microseconds(500);
constexpr uint64_t kTouchers = 4;

// By faults: MADV_POPULATE_READ would lock the process's memory map until it ends. Each page, although the
// kernel maps the neighbours of one that holds data with it: of a fresh segment none does. Where they hold
// data that takes as long as one touch for 64 KiB, 45 ms a GiB on one core.
//
// What is read does not matter, so a store that writes it meanwhile is no race to be told of.
__attribute__((no_sanitize("thread"))) void read_of_each_page(std::span<const std::byte> part) {
  for (uint64_t at = 0; at < part.size(); at += kPageBytes)
    static_cast<void>(*static_cast<const volatile std::byte*>(part.data() + at));
}

void touch_pages(std::span<const std::byte> part) {
  auto read = [part] { read_of_each_page(part); };
  // A file cut short has no page there: what it means for the payloads is found out when they are used.
  static_cast<void>(guard_mapping(part, read));
}

void bring_pages(std::span<const std::byte> chunk) {
  const uint64_t each = align_up(chunk.size() / kTouchers);
  std::array<std::span<const std::byte>, kTouchers> parts;
  for (uint64_t i = 0; i < kTouchers; ++i) {
    const uint64_t begin = std::min(i * each, chunk.size());
    parts[i] = chunk.subspan(begin, std::min(each, chunk.size() - begin));
  }
  std::array<std::thread, kTouchers> threads;
  for (uint64_t i = 1; i < kTouchers; ++i) {
    threads[i] =
        start_io_thread([](void* part) { touch_pages(*static_cast<std::span<const std::byte>*>(part)); },
                        &parts[i], "td-pages");
    if (!threads[i].joinable()) touch_pages(parts[i]);
  }
  touch_pages(parts[0]);
  for (std::thread& thread : threads) {
    if (thread.joinable()) thread.join();
  }
}

}  // namespace

bool gives_way(const Busy& busy, std::chrono::steady_clock::time_point begun,
               std::chrono::steady_clock::time_point now) {
  if (busy.loads > 0 && now - begun < kLongestWaitForLoads) return true;
  return (busy.step || now - kQuiet < busy.step_ended.load()) && now - begun < kLongestWaitForSteps;
}

Registry::Registry(int ordinal, const Busy& busy) : ordinal_(ordinal), busy_(busy) {
  thread_ = start_io_thread([](void* self) { static_cast<Registry*>(self)->serve(); }, this, "td-register");
}

Registry::~Registry() {
  {
    std::lock_guard lock(mutex_);
    closing_ = true;
    wake_.notify_one();
  }
  if (thread_.joinable()) thread_.join();
}

void Registry::adopt(std::span<std::byte> mapping, bool writable, uint64_t heat) {
  std::lock_guard lock(mutex_);
  adopted_[mapping.data()] = {mapping.size(), 0, writable};
  waiting_.emplace(heat, mapping.data());
  wake_.notify_one();
}

void Registry::release(Mapping mapping) {
  std::lock_guard lock(mutex_);
  adopted_.erase(mapping.data());
  std::erase_if(waiting_, [&](const auto& entry) { return entry.second == mapping.data(); });
  released_.push_back(std::move(mapping));
  wake_.notify_one();
}

bool Registry::cut(std::byte* at, uint64_t bytes, std::vector<std::span<std::byte>>& pieces) const {
  pieces.clear();
  std::lock_guard lock(mutex_);
  auto chunk = chunks_.upper_bound(at);
  if (chunk == chunks_.begin()) return false;
  --chunk;
  for (uint64_t done = 0; done < bytes; ++chunk) {
    if (chunk == chunks_.end()) return false;
    const auto [begin, size] = *chunk;
    if (at + done < begin || at + done >= begin + size) return false;
    const uint64_t piece = std::min(bytes - done, size - static_cast<uint64_t>(at + done - begin));
    pieces.emplace_back(at + done, piece);
    done += piece;
  }
  return true;
}

uint64_t Registry::registered_bytes() const {
  std::lock_guard lock(mutex_);
  return registered_locked();
}

uint64_t Registry::registered_locked() const {
  uint64_t total = 0;
  for (const auto& [begin, bytes] : chunks_) total += bytes;
  return total;
}

void Registry::serve() {
  const Status entered = enter_device(ordinal_);
  if (!entered) log(LogLevel::error, "cuda:{}: {}", ordinal_, entered.error().message);
  int possible = 0;
  read_only_possible_ =
      cudaDeviceGetAttribute(&possible, cudaDevAttrHostRegisterReadOnlySupported, ordinal_) == cudaSuccess &&
      possible != 0;
  const auto began = std::chrono::steady_clock::now();
  std::unique_lock lock(mutex_);
  while (true) {
    if (!released_.empty()) {
      await_ahead();  // it may be at the mapping's pages
      ahead_ = {};
      std::optional<Mapping> mapping = std::move(released_.back());
      released_.pop_back();
      unregister(lock, mapping->data(), mapping->size());
      lock.unlock();
      mapping.reset();  // unmapping a whole segment takes long, too
      lock.lock();
    } else if (closing_) {
      await_ahead();
      return;
    } else if (!waiting_.empty()) {
      register_chunk(lock);
    } else {
      if (!chunks_.empty() && !std::exchange(told_, true)) {
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
        log(LogLevel::info,
            "cuda:{}: {} MiB of segments registered in the background, {:.1f} s after the start", ordinal_,
            registered_locked() >> 20, took.count());
      }
      wake_.wait(lock);
    }
  }
}

std::span<std::byte> Registry::next_chunk_locked() const {
  if (waiting_.empty()) return {};
  std::byte* const mapping = waiting_.begin()->second;
  const Adopted& adopted = adopted_.at(mapping);
  return {mapping + adopted.begun, std::min(kChunkBytes, adopted.bytes - adopted.begun)};
}

void Registry::bring_ahead(std::span<std::byte> chunk) {
  ahead_ = chunk;
  bringer_ = start_io_thread([](void* span) { bring_pages(*static_cast<std::span<std::byte>*>(span)); },
                             &ahead_, "td-pages");
  if (!bringer_.joinable()) ahead_ = {};
}

void Registry::await_ahead() {
  if (bringer_.joinable()) bringer_.join();
}

void Registry::give_way() const {
  const auto begun = std::chrono::steady_clock::now();
  while (gives_way(busy_, begun, std::chrono::steady_clock::now())) std::this_thread::sleep_for(kLook);
}

void Registry::register_chunk(std::unique_lock<std::mutex>& lock) {
  const std::span<std::byte> chunk = next_chunk_locked();
  std::byte* const mapping = waiting_.begin()->second;
  Adopted& adopted = adopted_.at(mapping);
  const unsigned flags =
      cudaHostRegisterDefault | (adopted.writable ? 0u : unsigned{cudaHostRegisterReadOnly});
  const bool possible = adopted.writable || read_only_possible_;
  adopted.begun += chunk.size();
  const bool last = adopted.begun == adopted.bytes;
  if (last) std::erase_if(waiting_, [mapping](const auto& entry) { return entry.second == mapping; });
  const std::span<std::byte> next = next_chunk_locked();
  lock.unlock();
  await_ahead();
  if (possible && ahead_.data() != chunk.data()) bring_pages(chunk);
  if (possible && !next.empty()) bring_ahead(next);
  if (possible) give_way();
  const cudaError_t status =
      possible ? cudaHostRegister(chunk.data(), chunk.size(), flags) : cudaErrorNotSupported;
  if (status != cudaSuccess) cudaGetLastError();
  std::this_thread::sleep_for(kRest);
  if (status != cudaSuccess) {
    log(std::exchange(complained_, true) ? LogLevel::debug : LogLevel::warning,
        "cuda:{}: a segment mapped {} cannot be registered ({}): what lies in it is copied through pinned "
        "memory, which is slower",
        ordinal_, possible && flags == cudaHostRegisterDefault ? "for writing" : "for reading only",
        cudaGetErrorString(status));
  }
  lock.lock();
  if (status == cudaSuccess) {
    chunks_.emplace(chunk.data(), chunk.size());
  } else {  // nor will the rest of it be
    std::erase_if(waiting_, [mapping](const auto& entry) { return entry.second == mapping; });
  }
}

void Registry::unregister(std::unique_lock<std::mutex>& lock, std::byte* begin, uint64_t bytes) {
  while (true) {
    const auto chunk = chunks_.lower_bound(begin);
    if (chunk == chunks_.end() || chunk->first >= begin + bytes) return;
    std::byte* const at = chunk->first;
    chunks_.erase(chunk);
    lock.unlock();
    cudaHostUnregister(at);
    lock.lock();
  }
}

}  // namespace tokendepot::cuda
