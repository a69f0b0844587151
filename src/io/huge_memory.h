// Memory that files are read into and written from.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tokendepot {

/// Anonymous memory of whole 4 KiB pages, aligned to 2 MiB and asked for in pages of that size: the kernel
/// hands a disk its buffer page by page, and a read of 1 MiB into one page instead of 256 costs a third of
/// the CPU and, on virtual disks, less than half of the time. Only address space until it is touched.
/// munmap() gives it back. nullptr with errno where the system refuses.
std::byte* map_huge_memory(uint64_t bytes);

}  // namespace tokendepot
