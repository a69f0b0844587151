"""Hits of an LRU cache at every capacity from one pass over a trace.

Method: stack distances (Mattson, Gecsei, Slutz, Traiger: Evaluation techniques for storage hierarchies, IBM Systems
Journal 9(2), 1970). A block is in an LRU cache of c blocks when at most c - 1 others were used since its last use. A
prefix hit needs all blocks before it, too, so a block's `needed` capacity is the largest distance up to it in its prompt.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .traces import Trace

NEVER = np.iinfo(np.int64).max  # no capacity makes this a hit


def needed_capacities(trace: Trace) -> NDArray[np.int64]:
    """For each reference to a block, in order: the smallest LRU capacity, in blocks, at which it is a prefix hit."""
    lengths = np.fromiter((len(request.blocks) for request in trace.requests), np.int64, len(trace.requests))
    blocks = np.fromiter((block for request in trace.requests for block in request.blocks), np.int64, int(lengths.sum()))
    return _running_max(stack_distances(blocks), lengths)


def stack_distances(blocks: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each reference: 1 + how many different other blocks were used since the same block's last use; NEVER at its first."""
    last = _last_use(blocks)
    # Between a use at p and the next at i, a block is new (its own last use is at or before p) exactly once.
    new = _smaller_before(last) - (last + 1)
    return np.where(last < 0, NEVER, new + 1)


def _last_use(blocks: NDArray[np.int64]) -> NDArray[np.int64]:
    order = np.argsort(blocks, kind="stable")
    last = np.full(len(blocks), -1, np.int64)
    same = blocks[order[1:]] == blocks[order[:-1]]
    last[order[1:][same]] = order[:-1][same]
    return last


def _smaller_before(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each element, how many earlier ones are smaller: a merge sort that counts, all merges of a level at once."""
    count = len(values)
    size = 1 << max(0, count - 1).bit_length()
    large = count + 1  # above every last use
    keys = np.concatenate((values, np.full(size - count, large, np.int64)))
    where = np.arange(size)
    smaller = np.zeros(size, np.int64)
    width = 1
    while width < size:
        pairs = size // (2 * width)
        # Shifted by its pair, every key is above all of the pairs before: one sorted array for one search.
        shift = (np.arange(pairs) * (large + 2))[:, None]
        halves = keys.reshape(pairs, 2, width)
        left, right = halves[:, 0] + shift, halves[:, 1] + shift
        found = np.searchsorted(left.ravel(), right.ravel(), side="left").reshape(pairs, width)
        smaller[where.reshape(pairs, 2, width)[:, 1]] += found - (np.arange(pairs) * width)[:, None]
        order = np.argsort(keys.reshape(pairs, 2 * width), axis=1, kind="stable")
        keys = np.take_along_axis(keys.reshape(pairs, 2 * width), order, axis=1).ravel()
        where = np.take_along_axis(where.reshape(pairs, 2 * width), order, axis=1).ravel()
        width *= 2
    return smaller[:count]


def _running_max(distances: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The largest value so far within each prompt."""
    prompt = np.repeat(np.arange(len(lengths)), lengths)
    # Ranks are small enough to carry the prompt's number above them, so one pass over all keeps prompts apart.
    levels, rank = np.unique(distances, return_inverse=True)
    step = len(levels)
    return levels[np.maximum.accumulate(rank + prompt * step) - prompt * step]
