// Memory in large pages: what files are read into and written from, and tables that are read at random.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

namespace tokendepot {

/// Anonymous memory of whole 4 KiB pages, aligned to 2 MiB and asked for in pages of that size: the kernel
/// hands a disk its buffer page by page, and a read of 1 MiB into one page instead of 256 costs a third of
/// the CPU and, on virtual disks, less than half of the time. Only address space until it is touched.
/// munmap() gives it back. nullptr with errno where the system refuses.
std::byte* map_huge_memory(uint64_t bytes);

/// For standard containers: from 2 MiB on in memory of map_huge_memory(), where one entry of the TLB reaches
/// 512 times as far. A random read of a table of 500 MB costs half the time there.
template <typename T>
struct HugeAllocator {
  using value_type = T;
  HugeAllocator() = default;
  template <typename U>
  explicit HugeAllocator(const HugeAllocator<U>& /*other*/) {}

  T* allocate(size_t count) {
    if (!is_huge(count)) return static_cast<T*>(::operator new(count * sizeof(T)));
    std::byte* const memory = map_huge_memory(whole_pages(count));
    if (memory == nullptr) throw std::bad_alloc();
    return reinterpret_cast<T*>(memory);
  }
  void deallocate(T* memory, size_t count) {
    if (!is_huge(count)) return ::operator delete(memory);
    ::munmap(memory, whole_pages(count));
  }
  bool operator==(const HugeAllocator& /*other*/) const { return true; }

 private:
  static bool is_huge(size_t count) { return count >= (2u << 20) / sizeof(T); }
  static uint64_t whole_pages(size_t count) { return (count * sizeof(T) + 4095) / 4096 * 4096; }
};

}  // namespace tokendepot
