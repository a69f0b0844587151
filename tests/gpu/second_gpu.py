"""A depot with 64 I/O threads on the second GPU of a process whose default is the first: second_gpu.py ROOT.

Ends with 1 and a sentence when the process then has a context on another GPU, too, when the second one's memory has
shrunk by more than what was asked for and 50 MB, or when a byte is wrong. Says "not told" where nvidia-smi lists no
process, as in a container with process numbers of its own.
"""

import os
import subprocess
import sys

os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"

import torch
from round_trip import BLOCK_BYTES, CHUNK_BLOCKS, CHUNKS, open_depot, round_trip

GROWTH = 50 << 20


def smi(what: str) -> list[list[str]]:
    said = subprocess.run(["nvidia-smi", what, "--format=csv,noheader"], capture_output=True, text=True, check=True).stdout
    return [line.split(", ") for line in said.splitlines()]


def contexts() -> list[str]:
    """The GPUs on which this process has one."""
    return [gpu for pid, gpu in smi("--query-compute-apps=pid,gpu_uuid") if pid == str(os.getpid())]


second = smi("--query-gpu=uuid")[1]
blocks = CHUNKS * CHUNK_BLOCKS
cells = torch.randint(0, 256, (2 * blocks, BLOCK_BYTES), dtype=torch.uint8, device="cuda:1")
told = contexts()
if told not in ([], second):
    sys.exit(f"before the depot was opened this process had contexts on {told}, expected {second}")
free, _ = torch.cuda.mem_get_info(1)
depot = open_depot(sys.argv[1], "cuda:1", io_depth=64)
round_trip(depot, cells, list(range(blocks)), list(range(blocks, 2 * blocks)), 1, lambda: None)
if torch.cuda.current_device() != 0:
    sys.exit(f"the current device is {torch.cuda.current_device()}, expected 0 as before")
# PyTorch's own clones and index tensors are in its cache by now.
torch.cuda.empty_cache()
grown = free - torch.cuda.mem_get_info(1)[0] - (64 << 20)
if grown > GROWTH:
    sys.exit(f"{grown} bytes of the second GPU are taken beyond the device slab, expected at most {GROWTH}")
if contexts() != told:
    sys.exit(f"with the depot this process has contexts on {contexts()}, expected {told}")
depot.close()
print("exact" if told else "exact, contexts not told")
