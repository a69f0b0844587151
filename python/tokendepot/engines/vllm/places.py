"""Which blocks of a request's tables a load fills."""

from __future__ import annotations

from tokendepot.engines.vllm.groups import Group
from tokendepot.engines.vllm.messages import SKIP, GroupBlocks

NULL_BLOCK = 0  # vLLM's block that stands for "freed, outside the window"


def everywhere(groups: list[Group], hit: int) -> list[GroupBlocks]:
    """All chunks that a prefix of `hit` chunks needs of each group; block 0 stands for any."""
    places = []
    for group in groups:
        first = max(0, hit - group.window_chunks) if group.window_chunks else 0
        ids = [0] * ((hit - first) * group.stored_blocks)
        places.append(GroupBlocks.pack(group.index, first, group.stored_blocks, ids))
    return places


def places_of(
    groups: list[Group], tables: list[list[int]], local: int, end: int
) -> tuple[list[GroupBlocks], bool]:
    """The blocks that tokens [local, end) need from the depot, and whether the depot holds all of them. A table may have
    tens of thousands of blocks, so it is taken in slices."""
    places, complete = [], True
    for group, table in zip(groups, tables, strict=True):
        end_chunk = -(-end // group.chunk_tokens)
        first = local // group.chunk_tokens
        if group.window_chunks:
            first = max(first, end_chunk - group.window_chunks)
        begin, stop = -(-local // group.block_tokens), -(-end // group.block_tokens)
        ids: list[int] = []
        for low, high in _stored_runs(group, first, end_chunk):
            complete &= not any(table[begin : min(low, stop)])
            ids += _wanted(table, low, high, begin, stop)
            begin = max(begin, high)
        complete &= not any(table[begin:stop])
        places.append(GroupBlocks.pack(group.index, first, group.stored_blocks, ids))
    return places, complete


def _stored_runs(group: Group, first: int, end_chunk: int) -> list[tuple[int, int]]:
    """Positions [low, high) in a table of what the depot keeps of chunks [first, end_chunk)."""
    size = group.blocks_per_chunk
    if group.stored_blocks == size:
        return [(first * size, end_chunk * size)]
    return [((chunk + 1) * size - group.stored_blocks, (chunk + 1) * size) for chunk in range(first, end_chunk)]


def _wanted(table: list[int], low: int, high: int, begin: int, stop: int) -> list[int]:
    """The table at [low, high) with SKIP outside of [begin, stop) and where nothing is."""
    begin = min(max(begin, low), high)
    stop = max(begin, min(stop, high, len(table)))
    blocks = table[begin:stop]
    if NULL_BLOCK in blocks:
        blocks = [SKIP if block == NULL_BLOCK else block for block in blocks]
    return [SKIP] * (begin - low) + blocks + [SKIP] * (high - stop)


def everything(groups: list[Group], tables: list[list[int]], local: int, end: int) -> list[GroupBlocks]:
    """All blocks of tokens [local, end), to be reported as failed: one list of single blocks a group."""
    places = []
    for group, table in zip(groups, tables, strict=True):
        positions = range(local // group.block_tokens, -(-end // group.block_tokens))
        ids = [table[p] if is_wanted(group, table, p, local, end) else SKIP for p in positions]
        places.append(GroupBlocks.pack(group.index, 0, max(1, len(ids)), ids))
    return places


def is_wanted(group: Group, table: list[int], position: int, local: int, end: int) -> bool:
    first_token = position * group.block_tokens
    return local <= first_token < end and position < len(table) and table[position] != NULL_BLOCK
