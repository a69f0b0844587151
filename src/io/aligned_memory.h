// Memory at addresses that direct I/O accepts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string_view>

#include "tokendepot/error.h"

namespace tokendepot {

struct FreeAligned {
  void operator()(std::byte* memory) const { std::free(memory); }
};
using AlignedMemory = std::unique_ptr<std::byte, FreeAligned>;

/// `bytes` is a multiple of `alignment`, a power of two. `busy` where the system refuses them; `purpose` as
/// in "a probe of direct I/O". Not `no_space`, which is about file systems.
Result<AlignedMemory> aligned_memory(uint64_t alignment, uint64_t bytes, std::string_view purpose);

}  // namespace tokendepot
