"""Chunks of a paged cache on a GPU, stored and loaded into other blocks. Ends the process with 1 and a sentence when a byte is wrong."""

import json
import sys
import time
from collections.abc import Callable

import torch

from tokendepot import Depot, GroupWant, KeyChain, plan_store

HEADS, BLOCK_TOKENS, ROW_BYTES, CHUNK_BLOCKS = 8, 16, 240, 4
PLANE_BYTES = HEADS * BLOCK_TOKENS * ROW_BYTES
BLOCK_BYTES = 2 * PLANE_BYTES
PART, CHUNK_TOKENS = (0, 1, 0, HEADS), CHUNK_BLOCKS * BLOCK_TOKENS
CHUNKS = 16


def open_depot(root: str, device: str, *, io: str = "auto", **more: object) -> Depot:
    root_config = {"path": root, "capacity": "256MiB", "io": io}
    config = {"roots": [root_config], "device": device, "slab": "64MiB", "device_slab": "64MiB"}
    return Depot.open(json.dumps({**config, "free_space_reserve": 0, "poll_ms": 20, **more}))


def wait_for(depot: Depot, job: int) -> dict:
    ends = time.monotonic() + 30
    while time.monotonic() < ends:
        for done in depot.poll():
            return done
        time.sleep(0.001)
    sys.exit(f"job {job} was not reported in 30 s")


def round_trip(
    depot: Depot, cells: torch.Tensor, stored: list[int], loaded: list[int], seed: int, between: Callable[[], object]
) -> None:
    """`cells`: (blocks, BLOCK_BYTES). The blocks `stored` are stored and loaded into the blocks `loaded`."""
    namespace = depot.register_namespace(json.dumps({"model": "round trip"}))
    base = cells.data_ptr()
    planes = [(base + plane * PLANE_BYTES, BLOCK_BYTES, ROW_BYTES * BLOCK_TOKENS, ROW_BYTES, 0) for plane in range(2)]
    depot.attach(group=0, kind="canonical", part=PART, tokens=CHUNK_TOKENS, block_tokens=BLOCK_TOKENS,
                 block_count=len(cells), row_bytes=ROW_BYTES, layers=[planes])  # fmt: skip
    depot.mark_stream(0)
    wanted = cells[stored].clone()
    chain = KeyChain(namespace, CHUNK_TOKENS)
    chain.append([seed * 100_000 + token for token in range(CHUNKS * CHUNK_TOKENS)])
    keys = chain.keys()
    one = [keys[at : at + 32] for at in range(0, len(keys), 32)]
    items = [(one[i], i, 0, stored[i * CHUNK_BLOCKS : (i + 1) * CHUNK_BLOCKS]) for i in range(CHUNKS)]
    torch.cuda.synchronize(cells.device)
    depot.submit_store(1, plan_store(namespace, items))
    done = wait_for(depot, 1)
    if done["items_ok"] != CHUNKS:
        sys.exit(f"{done['items_ok']} of {CHUNKS} chunks were stored: {done['failures']}")
    kept = between()
    want = GroupWant(0, "canonical", PART, CHUNK_TOKENS)
    depot.submit_load(2, depot.plan_load(namespace, keys, [(want, 0, CHUNK_BLOCKS, loaded)], 10.0))
    done = wait_for(depot, 2)
    if done["items_ok"] != CHUNKS:
        sys.exit(f"{done['items_ok']} of {CHUNKS} chunks were loaded: {done['failures']}")
    if not torch.equal(cells[loaded], wanted):
        sys.exit(f"a tensor of {cells.nbytes} bytes: loaded bytes differ from those that were stored")
    del kept
