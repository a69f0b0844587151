// Streams and events of the stand-in.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

namespace tokendepot::testing::fake_cuda {

/// How often an event was recorded, and how many of these have been reached. Outlives its handle.
class Reached {
 public:
  uint64_t record();
  void reach(uint64_t record);
  uint64_t recorded() const;
  bool has(uint64_t record) const;
  void wait(uint64_t record) const;

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  uint64_t recorded_ = 0;
  uint64_t reached_ = 0;
};

}  // namespace tokendepot::testing::fake_cuda

/// CUDA's own name for what its handles point to.
struct CUstream_st {
  CUstream_st();
  ~CUstream_st();
  CUstream_st(const CUstream_st&) = delete;
  CUstream_st& operator=(const CUstream_st&) = delete;
  void queue(std::function<void()> work);
  /// What was queued before has been done.
  void wait();

  bool capturing = false;  // guarded by the runtime's lock

 private:
  void serve();

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> queue_;
  bool closing_ = false;
  std::thread thread_;
};

struct CUevent_st {
  std::shared_ptr<tokendepot::testing::fake_cuda::Reached> reached =
      std::make_shared<tokendepot::testing::fake_cuda::Reached>();
};
