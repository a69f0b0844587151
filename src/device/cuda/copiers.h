// Threads that copy what the device does not reach by itself, and that report stores.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "device/cuda/bounce.h"
#include "device/cuda/flight.h"
#include "tokendepot/error.h"

namespace tokendepot::cuda {

/// Who is told what became of a flight, on a copier's thread.
class CopierReports {
 public:
  /// A load: its payload is on its way to the device if `ok`, and then the flight's stream waits for it. Else
  /// the stream waits for what is on its way of it, and `status` is the driver's if it `failed`.
  virtual void copied_in(Flight& flight, Bounce::Copied how, cudaError_t status) = 0;
  /// A store: its payload lies where it was wanted if `ok`.
  virtual void stored(Flight& flight, Bounce::Copied how) = 0;

 protected:
  ~CopierReports() = default;
};

/// What the end of a store costs, a header and a journal record, is theirs, too: on the device's own thread
/// it left the link idle, and stores of 1 MiB had 0.88 to 0.90 of it instead of 0.92 to 0.94 (one H200).
/// A load's payload is cut into parts, which they share: the device's slab has room for six extents of 80
/// MiB, so that six threads of twelve had work. copy_in() and land() may be called from any thread.
class Copiers {
 public:
  Copiers(int ordinal, CopierReports& reports) : ordinal_(ordinal), reports_(reports) {}
  /// Ends the threads. Every flight that was given to them has been reported.
  ~Copiers();
  Copiers(const Copiers&) = delete;
  Copiers& operator=(const Copiers&) = delete;
  /// On a thread of the device's: each copier has pinned memory of its own.
  Status start(uint32_t threads);

  uint64_t pinned_bytes() const { return threads_.size() * Bounce::kPinnedBytes; }
  uint32_t threads() const { return static_cast<uint32_t>(threads_.size()); }

  /// A load whose payload the device does not reach.
  void copy_in(Flight& flight);
  /// A store whose kernel has ended, and its copy if the device reaches the payload.
  void land(Flight& flight);

 private:
  /// A load until its last part is on its way. All but `flight` is under mutex_.
  struct Load {
    Flight* flight;
    uint64_t taken = 0;    // bytes of the payload, by copiers
    uint32_t copying = 0;  // copiers that are at it
    Bounce::Copied how = Bounce::Copied::ok;
    cudaError_t status = cudaSuccess;
  };

  void serve();
  void copy_part(std::unique_lock<std::mutex>& lock, Bounce& bounce);

  const int ordinal_;
  CopierReports& reports_;
  std::vector<std::unique_ptr<Bounce>> bounces_;
  std::vector<std::thread> threads_;
  std::mutex mutex_;  // everything below
  std::condition_variable wake_;
  std::deque<std::shared_ptr<Load>> loads_;  // of which not every part is taken
  std::deque<Flight*> stores_;
  size_t next_bounce_ = 0;
  bool closing_ = false;
};

}  // namespace tokendepot::cuda
