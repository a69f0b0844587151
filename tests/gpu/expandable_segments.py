"""Chunks of a paged cache in PyTorch's expandable segments, stored and loaded: expandable_segments.py ROOT.

Such a tensor is many mappings of at most 20 MiB behind each other, and more come when it grows. Ends with 1 and a sentence
when a byte is wrong.
"""

import os
import sys

os.environ["PYTORCH_CUDA_ALLOC_CONF"] = os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

import torch
from round_trip import BLOCK_BYTES, CHUNK_BLOCKS, CHUNKS, open_depot, round_trip

MAPPING = 20 << 20


def expandable() -> bool:
    return any(segment.get("is_expandable") for segment in torch.cuda.memory_snapshot())


def trial(root: str, tensor_bytes: int, seed: int) -> None:
    blocks = tensor_bytes // BLOCK_BYTES
    cells = torch.randint(0, 256, (blocks, BLOCK_BYTES), dtype=torch.uint8, device="cuda")
    if not expandable():
        sys.exit("no segment is expandable: this PyTorch does not know the option")
    depot = open_depot(root, "cuda:0")
    across = [(edge + 1) * MAPPING // BLOCK_BYTES for edge in range(CHUNKS * CHUNK_BLOCKS)]
    beside = [block + 1 for block in across]
    # More mappings come behind those that are attached.
    round_trip(depot, cells, across, beside, seed, lambda: torch.empty(300 << 20, dtype=torch.uint8, device="cuda"))
    depot.close()


for which, size in enumerate((1_900_000_000, 2_500_000_000, 1_900_000_000)):
    trial(sys.argv[1], size, which)
    torch.cuda.empty_cache()
print("exact")
