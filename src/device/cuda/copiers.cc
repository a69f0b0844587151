#include "device/cuda/copiers.h"

#include <algorithm>

#include "base/errors.h"
#include "base/log.h"
#include "device/cuda/status.h"
#include "io/io_thread.h"

namespace tokendepot::cuda {

Status Copiers::start(uint32_t threads) {
  for (uint32_t i = 0; i < threads; ++i) {
    bounces_.push_back(std::make_unique<Bounce>());
    if (auto s = bounces_.back()->start(); !s) return s;
  }
  for (uint32_t i = 0; i < threads; ++i) {
    threads_.push_back(
        start_io_thread([](void* self) { static_cast<Copiers*>(self)->serve(); }, this, "td-copy"));
    if (!threads_.back().joinable()) {
      threads_.pop_back();
      return thread_refused("the CUDA device's threads");
    }
  }
  return {};
}

Copiers::~Copiers() {
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
    wake_.notify_all();
  }
  for (std::thread& thread : threads_) thread.join();
}

void Copiers::copy_in(Flight& flight) {
  const std::lock_guard lock(mutex_);
  loads_.push_back(std::make_shared<Load>(&flight));
  flight.payload.size() > Bounce::kPieceBytes ? wake_.notify_all() : wake_.notify_one();
}

void Copiers::land(Flight& flight) {
  const std::lock_guard lock(mutex_);
  stores_.push_back(&flight);
  if (stores_.size() == 1) wake_.notify_one();  // and the one that comes wakes the next
}

void Copiers::copy_part(std::unique_lock<std::mutex>& lock, Bounce& bounce) {
  const std::shared_ptr<Load> load = loads_.front();
  Flight& flight = *load->flight;
  const uint64_t whole = flight.payload.size(), at = load->taken,
                 bytes = std::min(Bounce::kPieceBytes, whole - at);
  load->taken += bytes;
  ++load->copying;
  if (load->taken == whole) loads_.pop_front();
  lock.unlock();
  const Bounce::Copied how = bounce.to_device(flight.device + at, flight.payload.subspan(at, bytes),
                                              flight.scatter->guarded, flight.stream);
  const cudaError_t status = how == Bounce::Copied::failed ? cudaGetLastError() : cudaSuccess;
  lock.lock();
  if (how != Bounce::Copied::ok && load->how == Bounce::Copied::ok) {
    load->how = how;
    load->status = status;
    std::erase(loads_, load);  // nobody begins another part of it
    load->taken = whole;
  }
  if (--load->copying > 0 || load->taken < whole) return;
  lock.unlock();
  reports_.copied_in(flight, load->how, load->status);
  lock.lock();
}

void Copiers::serve() {
  const Status entered = enter_device(ordinal_);
  if (!entered) log(LogLevel::error, "cuda:{}: {}", ordinal_, entered.error().message);
  std::unique_lock lock(mutex_);
  Bounce& bounce = *bounces_[next_bounce_++];
  while (true) {
    if (!stores_.empty()) {  // first: the engine may be waiting for them
      Flight& flight = *stores_.front();
      stores_.pop_front();
      if (!stores_.empty()) wake_.notify_one();
      lock.unlock();
      reports_.stored(flight, flight.reached
                                  ? Bounce::Copied::ok
                                  : bounce.to_host(flight.payload, flight.device, flight.gather->guarded));
      lock.lock();
    } else if (!loads_.empty()) {
      copy_part(lock, bounce);
    } else if (closing_) {
      return;
    } else {
      wake_.wait(lock);
    }
  }
}

}  // namespace tokendepot::cuda
