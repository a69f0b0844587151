#include "device/cuda/caches.h"

#include <algorithm>
#include <vector>

#include "device/cuda/on_device.h"
#include "device/cuda/status.h"

namespace tokendepot::cuda {

namespace {

Status check_planes(const PagedCache& cache, int ordinal) {
  for (size_t layer = 0; layer < cache.layers.size(); ++layer) {
    for (const Plane& plane : cache.layers[layer]) {
      cudaPointerAttributes found{};
      if (auto s = check(cudaPointerGetAttributes(&found, plane.base), "the cache's address"); !s) return s;
      const bool on_gpu = found.type == cudaMemoryTypeDevice;
      if (found.type == cudaMemoryTypeManaged || (on_gpu && found.device == ordinal)) continue;
      return fail(ErrorKind::invalid_argument,
                  "group {}, layer {}: the cache is in {}; expected memory of cuda:{}", cache.shape.group,
                  layer, on_gpu ? fmt::format("memory of cuda:{}", found.device) : "host memory", ordinal);
    }
  }
  return {};
}

}  // namespace

Status check_memory(const PagedCache& cache, int ordinal) {
  return on_device(ordinal, [&cache, ordinal] { return check_planes(cache, ordinal); });
}

Caches::~Caches() {
  for (void* memory : more_) cudaFree(memory);
}

cudaError_t Caches::allocate(size_t bytes, void** memory) {
  const size_t whole = align_up(bytes, alignof(std::max_align_t));
  if (whole <= room_.size()) {
    *memory = room_.data();
    room_ = room_.subspan(whole);
    return cudaSuccess;
  }
  const cudaError_t status = cudaMalloc(memory, bytes);
  if (status == cudaSuccess) more_.push_back(*memory);
  return status;
}

cudaError_t Caches::find_or_add(const PagedCache& cache, cudaStream_t stream, const DeviceCache** found) {
  if (const auto at = known_.find(&cache); at != known_.end()) {
    *found = &at->second;
    return cudaSuccess;
  }
  DeviceCache known;
  for (const auto& layer : cache.layers)
    known.planes_per_layer = std::max(known.planes_per_layer, static_cast<uint32_t>(layer.size()));
  std::vector<DevicePlane> planes;
  const auto multiple = [](int64_t value) { return value % 16 == 0; };
  known.aligned = cache.shape.kind == LayoutKind::opaque || multiple(cache.shape.row_bytes);
  for (const auto& layer : cache.layers) {
    const size_t next_layer = planes.size() + known.planes_per_layer;
    uint32_t offset = 0;
    for (const Plane& plane : layer) {
      planes.push_back({reinterpret_cast<uint8_t*>(plane.base), plane.block_stride, plane.head_stride,
                        plane.token_stride, plane.piece_bytes, offset});
      offset += plane.piece_bytes;
      known.aligned = known.aligned && reinterpret_cast<uintptr_t>(plane.base) % 16 == 0 &&
                      multiple(plane.block_stride) && multiple(plane.head_stride) &&
                      multiple(plane.token_stride) && multiple(plane.piece_bytes);
    }
    planes.resize(next_layer);  // opaque layers may have fewer pieces: nobody looks behind a page's last one
  }
  const size_t bytes = planes.size() * sizeof(DevicePlane);
  void* memory = nullptr;
  const std::span<std::byte> room = room_;
  const size_t more = more_.size();
  cudaError_t status = allocate(bytes, &memory);
  if (status != cudaSuccess) return status;
  known.planes = static_cast<DevicePlane*>(memory);
  // Not on the default stream, which would wait for the engine's work.
  status = cudaMemcpyAsync(known.planes, planes.data(), bytes, cudaMemcpyHostToDevice, stream);
  if (status == cudaSuccess) status = cudaStreamSynchronize(stream);
  if (status != cudaSuccess) {  // the next attempt allocates anew
    room_ = room;
    if (more_.size() > more) cudaFree(more_.back());
    more_.resize(more);
    return status;
  }
  *found = &known_.emplace(&cache, known).first->second;
  return cudaSuccess;
}

}  // namespace tokendepot::cuda
