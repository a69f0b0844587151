// Stands in for NVIDIA's cuFile: the same symbols, moving bytes with pread and pwrite between files and host
// memory that plays the GPU's.
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <map>
#include <mutex>
#include <new>

#include "control.h"

namespace {

using tokendepot::testing::FakeCuFileControl;

struct CuError {
  int code;
  int cuda;
};
struct CuDescriptor {
  int type;
  union {
    int fd;
    void* other;
  } file;
  const void* operations;
};
struct CuProperties {
  unsigned driver_major, driver_minor;
  size_t poll_threshold, most_direct_bytes;
  unsigned file_systems, control;
};

constexpr int kNoDriver = 5001;
constexpr int kInvalid = 5022;
constexpr int kInvalidFlag = 5019;
constexpr int kLargeFile = 0100000;  // what the kernel adds; O_LARGEFILE itself is 0 on 64 bits
constexpr int kAlreadyOpen = 5026;
constexpr unsigned kAllowCompatBit = 1u << 1;
[[maybe_unused]] constexpr int kParamAllowCompat = 1;
[[maybe_unused]] constexpr int kParamForceCompat = 2;

struct Library {
  FakeCuFileControl control;
  std::mutex mutex;
  bool open = false;
  bool allow_compat = true;
  const char* buffer = nullptr;
  size_t buffer_bytes = 0;
  std::map<void*, int> files;
  uintptr_t next_handle = 0x1000;
};
Library& library() {
  static Library library;
  return library;
}

/// Takes one of the failures that are due.
bool due(std::atomic<int>& failures) {
  int left = failures.load();
  while (left > 0 && !failures.compare_exchange_weak(left, left - 1)) {
  }
  return left != 0;
}

ssize_t failure() {
  const int with = library().control.fail_with;
  if (with > 5000) return -with;
  errno = with;
  return -1;
}

/// The descriptor, or -1 when the call is not as the documentation wants it.
int check(void* handle, const void* base, size_t bytes, off_t at) {
  Library& self = library();
  const std::lock_guard lock(self.mutex);
  const auto file = self.files.find(handle);
  const bool inside = self.buffer == nullptr || (base == self.buffer && at >= 0 &&
                                                 static_cast<size_t>(at) + bytes <= self.buffer_bytes);
  if (self.open && file != self.files.end() && inside) return file->second;
  ++self.control.wrong_calls;
  return -1;
}

size_t limited(size_t bytes) {
  const size_t most = library().control.most_bytes;
  return most != 0 && bytes > most ? most : bytes;
}

}  // namespace

extern "C" {

FakeCuFileControl* fake_cufile_control() {
  return &library().control;
}

void fake_cufile_reset() {
  Library& self = library();
  self.~Library();
  new (&self) Library;
}

#ifndef FAKE_OLD
CuError cuFileSetParameterBool(int parameter, bool value) {
  Library& self = library();
  if (self.open) return {kAlreadyOpen, 0};
  if (parameter == kParamAllowCompat) self.allow_compat = value;
  return {0, 0};
}
CuError cuFileGetParameterBool(int parameter, bool* value) {
  *value = parameter == kParamForceCompat && library().control.forces_compat;
  return {0, 0};
}
CuError cuFileGetVersion(int* version) {
  *version = 1200;
  return {0, 0};
}
#endif

CuError cuFileDriverOpen() {
  Library& self = library();
  if (self.open) return {kAlreadyOpen, 0};
  if (self.control.refuse_driver != 0) return {self.control.refuse_driver, 0};
  if (!self.control.point_to_point && !self.allow_compat) return {kNoDriver, 0};
  self.open = true;
  return {0, 0};
}

CuError cuFileDriverGetProperties(CuProperties* properties) {
  const Library& self = library();
  const bool compat = self.allow_compat || self.control.keeps_compat;
  properties->control = compat ? kAllowCompatBit : 0;
  return {0, 0};
}

CuError cuFileHandleRegister(void** handle, CuDescriptor* descriptor) {
  Library& self = library();
  if (self.control.refuse_files != 0) return {self.control.refuse_files, 0};
  if (descriptor->type != 1) return {kInvalid, 0};
  // As the real one: what it does not know of how a file was opened, it refuses.
  constexpr int kKnown = O_ACCMODE | O_DIRECT | O_CLOEXEC | kLargeFile;
  const int flags = fcntl(descriptor->file.fd, F_GETFL);
  if (flags < 0 || (flags & ~kKnown) != 0) return {kInvalidFlag, 0};
  const std::lock_guard lock(self.mutex);
  *handle = reinterpret_cast<void*>(self.next_handle++);
  self.files.emplace(*handle, descriptor->file.fd);
  ++self.control.open_files;
  return {0, 0};
}

void cuFileHandleDeregister(void* handle) {
  Library& self = library();
  const std::lock_guard lock(self.mutex);
  if (self.files.erase(handle) == 1) {
    --self.control.open_files;
  } else {
    ++self.control.wrong_calls;
  }
}

CuError cuFileBufRegister(const void* base, size_t bytes, int /*flags*/) {
  Library& self = library();
  if (self.control.refuse_buffers != 0) return {self.control.refuse_buffers, 0};
  self.buffer = static_cast<const char*>(base);
  self.buffer_bytes = bytes;
  ++self.control.registered_buffers;
  return {0, 0};
}

CuError cuFileBufDeregister(const void* base) {
  Library& self = library();
  if (base != self.buffer) return {kInvalid, 0};
  self.buffer = nullptr;
  --self.control.registered_buffers;
  return {0, 0};
}

ssize_t cuFileRead(void* handle, void* base, size_t bytes, off_t file_offset, off_t buffer_offset) {
  FakeCuFileControl& control = library().control;
  const int fd = check(handle, base, bytes, buffer_offset);
  if (fd < 0) return -kInvalid;
  ++control.reads_begun;
  if (const int delay = control.read_delay_us; delay > 0) usleep(static_cast<useconds_t>(delay));
  if (due(control.fail_reads)) return failure();
  char* const into = static_cast<char*>(base) + buffer_offset;
  const ssize_t got = pread(fd, into, limited(bytes), file_offset);
  if (got > 0) control.read_bytes += static_cast<uint64_t>(got);
  if (got > 0 && control.damage_reads) into[got / 2] ^= 4;
  return got;
}

#ifndef FAKE_BROKEN
ssize_t cuFileWrite(void* handle, const void* base, size_t bytes, off_t file_offset, off_t buffer_offset) {
  FakeCuFileControl& control = library().control;
  const int fd = check(handle, base, bytes, buffer_offset);
  if (fd < 0) return -kInvalid;
  if (due(control.fail_writes)) return failure();
  const ssize_t got = pwrite(fd, static_cast<const char*>(base) + buffer_offset, limited(bytes), file_offset);
  if (got > 0) control.written_bytes += static_cast<uint64_t>(got);
  return got;
}
#endif
}
