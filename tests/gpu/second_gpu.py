"""A depot with 64 I/O threads on the second GPU, brought by a thread whose current one is the first: second_gpu.py ROOT.

Ends with 1 and a sentence when the process then has a context on another GPU, too, when memory has gone beyond what was
asked for and 50 MB, or when a byte is wrong. Contexts are counted where nvidia-smi lists processes, which it does not in a
container with process numbers of its own; memory wants the GPUs for itself.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from round_trip import BLOCK_BYTES, CHUNK_BLOCKS, CHUNKS, open_depot, round_trip

GROWTH = 50 << 20
FIRST, SECOND = (f"GPU-{torch.cuda.get_device_properties(which).uuid}" for which in range(2))
BLOCKS = CHUNKS * CHUNK_BLOCKS


def smi(what: str) -> list[list[str]]:
    command = ["nvidia-smi", what, "--format=csv,noheader,nounits"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.split(", ") for line in said.splitlines()]


def contexts() -> list[str]:
    """The GPUs on which this process has one."""
    return [gpu for pid, gpu in smi("--query-compute-apps=pid,gpu_uuid") if pid == str(os.getpid())]


def taken() -> dict[str, int]:
    """Bytes of each GPU."""
    return {gpu: int(mebibytes) << 20 for gpu, mebibytes in smi("--query-gpu=uuid,memory.used")}


def work(root: str, cells: torch.Tensor) -> None:
    """On a thread that PyTorch has not touched: there the first GPU is the current one, and has no context."""
    depot = open_depot(root, "cuda:1", io="threads", io_depth=64)
    round_trip(depot, cells, list(range(BLOCKS)), list(range(BLOCKS, 2 * BLOCKS)), 1, lambda: None)
    torch.cuda.empty_cache()
    now, grown = contexts(), {gpu: most - before[gpu] for gpu, most in taken().items()}
    depot.close()
    if now != told:
        sys.exit(f"with the depot this process has contexts on {now}, expected {told}")
    if grown[SECOND] > (64 << 20) + GROWTH or grown[FIRST] > GROWTH:
        sys.exit(f"{grown[FIRST]} bytes of the first GPU and {grown[SECOND]} of the second are taken, expected the device slab of 64 MiB there")


cells = torch.randint(0, 256, (2 * BLOCKS, BLOCK_BYTES), dtype=torch.uint8, device="cuda:1")
torch.equal(cells[[0]].clone(), cells[[1]])  # brings PyTorch's kernels, which are none of the depot's memory
torch.cuda.empty_cache()
told, before = contexts(), taken()
if told not in ([], [SECOND]):
    sys.exit(f"before the depot was opened this process had contexts on {told}, expected {SECOND}")
with ThreadPoolExecutor(1) as other:
    other.submit(work, sys.argv[1], cells).result()
print("exact")
