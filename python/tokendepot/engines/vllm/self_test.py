"""At start: what is stored has to be found and to come back, through the calls that serve requests.

Of each KV-cache group one block of the engine's own cache goes the whole way: keys, store plan, gather, digest, extent,
journal, catalog, look-up, load plan, read, verify, scatter. A fault that would make every look-up a miss, or mix layers
up, keeps the depot out here instead of hiding in a hit rate.

The depot of the test is one of its own in a temporary directory: the roots may be shared, full or read-only, a role may
forbid to store or to load, and nothing may stay behind.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from array import array
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from tokendepot import _core
from tokendepot.engines.vllm import versions
from tokendepot.engines.vllm.geometry import BlockCells
from tokendepot.engines.vllm.settings import RefusedError

PATIENCE_S = 30.0  # with one transfer; milliseconds where the machine is not very busy
MIB = 1 << 20
HEADER_BYTES = 64 << 10  # of an extent, at most
PAGE_BYTES = 4096  # to which each head's shard is filled up
SEGMENTS = 4  # of which two are made; a root must have room for three


@dataclass(frozen=True)
class Lent:
    """One KV-cache group as this rank lends it to a depot."""

    arguments: dict[str, Any]  # of Depot.attach
    cells: list[BlockCells]  # of each layer

    def with_one_block_extents(self) -> dict[str, Any]:
        """The test takes a block, whatever the length of a chunk: it stays small, and the pool holds two of them."""
        return {**self.arguments, "tokens": self.arguments["block_tokens"]}

    def largest_extent(self) -> int:
        """Bytes of a block as an extent, at most."""
        _, _, first_head, last_head = self.arguments["part"]
        padding = HEADER_BYTES + PAGE_BYTES * (last_head - first_head)
        return sum(cells.of(0).nbytes for cells in self.cells) + padding


class NoRoomError(Exception):
    """Nothing was tested, which says nothing against the depot."""


def run(lent: list[Lent], device: str) -> None:
    """Tests all groups of a cache that no request uses yet; two of its blocks are changed and put back. `device` as in
    the engine's options. RefusedError in one sentence when something does not come back. Where there is no room for the
    test, one line says so."""
    began = time.monotonic()
    try:
        _test(lent, device)
    except NoRoomError as error:
        versions.log.warning("tokendepot: no self-test: %s", error)
    except _core.DepotError as error:
        raise RefusedError(f"self-test: {error}") from error
    else:
        versions.log.info("tokendepot: self-test passed in %.0f ms", 1e3 * (time.monotonic() - began))


def _test(lent: list[Lent], device: str) -> None:
    largest = max(group.largest_extent() for group in lent)
    segment = -(-largest * len(lent) // MIB) * MIB
    path = _directory_for(SEGMENTS * segment)
    options = {
        "roots": [f"{path}/depot?capacity={SEGMENTS * segment}&segment={segment}&transport=buffered&io=threads"],
        "device": device,
        "slab": max(2 * largest, 2 * MIB),
        "device_slab": max(2 * largest, 2 * MIB),
        "device_threads": 1,
        "io_depth": 1,
        "free_space_reserve": 0,
    }
    try:
        depot = _core.Depot.open(json.dumps(options), catalog=True, writer=True)
        try:
            for group in lent:
                depot.attach(**group.with_one_block_extents())
            namespace = depot.register_namespace(json.dumps({"purpose": "self-test"}))
            for number, group in enumerate(lent):
                _there_and_back(depot, namespace, number, group)
        finally:
            depot.close()
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _directory_for(bytes: int) -> str:
    """A new directory, in memory where there is room for twice as much: ranks start together."""
    for parent in (lambda: "/dev/shm", tempfile.gettempdir):
        with suppress(OSError):  # the other one may do
            if os.access(parent(), os.W_OK) and shutil.disk_usage(parent()).free >= 2 * bytes:
                return tempfile.mkdtemp(prefix="tokendepot-self-test-", dir=parent())
    raise NoRoomError(f"no temporary directory has room for {bytes // MIB} MiB")


def _there_and_back(depot: _core.Depot, namespace: bytes, number: int, lent: Lent) -> None:
    arguments = lent.with_one_block_extents()
    index, tokens, blocks = arguments["group"], arguments["block_tokens"], arguments["block_count"]
    source, target = blocks - 2, blocks - 1
    if source < 0:
        raise RefusedError(f"self-test: the pool has {blocks} blocks, but two are needed to see bytes come back")
    ids = [(number * 7919 + token) % 32000 for token in range(tokens)]
    stored, asked = _core.KeyChain(namespace, tokens), _core.KeyChain(namespace, tokens)
    stored.append(ids)
    asked.append(array("i", ids))  # the other form in which token ids may come
    want = _core.GroupWant(index, arguments["kind"], arguments["part"], tokens)
    before = [(cells.of(source).clone(), cells.of(target).clone()) for cells in lent.cells]
    try:
        for layer, cells in enumerate(lent.cells):
            _fill(cells.of(source), layer)
            cells.of(target).zero_()
        expected = [cells.of(source).clone() for cells in lent.cells]
        _mark_stream(depot, lent)
        depot.submit_store(1, _core.plan_store(namespace, [(stored.keys(), 0, index, [source])]))
        _ended(depot, f"storing a block of group {index}")
        if depot.longest_prefix(asked.keys(), [want]) != 1:
            raise RefusedError(f"self-test: what was stored of group {index} is not found")
        _mark_stream(depot, lent)
        depot.submit_load(2, depot.plan_load(namespace, asked.keys(), [(want, 0, 1, [target])], PATIENCE_S))
        _ended(depot, f"loading a block of group {index}")
        for layer, (cells, wanted) in enumerate(zip(lent.cells, expected, strict=True)):
            if not torch.equal(_bytes(cells.of(target)), _bytes(wanted)):
                raise RefusedError(f"self-test: layer {layer} of group {index} came back with other bytes")
    finally:
        for cells, (of_source, of_target) in zip(lent.cells, before, strict=True):
            cells.of(source).copy_(of_source)
            cells.of(target).copy_(of_target)


def _ended(depot: _core.Depot, doing: str) -> None:
    """Waits for the one job under way."""
    until = time.monotonic() + PATIENCE_S
    while not (ended := depot.poll()):
        if time.monotonic() > until:
            raise RefusedError(f"self-test: {doing} takes longer than {PATIENCE_S:.0f} s")
        time.sleep(0.0002)
    for *_, reason in ended[0]["failures"]:
        if reason in ("dropped", "pinned"):  # by a depot that holds nothing else: others have taken the space since
            raise NoRoomError(f"{doing} found no space")
        raise RefusedError(f"self-test: {doing} failed ({reason})")


def _mark_stream(depot: _core.Depot, lent: Lent) -> None:
    device = lent.cells[0].tensor.device
    if device.type == "cuda":
        depot.mark_stream(torch.cuda.current_stream(device).cuda_stream)


def _fill(cells: torch.Tensor, layer: int) -> None:
    """Every byte another value than its neighbours, and than the same byte of other layers: as numbers they may be
    equal (fp16 and fp8 have few) or not equal to themselves."""
    place = torch.arange(cells.numel() * cells.element_size())  # on the host: takes 8 times the block, and more
    noise = ((place + 104729 * layer) * 2654435761 >> 9 & 255).to(torch.uint8)
    cells.copy_(noise.view(cells.dtype).view(cells.shape))


def _bytes(cells: torch.Tensor) -> torch.Tensor:
    return cells.contiguous().view(torch.uint8)
