// What a medium gives without a depot: plain O_DIRECT reads and writes of one preallocated file, and plain
// copies to and from one mapped file of a memory file system.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "io/file.h"
#include "io/mapping.h"
#include "io/scratch_file.h"
#include "tokendepot/error.h"

namespace tokendepot {

enum class Traffic : uint8_t { read, write, mixed };  // mixed: every other piece
enum class Pages : uint8_t { plain, huge };

/// Touched memory of random bytes, as malloc gives it or asked for in pages of 2 MiB.
class ControlBuffer {
 public:
  static Result<std::unique_ptr<ControlBuffer>> make(uint64_t bytes, Pages pages);
  ~ControlBuffer();
  ControlBuffer(const ControlBuffer&) = delete;
  ControlBuffer& operator=(const ControlBuffer&) = delete;
  std::byte* data() const { return data_; }

 private:
  ControlBuffer(std::byte* data, uint64_t bytes) : data_(data), bytes_(bytes) {}
  std::byte* data_;
  uint64_t bytes_;
};

/// One preallocated and written file, read and written in pieces of an extent's size. Not thread-safe.
class RawControl {
 public:
  /// Makes the file in `directory`; it has no name, so nothing is left behind. O_DIRECT where that is
  /// possible.
  static Result<std::unique_ptr<RawControl>> make(const std::string& directory, uint64_t piece,
                                                  size_t pieces);

  /// GB/s of `depth` threads that touch pieces in random order, all before any again and from where the call
  /// before ended, until `seconds` are over; each piece once where `seconds` is 0. Without O_DIRECT each is
  /// touched once whatever `seconds` says, or written until then.
  Result<double> run(size_t depth, Traffic traffic, Pages pages, double seconds = 0);
  /// Seconds of `depth` threads that read `pieces` pieces.
  Result<double> seconds_of(size_t depth, size_t pieces);
  /// GB/s of one thread that reads piece after piece, each through io_uring in parts of `part` bytes at once,
  /// into huge pages; 0 where there is no io_uring.
  Result<double> run_split(uint64_t part);
  bool direct() const { return direct_; }

 private:
  struct Moved {
    uint64_t pieces = 0;
    double seconds = 0;
  };
  RawControl(ScratchFile file, bool direct, uint64_t piece, size_t pieces)
      : file_(std::move(file)), direct_(direct), piece_(piece), pieces_(pieces) {}
  Result<Moved> move(size_t depth, Traffic traffic, Pages pages, size_t least, double seconds);
  std::vector<size_t> shuffled();

  ScratchFile file_;
  bool direct_;
  uint64_t piece_;
  size_t pieces_;
  std::vector<size_t> order_;
  size_t first_ = 0;  // of order_, which the next call begins with
  std::vector<std::unique_ptr<ControlBuffer>> plain_;
  std::vector<std::unique_ptr<ControlBuffer>> huge_;
  std::mt19937 random_{5};
};

/// Threads of memcpy between memory and one mapped file. Not thread-safe.
class CopyControl {
 public:
  /// Makes a file of `bytes` in `directory`, mapped and touched; its name is gone when this returns.
  static Result<std::unique_ptr<CopyControl>> make(const std::string& directory, uint64_t bytes);

  /// GB/s of `threads` threads that copy pieces of `piece` bytes between the file and `memory`, which has at
  /// least `bytes` bytes, until `seconds` are over; the whole file at least once.
  Result<double> run(std::byte* memory, uint64_t bytes, uint64_t piece, size_t threads, Traffic traffic,
                     double seconds);

 private:
  CopyControl(File file, Mapping mapping) : file_(std::move(file)), mapping_(std::move(mapping)) {}
  File file_;
  Mapping mapping_;
};

}  // namespace tokendepot
