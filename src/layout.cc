#include "tokendepot/layout.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <limits>
#include <string_view>

#include "base/errors.h"
#include "format/shape.h"

namespace tokendepot {
namespace {

// No user address space is larger; distances up to here add up without overflow.
constexpr uint64_t kMaxSpan = 1ull << 57;

struct Axis {
  std::string_view name;
  uint64_t count;
  int64_t stride;
};

uint64_t magnitude(int64_t stride) {
  return stride < 0 ? uint64_t{0} - static_cast<uint64_t>(stride) : static_cast<uint64_t>(stride);
}

// Cells of `cell_bytes` must not overlap, or a scatter would overwrite what it wrote before. Axes are taken
// from the shortest stride to the longest; each must step over all that the shorter ones cover.
template <size_t N>
Status check_axes(std::array<Axis, N> axes, uint64_t cell_bytes, size_t layer, size_t plane) {
  std::sort(axes.begin(), axes.end(),
            [](const Axis& a, const Axis& b) { return magnitude(a.stride) < magnitude(b.stride); });
  uint64_t covered = cell_bytes;
  for (const Axis& axis : axes) {
    if (axis.count < 2) continue;
    const uint64_t step = magnitude(axis.stride);
    if (step < covered) {
      return fail(ErrorKind::invalid_argument,
                  "{} of layer {} plane {} is {}, at least {} bytes are needed so that cells do not overlap",
                  axis.name, layer, plane, axis.stride, covered);
    }
    if (step > kMaxSpan / axis.count) {
      return fail(ErrorKind::invalid_argument,
                  "{} of layer {} plane {} is {}, {} steps of it leave the address space", axis.name, layer,
                  plane, axis.stride, axis.count);
    }
    covered += (axis.count - 1) * step;
  }
  return {};
}

Status check_canonical_layer(const PagedCache& cache, size_t layer) {
  const GroupShape& shape = cache.shape;
  const std::vector<Plane>& planes = cache.layers[layer];
  if (planes.size() != shape.planes) {
    return fail(ErrorKind::invalid_argument, "layer {} has {} planes, its shape says {}", layer,
                planes.size(), shape.planes);
  }
  for (size_t i = 0; i < planes.size(); ++i) {
    const Plane& plane = planes[i];
    if (plane.base == nullptr) {
      return fail(ErrorKind::invalid_argument, "base of layer {} plane {} is null, an address is needed",
                  layer, i);
    }
    const std::array axes = {Axis{"block_stride", cache.block_count, plane.block_stride},
                             Axis{"head_stride", shape.part.heads(), plane.head_stride},
                             Axis{"token_stride", shape.block_tokens, plane.token_stride}};
    if (Status ok = check_axes(axes, shape.row_bytes, layer, i); !ok) return ok;
  }
  return {};
}

Status check_opaque_layer(const PagedCache& cache, size_t layer) {
  uint64_t page_bytes = 0;
  const std::vector<Plane>& pieces = cache.layers[layer];
  for (size_t i = 0; i < pieces.size(); ++i) {
    const Plane& piece = pieces[i];
    if (piece.base == nullptr) {
      return fail(ErrorKind::invalid_argument, "base of layer {} piece {} is null, an address is needed",
                  layer, i);
    }
    if (piece.piece_bytes == 0) {
      return fail(ErrorKind::invalid_argument, "piece_bytes of layer {} piece {} is 0, at least 1 is needed",
                  layer, i);
    }
    page_bytes += piece.piece_bytes;
    const std::array axes = {Axis{"block_stride", cache.block_count, piece.block_stride}};
    if (Status ok = check_axes(axes, piece.piece_bytes, layer, i); !ok) return ok;
  }
  if (page_bytes != cache.shape.page_bytes) {
    return fail(ErrorKind::invalid_argument,
                "the pieces of layer {} have {} bytes a block, page_bytes says {}", layer, page_bytes,
                cache.shape.page_bytes);
  }
  return {};
}

}  // namespace

Status validate(const PagedCache& cache) {
  if (Status ok = check_shape(cache.shape); !ok) return ok;
  constexpr uint32_t kMaxBlocks = std::numeric_limits<int32_t>::max();
  if (cache.block_count < 1 || cache.block_count > kMaxBlocks) {
    return fail(ErrorKind::invalid_argument, "block_count is {}, allowed are 1 to {}", cache.block_count,
                kMaxBlocks);
  }
  if (cache.layers.size() != cache.shape.part.layers()) {
    return fail(ErrorKind::invalid_argument, "the cache describes {} layers, its part has {}",
                cache.layers.size(), cache.shape.part.layers());
  }
  for (size_t layer = 0; layer < cache.layers.size(); ++layer) {
    const Status ok = cache.shape.kind == LayoutKind::canonical ? check_canonical_layer(cache, layer)
                                                                : check_opaque_layer(cache, layer);
    if (!ok) return ok;
  }
  return {};
}

}  // namespace tokendepot
