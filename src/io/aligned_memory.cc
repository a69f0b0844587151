#include "io/aligned_memory.h"

#include "base/errors.h"

namespace tokendepot {

Result<AlignedMemory> aligned_memory(uint64_t alignment, uint64_t bytes, std::string_view purpose) {
  AlignedMemory memory(static_cast<std::byte*>(std::aligned_alloc(alignment, bytes)));
  if (memory == nullptr) {
    return fail(ErrorKind::busy,
                "the system refused {} bytes of memory for {}; check the limits of address space (ulimit -v) "
                "and of memory",
                bytes, purpose);
  }
  return memory;
}

}  // namespace tokendepot
