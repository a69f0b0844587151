#include "fake_cuda/stream.h"

#include <algorithm>

namespace tokendepot::testing::fake_cuda {

uint64_t Reached::record() {
  const std::lock_guard lock(mutex_);
  return ++recorded_;
}

void Reached::reach(uint64_t record) {
  const std::lock_guard lock(mutex_);
  reached_ = std::max(reached_, record);
  changed_.notify_all();
}

uint64_t Reached::recorded() const {
  const std::lock_guard lock(mutex_);
  return recorded_;
}

bool Reached::has(uint64_t record) const {
  const std::lock_guard lock(mutex_);
  return reached_ >= record;
}

void Reached::wait(uint64_t record) const {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return reached_ >= record; });
}

}  // namespace tokendepot::testing::fake_cuda

CUstream_st::CUstream_st() : thread_([this] { serve(); }) {}

CUstream_st::~CUstream_st() {
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
    wake_.notify_all();
  }
  thread_.join();
}

void CUstream_st::queue(std::function<void()> work) {
  const std::lock_guard lock(mutex_);
  queue_.push_back(std::move(work));
  wake_.notify_all();
}

void CUstream_st::wait() {
  const auto end = std::make_shared<tokendepot::testing::fake_cuda::Reached>();
  const uint64_t record = end->record();
  queue([end, record] { end->reach(record); });
  end->wait(record);
}

void CUstream_st::serve() {
  std::unique_lock lock(mutex_);
  while (true) {
    wake_.wait(lock, [this] { return closing_ || !queue_.empty(); });
    if (queue_.empty()) return;
    const auto work = std::move(queue_.front());
    queue_.pop_front();
    lock.unlock();
    work();
    lock.lock();
  }
}
