// Mapped segments, registered with the driver in the background: what the device reaches without a copy.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "io/mapping.h"

namespace tokendepot::cuda {

/// What registering gives way to, for a bounded time: the driver does one thing at a time, and copies that
/// are not followed by others in time leave the link idle.
struct Busy {
  std::atomic<size_t> loads = 0;   // whose payloads are being copied, or wait for a thread that does
  std::atomic<bool> step = false;  // the engine queues work
  /// When it last ended to, on the steady clock; at first: never.
  std::atomic<std::chrono::steady_clock::time_point> step_ended{std::chrono::steady_clock::time_point::min()};

  void step_begins() { step = true; }
  /// Of a step that has not begun it changes nothing: an engine that waits for a load has many, which queue
  /// nothing.
  void step_ends() {
    if (!step) return;
    step_ended = std::chrono::steady_clock::now();
    step = false;
  }
};

/// Whether a registration that has waited since `begun` goes on waiting at `now`.
bool gives_way(const Busy& busy, std::chrono::steady_clock::time_point begun,
               std::chrono::steady_clock::time_point now);

/// One thread registers, unregisters and unmaps, so that none of it meets another or waits for a load. Ranges
/// are registered in chunks, hottest mapping first; a failure is a log line and a slower path. Thread-safe.
///
/// A file that is cut short under a registered mapping: its pages are held by the registration, so the device
/// reads what was there, and the digest and the check of the file's name decide; what it writes there is lost
/// with the file and its extents are absent. Nothing of it raises SIGBUS, which only a CPU's access does.
class Registry {
 public:
  /// `busy` outlives this.
  Registry(int ordinal, const Busy& busy);
  /// Everything adopted has been released.
  ~Registry();
  Registry(const Registry&) = delete;
  Registry& operator=(const Registry&) = delete;
  /// False: the system refused the thread.
  bool running() const { return thread_.joinable(); }

  void adopt(std::span<std::byte> mapping, bool writable, uint64_t heat);
  void release(Mapping mapping);

  /// Cuts a range at the borders of registrations, which no single copy may cross. False when some of the
  /// range is not registered.
  bool cut(std::byte* at, uint64_t bytes, std::vector<std::span<std::byte>>& pieces) const;
  uint64_t registered_bytes() const;

 private:
  struct Adopted {
    uint64_t bytes = 0;
    uint64_t begun = 0;  // of them, registered or refused
    bool writable = false;
  };

  void serve();
  uint64_t registered_locked() const;
  void register_chunk(std::unique_lock<std::mutex>& lock);
  std::span<std::byte> next_chunk_locked() const;
  void bring_ahead(std::span<std::byte> chunk);
  void await_ahead();
  void give_way() const;
  void unregister(std::unique_lock<std::mutex>& lock, std::byte* begin, uint64_t bytes);

  const int ordinal_;
  const Busy& busy_;
  // The thread's own.
  bool read_only_possible_ = false;
  bool complained_ = false;
  bool told_ = false;
  std::span<std::byte> ahead_;  // the chunk whose pages were brought while another was registered
  std::thread bringer_;
  mutable std::mutex mutex_;
  std::condition_variable wake_;
  bool closing_ = false;
  std::map<std::byte*, Adopted> adopted_;
  std::multimap<uint64_t, std::byte*, std::greater<>> waiting_;  // by heat; equals in their order
  std::vector<Mapping> released_;
  std::map<std::byte*, uint64_t> chunks_;  // registered: begin -> bytes
  std::thread thread_;
};

}  // namespace tokendepot::cuda
