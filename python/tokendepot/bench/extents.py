"""What a chunk of KV takes in a paged cache and on a medium, and how segments are cut: sizes in bytes, no arrays."""

from __future__ import annotations

from dataclasses import dataclass

from .shapes import Shape, element_bytes

PAGE_BYTES = 4096
MIB = 1 << 20
HEADER_BYTES = PAGE_BYTES  # up to 480 shards (docs/format.md, "Extent")
ENGINE_BLOCK_TOKENS = 16
# What "segment": "auto" means to the engine (src/store/root.cc, default_segment_bytes and fit_extent).
SEGMENTS_PER_ROOT, SMALLEST_SEGMENT, LARGEST_SEGMENT = 256, 1 * MIB, 256 * MIB


class SizeError(ValueError):
    """A size that cannot be used, in one sentence for the user."""


@dataclass(frozen=True)
class Geometry:
    """How a chunk lies in a paged cache: [layer][plane][block][token][head][row], as engines keep it; a shard is a head."""

    layers: int
    planes: int
    heads: int
    tokens: int
    row_bytes: int

    @property
    def extent_bytes(self) -> int:
        return extent_bytes(self.layers * self.planes * self.tokens * self.row_bytes, self.heads)

    @staticmethod
    def of_model(shape: Shape, dtype: str, chunk_tokens: int, layers: int) -> Geometry:
        """`layers` of a model's layers: fewer make chunks smaller and leave the size of their pieces as it is."""
        return Geometry(layers, shape.planes, shape.kv_heads, chunk_tokens, shape.head_dim * element_bytes(dtype))

    @staticmethod
    def of_bytes(chunk_bytes: int) -> Geometry:
        """One layer and head of ENGINE_BLOCK_TOKENS tokens that make up so many bytes.

        Raises:
            SizeError: not a multiple of 4096.
        """
        if chunk_bytes < PAGE_BYTES or chunk_bytes % PAGE_BYTES:
            raise SizeError(f"block of {chunk_bytes} bytes: expected a multiple of {PAGE_BYTES}")
        return Geometry(1, 2, 1, ENGINE_BLOCK_TOKENS, chunk_bytes // (2 * ENGINE_BLOCK_TOKENS))


def extent_bytes(shard_bytes: int, shards: int) -> int:
    """Header, and each shard in whole pages: what an extent takes of a segment."""
    return HEADER_BYTES + shards * (-(-shard_bytes // PAGE_BYTES) * PAGE_BYTES)


def automatic_segment_bytes(capacity_bytes: int, extent: int) -> int:
    """The size of segments in a root of this capacity that is told none: a whole number of extents."""
    usual = min(max(capacity_bytes // SEGMENTS_PER_ROOT // MIB * MIB, SMALLEST_SEGMENT), LARGEST_SEGMENT)
    whole = -(-usual // extent) * extent
    return whole if whole <= capacity_bytes // 3 else max(usual, extent)
