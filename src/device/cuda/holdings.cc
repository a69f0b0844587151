#include "device/cuda/holdings.h"

#include <sys/mman.h>

#include <array>

#include "base/errors.h"
#include "base/log.h"
#include "device/cuda/status.h"
#include "io/memory_node.h"

namespace tokendepot::cuda {
namespace {

// A plane of a layer takes 48 bytes: hundreds of groups of 80 layers.
constexpr size_t kDescriptionBytes = 1 << 20;

/// What the device reads and writes over its link lies on the node that the link ends at.
void stay_near(int ordinal) {
  std::array<char, 32> address{};
  if (cudaDeviceGetPCIBusId(address.data(), address.size(), ordinal) != cudaSuccess) return;
  const int node = node_of_pci_device(address.data());
  if (node < 0) return;
  if (const Status near = prefer_memory_of_node(node); near) {
    log(LogLevel::info, "cuda:{} ({}): host memory comes from NUMA node {}", ordinal, address.data(), node);
  } else {
    log(LogLevel::warning, "cuda:{} ({}): host memory comes from any NUMA node: {}", ordinal, address.data(),
        near.error().message);
  }
}

}  // namespace

Result<std::unique_ptr<Holdings>> Holdings::make(int ordinal, uint64_t device_slab_bytes,
                                                 uint64_t slab_bytes) {
  int count = 0;
  const cudaError_t counted = cudaGetDeviceCount(&count);
  if (counted != cudaSuccess) {
    return fail(ErrorKind::unsupported, "device=cuda:{} is not possible: no GPU can be used here ({})",
                ordinal, cudaGetErrorString(counted));
  }
  if (ordinal >= count) {
    return fail(ErrorKind::unsupported, "device=cuda:{} does not exist: this process sees {} GPUs", ordinal,
                count);
  }
  if (auto s = enter_device(ordinal); !s) return std::unexpected(s.error());
  stay_near(ordinal);
  auto made = std::make_unique<Holdings>();
  if (auto s = made->take_memory(ordinal, device_slab_bytes); !s) return std::unexpected(s.error());
  if (auto s = made->pin_slab(ordinal, slab_bytes); !s) return std::unexpected(s.error());
  if (auto s = check(load_kernels(), "the kernels"); !s) return std::unexpected(s.error());
  if (auto s = made->make_streams(); !s) return std::unexpected(s.error());
  if (auto s = made->make_flights(); !s) return std::unexpected(s.error());
  return made;
}

Holdings::~Holdings() {
  for (const Flight& flight : flights) {
    for (cudaEvent_t event : {flight.copied, flight.done}) {
      if (event != nullptr) cudaEventDestroy(event);
    }
  }
  if (setup_stream != nullptr) cudaStreamDestroy(setup_stream);
  for (cudaStream_t stream : streams) {
    if (stream != nullptr) cudaStreamDestroy(stream);
  }
  if (descriptions_ != nullptr) cudaFree(descriptions_);
  if (counters_ != nullptr) cudaFree(counters_);
  if (notes_ != nullptr) cudaFreeHost(notes_);
  if (slab_is_pinned_) cudaHostUnregister(pinned->base());
  if (memory != nullptr) cudaFree(memory);
}

cudaError_t Holdings::copy_to_host(int ordinal, std::byte* to, const std::byte* from, uint64_t bytes) const {
  if (!enter_device(ordinal)) return cudaErrorUnknown;
  cudaError_t status = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, setup_stream);
  if (status == cudaSuccess) status = cudaStreamSynchronize(setup_stream);
  if (status != cudaSuccess) cudaGetLastError();  // told here, and not to whoever asks next on this thread
  return status;
}

Status Holdings::take_memory(int ordinal, uint64_t device_slab_bytes) {
  size_t free_bytes = 0;
  size_t total = 0;
  if (auto s = check(cudaMemGetInfo(&free_bytes, &total), "cudaMemGetInfo"); !s) return s;
  if (free_bytes < device_slab_bytes) {
    return fail(ErrorKind::no_space, "device_slab={} is more than the {} bytes that are free on cuda:{}",
                device_slab_bytes, free_bytes, ordinal);
  }
  const cudaError_t allocated = cudaMalloc(&memory, device_slab_bytes);
  if (allocated != cudaSuccess) {
    return fail(ErrorKind::no_space, "device_slab={} cannot be had on cuda:{} with {} bytes free ({})",
                device_slab_bytes, ordinal, free_bytes, cudaGetErrorString(allocated));
  }
  return check(cudaMalloc(&descriptions_, kDescriptionBytes), "memory for what describes caches");
}

std::span<std::byte> Holdings::descriptions() const {
  return {static_cast<std::byte*>(descriptions_), kDescriptionBytes};
}

Status Holdings::pin_slab(int ordinal, uint64_t slab_bytes) {
  pinned = std::make_unique<HostSlab>(slab_bytes);
  // After a fork the device would keep the old page and this process get a new one with its first write,
  // unless the kernel is new enough to know pinned pages.
  (void)::madvise(pinned->base(), pinned->size(), MADV_DONTFORK);
  const cudaError_t status = cudaHostRegister(pinned->base(), pinned->size(), cudaHostRegisterDefault);
  if (status != cudaSuccess) {
    return fail(ErrorKind::no_space, "slab={} cannot be page-locked for cuda:{} ({})", slab_bytes, ordinal,
                cudaGetErrorString(status));
  }
  slab_is_pinned_ = true;
  return {};
}

// All of the lowest priority, which is the engine's, too: above it, loads take a matrix product 9 % of its
// time instead of 4, at the same rate (one H100). Loads come before stores by the order in which they start.
Status Holdings::make_streams() {
  if (auto s = check(cudaStreamCreateWithFlags(&setup_stream, cudaStreamNonBlocking), "a stream"); !s)
    return s;
  for (cudaStream_t& stream : streams) {
    if (auto s = check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream"); !s) return s;
  }
  return {};
}

Status Holdings::make_flights() {
  const cudaError_t noted = cudaHostAlloc(&notes_, kNoteBytes * kMostInFlight, cudaHostAllocDefault);
  if (auto s = check(noted, "pinned notes"); !s) return s;
  const uint64_t counter_bytes = kMostInFlight * sizeof(Counters);
  if (auto s = check(cudaMalloc(&counters_, counter_bytes), "counters"); !s) return s;
  if (auto s = check(cudaMemsetAsync(counters_, 0, counter_bytes, setup_stream), "counters"); !s) return s;
  if (auto s = check(cudaStreamSynchronize(setup_stream), "counters"); !s) return s;
  for (uint32_t i = 0; i < kMostInFlight; ++i) {
    flights[i].counters = static_cast<Counters*>(counters_) + i;
    flights[i].note = static_cast<std::byte*>(notes_) + i * kNoteBytes;
    for (cudaEvent_t* event : {&flights[i].copied, &flights[i].done}) {
      if (auto s = check(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "an event"); !s) return s;
    }
  }
  return {};
}

}  // namespace tokendepot::cuda
