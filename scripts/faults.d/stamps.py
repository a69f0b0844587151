"""A small paged KV cache whose every 512-byte sector says whose it is, so that wrong bytes name their origin.

A prompt is a number; its tokens, keys and bytes follow from it.
"""

from __future__ import annotations

import numpy as np
from tokendepot import GroupWant, KeyChain

LAYERS, PLANES, HEADS, BLOCK_TOKENS, CHUNK_TOKENS, ROW_BYTES = 2, 2, 2, 4, 8, 512
BLOCKS_PER_CHUNK = CHUNK_TOKENS // BLOCK_TOKENS
CHUNKS = 2  # of a prompt
BLOCKS = BLOCKS_PER_CHUNK * CHUNKS
EXTENT_BYTES = 4096 + LAYERS * PLANES * HEADS * CHUNK_TOKENS * ROW_BYTES
PART = (0, LAYERS, 0, HEADS)
WANT = GroupWant(0, "canonical", PART, CHUNK_TOKENS)
MANIFEST = '{"model":"faults"}'

_ROWS = LAYERS * PLANES * BLOCKS * HEADS * BLOCK_TOKENS
_WORDS = ROW_BYTES // 8
_SHAPE = (LAYERS, PLANES, BLOCKS, HEADS, BLOCK_TOKENS, _WORDS)
_POISON = np.uint64(0xA5A5A5A5A5A5A5A5)


def bytes_of(prompt: int) -> np.ndarray:
    """[layer][plane][block][head][token][8-byte word]: word 0 is the prompt, word 1 the number of the sector, the rest noise."""
    rows = np.arange(_ROWS, dtype=np.uint64)[:, None]
    words = np.arange(_WORDS, dtype=np.uint64)[None, :]
    x = np.uint64(prompt) * np.uint64(0x9E3779B97F4A7C15) + rows * np.uint64(0xD1B54A32D192ED03) + words
    x ^= x >> np.uint64(31)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(29)
    x[:, 0] = prompt
    x[:, 1] = np.arange(_ROWS, dtype=np.uint64)
    return x.reshape(_SHAPE)


def keys_of(namespace: bytes, prompt: int) -> bytes:
    chain = KeyChain(namespace, CHUNK_TOKENS)
    chain.append([(prompt >> 16) & 0xFFFF, prompt & 0xFFFF] + list(range(CHUNKS * CHUNK_TOKENS - 2)))
    return chain.keys()


def first_difference(found: np.ndarray, prompt: int, chunks: range) -> str | None:
    """None where these chunks of the cache (of one prompt) are the prompt's bytes; else which sector holds what."""
    blocks = slice(chunks.start * BLOCKS_PER_CHUNK, chunks.stop * BLOCKS_PER_CHUNK)
    expected = bytes_of(prompt)[:, :, blocks]
    different = (found[:, :, blocks] != expected).any(axis=-1)
    if not different.any():
        return None
    at = tuple(int(i[0]) for i in np.nonzero(different))
    stamp = found[:, :, blocks][at]
    held = "what was there before" if stamp[0] == _POISON else f"prompt {int(stamp[0])} sector {int(stamp[1])}"
    return (
        f"prompt {prompt}: {int(different.sum())} sectors differ, the first at layer, plane, block, head, token {at}: "
        f"expected sector {int(expected[at][1])} of it, found the stamp of {held}"
    )


class Cache:
    """[layer][plane][block][head][token][word] for one prompt."""

    def __init__(self) -> None:
        self.data = np.full(_SHAPE, _POISON, np.uint64)

    def lend_to(self, depot) -> None:
        _, _, block, head, token, _ = self.data.strides
        layers = [[(plane.ctypes.data, block, head, token, 0) for plane in layer] for layer in self.data]
        depot.attach(
            group=0,
            kind="canonical",
            part=PART,
            tokens=CHUNK_TOKENS,
            block_tokens=BLOCK_TOKENS,
            block_count=BLOCKS,
            row_bytes=ROW_BYTES,
            layers=layers,
        )

    def fill(self, prompt: int) -> None:
        self.data[:] = bytes_of(prompt)

    def clear(self) -> None:
        self.data.fill(_POISON)
