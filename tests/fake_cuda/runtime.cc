// The calls of the CUDA runtime that the device and its tests make.
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "fake_cuda/faults.h"
#include "fake_cuda/stream.h"

namespace tokendepot::testing::fake_cuda {
namespace {

constexpr int kDevices = 2;
constexpr size_t kMemoryOfEach = size_t{16} << 30;

struct Range {
  size_t bytes = 0;
  int device = 0;
};

struct Order {
  uint64_t first = 0;
  uint64_t last = 0;
  cudaError_t status = cudaSuccess;
  uint64_t calls = 0;
};

struct World {
  std::mutex mutex;
  std::map<uintptr_t, Range> device_memory;
  std::map<uintptr_t, Range> pinned;
  int captures = 0;  // streams being captured in the mode that forbids unsafe calls of all threads
  bool capture_is_spoilt = false;
  std::map<std::string, Order> orders;
};

World& world() {
  static auto* const one = new World;  // outlives threads that end late
  return *one;
}

std::atomic<bool> copies_are_held = false;
thread_local int current_device = 0;
thread_local uint64_t times_set = 0;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t noted(cudaError_t status) {
  if (status != cudaSuccess) last_error = status;
  return status;
}

CUstream_st& stream_of(cudaStream_t stream) {
  static auto* const of_default = new CUstream_st;
  return stream == nullptr ? *of_default : *stream;
}

const Range* find(const std::map<uintptr_t, Range>& ranges, const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  auto after = ranges.upper_bound(address);
  if (after == ranges.begin()) return nullptr;
  --after;
  return address < after->first + after->second.bytes ? &after->second : nullptr;
}

/// What a thread must not do while some stream is captured, unless it has said that it knows.
cudaError_t unsafe(const char* name) {
  if (const cudaError_t failed = called(name); failed != cudaSuccess) return failed;
  const std::lock_guard lock(world().mutex);
  if (world().captures == 0 || capture_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  world().capture_is_spoilt = true;
  return noted(cudaErrorStreamCaptureUnsupported);
}

}  // namespace

void fail(const std::string& call, uint64_t nth, cudaError_t status, uint64_t more) {
  const std::lock_guard lock(world().mutex);
  world().orders[call] = {nth, nth + more, status};
}

uint64_t stop_failing() {
  const std::lock_guard lock(world().mutex);
  uint64_t calls = 0;
  for (const auto& [call, order] : world().orders) calls += order.calls;
  world().orders.clear();
  return calls;
}

uint64_t devices_set() {
  return times_set;
}

void hold_copies() {
  copies_are_held = true;
}

void let_copies_go() {
  copies_are_held = false;
  copies_are_held.notify_all();
}

cudaError_t called(const char* name) {
  const std::lock_guard lock(world().mutex);
  const auto found = world().orders.find(name);
  if (found == world().orders.end()) return cudaSuccess;
  Order& order = found->second;
  const uint64_t call = ++order.calls;
  return call >= order.first && call <= order.last ? noted(order.status) : cudaSuccess;
}

}  // namespace tokendepot::testing::fake_cuda

namespace fake = tokendepot::testing::fake_cuda;
using fake::called, fake::noted, fake::stream_of, fake::unsafe, fake::world;

#define RETURN_IF_FAILED(call)                                                 \
  do {                                                                         \
    if (const cudaError_t failed = call; failed != cudaSuccess) return failed; \
  } while (false)

extern "C" {

// --- devices and errors ------------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int* count) {
  *count = fake::kDevices;
  return called("cudaGetDeviceCount");
}

cudaError_t cudaGetDevice(int* device) {
  *device = fake::current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  RETURN_IF_FAILED(called("cudaSetDevice"));
  if (device < 0 || device >= fake::kDevices) return noted(cudaErrorInvalidDevice);
  fake::current_device = device;
  ++fake::times_set;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  stream_of(nullptr).wait();
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char*, int, int) {
  return noted(cudaErrorNotSupported);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 0;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  return std::exchange(fake::last_error, cudaSuccess);
}
const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess ? "no error" : "a failure of the stand-in";
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, fake::capture_mode);
  return cudaSuccess;
}

// --- memory ------------------------------------------------------------------------------------------------

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  RETURN_IF_FAILED(called("cudaMemGetInfo"));
  const std::lock_guard lock(world().mutex);
  *total = *free = fake::kMemoryOfEach;
  for (const auto& [at, range] : world().device_memory) {
    if (range.device == fake::current_device) *free -= range.bytes;
  }
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  RETURN_IF_FAILED(unsafe("cudaMalloc"));
  size_t free = 0;
  size_t total = 0;
  RETURN_IF_FAILED(cudaMemGetInfo(&free, &total));
  if (bytes > free || ::posix_memalign(memory, 4096, bytes) != 0) return noted(cudaErrorMemoryAllocation);
  const std::lock_guard lock(world().mutex);
  world().device_memory[reinterpret_cast<uintptr_t>(*memory)] = {bytes, fake::current_device};
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  RETURN_IF_FAILED(unsafe("cudaFree"));
  if (memory == nullptr) return cudaSuccess;
  {
    const std::lock_guard lock(world().mutex);
    if (world().device_memory.erase(reinterpret_cast<uintptr_t>(memory)) == 0)
      return noted(cudaErrorInvalidValue);
  }
  ::free(memory);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  RETURN_IF_FAILED(unsafe("cudaHostAlloc"));
  if (::posix_memalign(memory, 4096, bytes) != 0) return noted(cudaErrorMemoryAllocation);
  const std::lock_guard lock(world().mutex);
  world().pinned[reinterpret_cast<uintptr_t>(*memory)] = {bytes, 0};
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* memory) {
  RETURN_IF_FAILED(unsafe("cudaFreeHost"));
  {
    const std::lock_guard lock(world().mutex);
    if (world().pinned.erase(reinterpret_cast<uintptr_t>(memory)) == 0) return noted(cudaErrorInvalidValue);
  }
  ::free(memory);
  return cudaSuccess;
}

cudaError_t cudaHostRegister(void* memory, size_t bytes, unsigned) {
  RETURN_IF_FAILED(unsafe("cudaHostRegister"));
  const std::lock_guard lock(world().mutex);
  const auto address = reinterpret_cast<uintptr_t>(memory);
  const auto after = world().pinned.lower_bound(address);
  const bool meets_next = after != world().pinned.end() && after->first < address + bytes;
  if (meets_next || fake::find(world().pinned, memory) != nullptr)
    return noted(cudaErrorHostMemoryAlreadyRegistered);
  world().pinned[address] = {bytes, 0};
  return cudaSuccess;
}

cudaError_t cudaHostUnregister(void* memory) {
  RETURN_IF_FAILED(unsafe("cudaHostUnregister"));
  const std::lock_guard lock(world().mutex);
  return world().pinned.erase(reinterpret_cast<uintptr_t>(memory)) == 1
             ? cudaSuccess
             : noted(cudaErrorHostMemoryNotRegistered);
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  const std::lock_guard lock(world().mutex);
  *attributes = {};
  attributes->type = cudaMemoryTypeUnregistered;
  if (const fake::Range* range = fake::find(world().device_memory, pointer); range != nullptr) {
    attributes->type = cudaMemoryTypeDevice;
    attributes->device = range->device;
  }
  return cudaSuccess;
}

// --- streams -----------------------------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  RETURN_IF_FAILED(called("cudaStreamCreateWithFlags"));
  *stream = new CUstream_st;
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  RETURN_IF_FAILED(called("cudaStreamSynchronize"));
  stream_of(stream).wait();
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  RETURN_IF_FAILED(called("cudaStreamWaitEvent"));
  stream_of(stream).queue(
      [reached = event->reached, record = event->reached->recorded()] { reached->wait(record); });
  return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  stream_of(stream).queue([=] { function(data); });
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  RETURN_IF_FAILED(called("cudaMemcpyAsync"));
  stream_of(stream).queue([=] {
    fake::copies_are_held.wait(true);
    std::memcpy(to, from, bytes);
  });
  return cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t stream) {
  RETURN_IF_FAILED(called("cudaMemcpy2DAsync"));
  stream_of(stream).queue([=] {
    for (size_t row = 0; row < height; ++row)
      std::memcpy(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch,
                  width);
  });
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  RETURN_IF_FAILED(called("cudaMemsetAsync"));
  stream_of(stream).queue([=] { std::memset(memory, value, bytes); });
  return cudaSuccess;
}

// The tests' own calls, which wait: never ordered to fail.

cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                         size_t height, cudaMemcpyKind) {
  stream_of(nullptr).wait();
  for (size_t row = 0; row < height; ++row)
    std::memcpy(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch,
                width);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return cudaMemcpy2D(to, bytes, from, bytes, bytes, 1, kind);
}

cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
  stream_of(nullptr).wait();
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

// --- events ------------------------------------------------------------------------------------------------

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  RETURN_IF_FAILED(called("cudaEventCreateWithFlags"));
  *event = new CUevent_st;
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  RETURN_IF_FAILED(called("cudaEventRecord"));
  stream_of(stream).queue(
      [reached = event->reached, record = event->reached->record()] { reached->reach(record); });
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  RETURN_IF_FAILED(unsafe("cudaEventQuery"));
  return event->reached->has(event->reached->recorded()) ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  RETURN_IF_FAILED(called("cudaEventSynchronize"));
  event->reached->wait(event->reached->recorded());
  return cudaSuccess;
}

// --- capture into graphs -----------------------------------------------------------------------------------

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  const std::lock_guard lock(world().mutex);
  stream->capturing = true;
  if (mode == cudaStreamCaptureModeGlobal) ++world().captures;
  world().capture_is_spoilt = false;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  const std::lock_guard lock(world().mutex);
  stream->capturing = false;
  world().captures = 0;
  *graph = reinterpret_cast<cudaGraph_t>(&world());  // nobody looks into it
  return world().capture_is_spoilt ? noted(cudaErrorStreamCaptureInvalidated) : cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  RETURN_IF_FAILED(called("cudaStreamIsCapturing"));
  const std::lock_guard lock(world().mutex);
  *status =
      stream != nullptr && stream->capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return stream == nullptr && world().captures > 0 ? noted(cudaErrorStreamCaptureImplicit) : cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t) {
  return cudaSuccess;
}

}  // extern "C"
