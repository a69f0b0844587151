"""Chunks of a paged cache in PyTorch's expandable segments, stored and loaded: expandable_segments.py ROOT.

Such a tensor is many mappings of at most 20 MiB behind each other, and more come when it grows. Ends with 1 and a sentence
when a byte is wrong.
"""

import json
import os
import sys
import time

os.environ["PYTORCH_CUDA_ALLOC_CONF"] = os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

import torch

from tokendepot import Depot, GroupWant, KeyChain, plan_store

MAPPING = 20 << 20
HEADS, BLOCK_TOKENS, ROW_BYTES, CHUNK_BLOCKS = 8, 16, 240, 4
PLANE_BYTES = HEADS * BLOCK_TOKENS * ROW_BYTES
BLOCK_BYTES = 2 * PLANE_BYTES
PART, CHUNK_TOKENS = (0, 1, 0, HEADS), CHUNK_BLOCKS * BLOCK_TOKENS
CHUNKS = 16


def wait_for(depot: Depot, job: int) -> dict:
    ends = time.monotonic() + 30
    while time.monotonic() < ends:
        for done in depot.poll():
            return done
        time.sleep(0.001)
    sys.exit(f"job {job} was not reported in 30 s")


def expandable() -> bool:
    return any(segment.get("is_expandable") for segment in torch.cuda.memory_snapshot())


def trial(root: str, tensor_bytes: int, seed: int) -> None:
    blocks = tensor_bytes // BLOCK_BYTES
    cells = torch.randint(0, 256, (blocks, BLOCK_BYTES), dtype=torch.uint8, device="cuda")
    if not expandable():
        sys.exit("no segment is expandable: this PyTorch does not know the option")
    config = {"roots": [{"path": root, "capacity": "256MiB"}], "device": "cuda:0", "slab": "64MiB", "device_slab": "64MiB"}
    depot = Depot.open(json.dumps({**config, "free_space_reserve": 0, "poll_ms": 20}))
    namespace = depot.register_namespace(json.dumps({"model": "expandable"}))
    base = cells.data_ptr()
    planes = [(base + plane * PLANE_BYTES, BLOCK_BYTES, ROW_BYTES * BLOCK_TOKENS, ROW_BYTES, 0) for plane in range(2)]
    depot.attach(group=0, kind="canonical", part=PART, tokens=CHUNK_TOKENS, block_tokens=BLOCK_TOKENS,
                 block_count=blocks, row_bytes=ROW_BYTES, layers=[planes])  # fmt: skip
    across = [(edge + 1) * MAPPING // BLOCK_BYTES for edge in range(CHUNKS * CHUNK_BLOCKS)]
    beside = [block + 1 for block in across]
    wanted = cells[across].clone()
    chain = KeyChain(namespace, CHUNK_TOKENS)
    chain.append([seed * 100_000 + token for token in range(CHUNKS * CHUNK_TOKENS)])
    keys = chain.keys()
    one = [keys[at : at + 32] for at in range(0, len(keys), 32)]
    items = [(one[i], i, 0, across[i * CHUNK_BLOCKS : (i + 1) * CHUNK_BLOCKS]) for i in range(CHUNKS)]
    torch.cuda.synchronize()
    depot.submit_store(1, plan_store(namespace, items))
    stored = wait_for(depot, 1)
    if stored["items_ok"] != CHUNKS:
        sys.exit(f"{stored['items_ok']} of {CHUNKS} chunks were stored: {stored['failures']}")
    grown = torch.empty(300 << 20, dtype=torch.uint8, device="cuda")  # more mappings behind those that are attached
    want = GroupWant(0, "canonical", PART, CHUNK_TOKENS)
    depot.submit_load(2, depot.plan_load(namespace, keys, [(want, 0, CHUNK_BLOCKS, beside)], 10.0))
    loaded = wait_for(depot, 2)
    if loaded["items_ok"] != CHUNKS:
        sys.exit(f"{loaded['items_ok']} of {CHUNKS} chunks were loaded: {loaded['failures']}")
    if not torch.equal(cells[beside], wanted):
        sys.exit(f"a tensor of {tensor_bytes} bytes: loaded bytes differ from those that were stored")
    del grown
    depot.close()


for which, size in enumerate((1_900_000_000, 2_500_000_000, 1_900_000_000)):
    trial(sys.argv[1], size, which)
    torch.cuda.empty_cache()
print("exact")
