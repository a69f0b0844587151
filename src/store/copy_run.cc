#include "store/copy_run.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <span>

#include "base/errors.h"
#include "tokendepot/layout.h"

namespace tokendepot {
namespace {

constexpr uint64_t kPiece = 4ull << 20;

}  // namespace

Status copy_run(const File& source, const File& target, uint64_t offset, uint64_t bytes,
                const std::function<bool()>& go_on) {
  if (bytes == 0) return {};
  const std::unique_ptr<std::byte, void (*)(void*)> memory(
      static_cast<std::byte*>(std::aligned_alloc(kPageBytes, std::min(kPiece, bytes))), &std::free);
  for (const uint64_t end = offset + bytes; offset < end;) {
    if (go_on && !go_on()) return fail(ErrorKind::closed, "the depot is closing");
    const std::span<std::byte> piece(memory.get(), std::min(kPiece, end - offset));
    if (auto read = source.read_at(piece, offset); !read) return read;
    if (auto written = target.write_at(piece, offset); !written) return written;
    offset += piece.size();
  }
  return {};
}

}  // namespace tokendepot
