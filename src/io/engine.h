// Moves pieces of files to and from memory, several at a time. Two implementations: threads with
// pread/pwrite, and io_uring. Which is faster is measured per root; neither is a win by itself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "tokendepot/error.h"

namespace tokendepot {

/// One transfer. Lives in the caller's memory, untouched by the caller until `done` is called.
struct IoOperation {
  int fd = -1;
  void* handle = nullptr;  // what a mover of its own knows the file by
  bool write = false;
  std::byte* buffer = nullptr;
  uint64_t offset = 0;
  uint32_t bytes = 0;  // at most 1 GiB
  /// Called once, on a thread of the engine: 0 when all bytes moved, else a positive errno; a transfer that
  /// meets the end of the file is ENODATA. Short transfers are continued by the engine. May call submit();
  /// must not wait for anything.
  void (*done)(IoOperation* self, int error) = nullptr;
  void* owner = nullptr;        // the caller's
  IoOperation* next = nullptr;  // the engine's queue link
};

class IoEngine {
 public:
  /// Waits for all operations: `done` has been called for each.
  virtual ~IoEngine() = default;
  /// Queues without blocking and without a bound of its own (callers bound what they submit); at most depth()
  /// operations are in the kernel at once. First in, first out.
  virtual void submit(IoOperation* operation) = 0;
  virtual const char* name() const = 0;  // "threads", "uring"
  /// Operations in the kernel at once, at most.
  virtual uint32_t depth() const = 0;
  /// Whether `done` runs on one thread of several: work in it delays no other operation's end.
  virtual bool completes_in_parallel() const = 0;
};

/// How the threads of an engine move bytes; pread and pwrite unless somebody says otherwise.
struct IoMover {
  /// On each thread before its first transfer; may be null.
  void (*enter)(void* context) = nullptr;
  /// One attempt at what is left of an operation of which `moved` bytes are done: bytes moved now, 0 at the
  /// end of the file, or a negative errno.
  int64_t (*move)(void* context, const IoOperation& operation, uint32_t moved) = nullptr;
  void* context = nullptr;
};
IoMover file_mover();

/// `depth` in 1..128 threads, or as many of them as the system grants; `busy` where it grants none.
Result<std::unique_ptr<IoEngine>> make_thread_engine(uint32_t depth, const IoMover& mover = file_mover());
/// `unsupported` or `permission` with the cause (errno and, where it explains it, kernel.io_uring_disabled);
/// `busy` where the system refuses the thread.
Result<std::unique_ptr<IoEngine>> make_uring_engine(uint32_t depth);

constexpr uint32_t kMoveBytes = 1u << 20;
/// Moves [offset, offset + bytes) of a file in pieces of kMoveBytes, at most `at_once` of them submitted and
/// not ended, and waits for them: 0 or the first errno, behind which none is begun. `pattern` names the file;
/// `bytes` is a multiple of them.
int move_and_wait(IoEngine& engine, const IoOperation& pattern, std::byte* buffer, uint64_t offset,
                  uint64_t bytes, size_t at_once = SIZE_MAX);

/// With `reads` reads of 1 MiB under way a file came at this many bytes a nanosecond.
struct ReadRate {
  uint32_t reads = 0;
  double rate = 0;
};
/// The fewest reads that come within 5 % of the fastest.
uint32_t fewest_reads(std::span<const ReadRate> measured);

struct EngineChoice {
  std::unique_ptr<IoEngine> engine;
  std::string reason;  // e.g. "threads 1.9 GB/s, uring 1.7 GB/s" or "io_uring: Operation not permitted
                       // (kernel.io_uring_disabled=2)"
  uint64_t read_bytes_per_second = 0;  // of the one that was taken; 0 = not measured
  /// Bytes of reads under way that the medium needs for its full rate; 0 = not measured. More only spread the
  /// memory that is read into, over more than the CPU's caches hold where the medium is fast
  /// (docs/decisions.md, 84).
  uint64_t enough_bytes = 0;
};
/// Reads a probe file of 32 MiB that it writes in `directory` (removed again, never left behind: unlinked
/// right after creation) with both engines and keeps the faster one; a difference under 10 % goes to threads.
/// With `count_reads` it then measures how few reads of 1 MiB are enough for that one: a quarter of its
/// depth, half of it or all, four at least. Not where that would take more than 0.1 s, nor where the file
/// would not keep all slots busy. Of no use where the page cache or a server's memory answers for the medium.
/// Takes at most about 0.4 s a root, and one more reading of the file on a medium that becomes slow
/// meanwhile. What is in the way of measuring is told as the reason for threads; `busy` where the system
/// refuses even those. `direct` = open with O_DIRECT.
Result<EngineChoice> choose_engine(const std::string& directory, bool direct, uint32_t depth,
                                   bool count_reads);

}  // namespace tokendepot
