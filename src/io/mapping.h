// Memory-mapped files, and a guard that turns a truncated or failing mapping into an error instead of a dead
// process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "io/file.h"
#include "tokendepot/error.h"

namespace tokendepot {

/// A whole file mapped shared. Move-only; unmaps in the destructor.
class Mapping {
 public:
  Mapping() = default;
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;
  ~Mapping();

  /// Maps [0, bytes) of the file. `writable` needs a file opened for writing. Fails when the file is shorter.
  static Result<Mapping> map(const File& file, uint64_t bytes, bool writable);

  /// Makes the pages present for writing now, so that the first store does not pay a fault a page. Best
  /// effort.
  void populate() const;

  std::byte* data() const { return data_; }
  uint64_t size() const { return size_; }
  bool is_mapped() const { return data_ != nullptr; }

 private:
  std::byte* data_ = nullptr;
  uint64_t size_ = 0;
};

/// Runs `body` while SIGBUS on addresses inside `guarded` makes this function return false instead of killing
/// the process (the file behind the mapping was truncated, or its medium failed). `body` must own nothing
/// that needs a destructor and must not lock: it is left by a jump. Other SIGBUS go to the handler installed
/// before. Nests per thread up to 4 ranges; thread-safe. The first use installs a SIGBUS handler for the
/// process that chains.
using GuardedBody = void (*)(void* context);
bool run_guarded(std::span<const std::byte> guarded, GuardedBody body, void* context);

template <typename F>
bool guard_mapping(std::span<const std::byte> guarded, F& body) {
  return run_guarded(guarded, [](void* context) { (*static_cast<F*>(context))(); }, &body);
}

}  // namespace tokendepot
