#include "format/shape.h"

#include "base/errors.h"

namespace tokendepot {
namespace {

// An empty Status when rows * bytes, padded, times shards stays within the bound. Divides, so that it cannot
// overflow.
Status check_payload(uint64_t rows, uint64_t bytes, uint64_t shards) {
  if (rows > kMaxPayloadBytes / bytes || align_up(rows * bytes) > kMaxPayloadBytes / shards) {
    return fail(ErrorKind::invalid_argument,
                "payload of {} shards of {} times {} bytes is too large, at most {} bytes are allowed",
                shards, rows, bytes, kMaxPayloadBytes);
  }
  return {};
}

Status check_kind_fields(const GroupShape& shape) {
  if (shape.kind == LayoutKind::canonical) {
    if (shape.planes < 1 || shape.planes > 2) {
      return fail(ErrorKind::invalid_argument, "planes is {}, a canonical layout has 1 or 2", shape.planes);
    }
    if (shape.row_bytes < 1 || shape.row_bytes > kMaxRowBytes) {
      return fail(ErrorKind::invalid_argument, "row_bytes is {}, a canonical layout needs 1 to {}",
                  shape.row_bytes, kMaxRowBytes);
    }
    if (shape.page_bytes != 0) {
      return fail(ErrorKind::invalid_argument, "page_bytes is {}, a canonical layout needs 0",
                  shape.page_bytes);
    }
    return check_payload(uint64_t{shape.part.layers()} * shape.planes * shape.tokens, shape.row_bytes,
                         shape.part.heads());
  }
  if (shape.planes > 2) {
    return fail(ErrorKind::invalid_argument, "planes is {}, an opaque layout needs 0 to 2", shape.planes);
  }
  if (shape.page_bytes < 1 || shape.page_bytes > kMaxRowBytes) {
    return fail(ErrorKind::invalid_argument, "page_bytes is {}, an opaque layout needs 1 to {}",
                shape.page_bytes, kMaxRowBytes);
  }
  if (shape.row_bytes != 0) {
    return fail(ErrorKind::invalid_argument, "row_bytes is {}, an opaque layout needs 0", shape.row_bytes);
  }
  if (shape.part.heads() != 1) {
    return fail(ErrorKind::invalid_argument,
                "heads are {} to {}, an opaque layout needs exactly one (its rank)", shape.part.head_begin,
                shape.part.head_end);
  }
  return check_payload(shape.blocks(), shape.page_bytes, shape.part.layers());
}

}  // namespace

Status check_shape(const GroupShape& shape) {
  if (shape.kind != LayoutKind::canonical && shape.kind != LayoutKind::opaque) {
    return fail(ErrorKind::invalid_argument, "layout kind is {}, allowed are 1 (canonical) and 2 (opaque)",
                static_cast<unsigned>(shape.kind));
  }
  const Part& part = shape.part;
  if (part.layer_begin >= part.layer_end) {
    return fail(ErrorKind::invalid_argument, "layers are {} to {}, at least one is needed", part.layer_begin,
                part.layer_end);
  }
  if (part.head_begin >= part.head_end) {
    return fail(ErrorKind::invalid_argument, "heads are {} to {}, at least one is needed", part.head_begin,
                part.head_end);
  }
  if (shape.tokens < 1 || shape.tokens > kMaxTokens) {
    return fail(ErrorKind::invalid_argument, "tokens is {}, allowed are 1 to {}", shape.tokens, kMaxTokens);
  }
  if (shape.block_tokens < 1 || shape.tokens % shape.block_tokens != 0) {
    return fail(ErrorKind::invalid_argument, "block_tokens is {}, it must divide the {} tokens of an extent",
                shape.block_tokens, shape.tokens);
  }
  return check_kind_fields(shape);
}

}  // namespace tokendepot
