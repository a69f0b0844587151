#include "gpu/link.h"

#include <cstring>

namespace tokendepot::bench {

Link::Link(uint64_t bytes) : bytes_(bytes) {
  must(cudaHostAlloc(&host_, bytes, cudaHostAllocDefault), "pinned memory for the link's limit");
  std::memset(host_, 0x5A, bytes);
  must(cudaMalloc(&device_, bytes), "device memory for the link's limit");
}

Link::~Link() {
  cudaFree(device_);
  cudaFreeHost(host_);
}

Link::Rate Link::copy(Way way, uint64_t piece, double seconds) {
  const uint64_t pieces = bytes_ / piece;
  const double cpu = cpu_s();
  const double begin = now_s();
  uint64_t rounds = 0;
  // One round is always queued behind the one that is waited for: the link never idles.
  const auto wait_for_round = [&](uint64_t round) {
    for (const Event& end : ends_[round % 2]) must(cudaEventSynchronize(end), "a copy");
  };
  for (; rounds < 2 || now_s() - begin < seconds; ++rounds) {
    for (uint64_t p = 0; p < pieces; ++p) {
      auto* const host = static_cast<std::byte*>(host_) + p * piece;
      auto* const device = static_cast<std::byte*>(device_) + p * piece;
      const cudaStream_t stream = streams_[p % kStreams];
      must(way == Way::to_device ? cudaMemcpyAsync(device, host, piece, cudaMemcpyHostToDevice, stream)
                                 : cudaMemcpyAsync(host, device, piece, cudaMemcpyDeviceToHost, stream),
           "a copy");
    }
    for (size_t s = 0; s < kStreams; ++s)
      must(cudaEventRecord(ends_[rounds % 2][s], streams_[s]), "an event");
    if (rounds > 0) wait_for_round(rounds - 1);
  }
  wait_for_round(rounds - 1);
  const double gb = static_cast<double>(rounds * pieces * piece) * 1e-9;
  return {gb / (now_s() - begin), (cpu_s() - cpu) / gb};
}

}  // namespace tokendepot::bench
