// The little of CUDA that the GPU benchmark needs; a failure stops the program with the driver's words.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "rig.h"

namespace tokendepot::bench {

inline void must(cudaError_t status, const char* what) {
  if (status != cudaSuccess) stop(std::string(what) + ": " + cudaGetErrorString(status));
}

/// Device memory in which every 64 MiB repeat the same random bytes.
inline CacheMemory device_cache(uint64_t bytes) {
  void* memory = nullptr;
  must(cudaMalloc(&memory, bytes), "device memory for the paged cache");
  std::vector<std::byte> tile(std::min<uint64_t>(bytes, 64ull << 20));
  fill_random(tile);
  for (uint64_t at = 0; at < bytes; at += tile.size()) {
    must(cudaMemcpy(static_cast<std::byte*>(memory) + at, tile.data(),
                    std::min<uint64_t>(tile.size(), bytes - at), cudaMemcpyHostToDevice),
         "filling the paged cache");
  }
  return {static_cast<std::byte*>(memory), [](std::byte* at) { cudaFree(at); }};
}

class Stream {
 public:
  Stream() { must(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream"); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

class Event {
 public:
  explicit Event(unsigned flags = cudaEventBlockingSync) {
    must(cudaEventCreateWithFlags(&event_, flags), "an event");
  }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  operator cudaEvent_t() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

}  // namespace tokendepot::bench
