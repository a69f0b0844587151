"""The fake model's paged cache, in every layout of tensors that a vLLM release has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import vllm

VERSION = tuple(int(part) for part in vllm.__version__.split("+")[0].split(".")[:2])
HEADS, DIM = 2, 4
# Families of cache tensors: P = K or V outside, B blocks, H heads, N tokens, C = K and V in one row, L = layers inside.
if VERSION >= (0, 29):
    FAMILIES = ("BHNC", "BNHC", "BLHNC")
else:
    FAMILIES = ("PBHND", "PBNHD", "BPNHD", "BHNC")
DEFAULT_FAMILY = "BHNC" if VERSION >= (0, 24) else "PBHND"
# KV type -> (type of the cache's cells, cells are whole numbers below this, which are exact in it). Engines keep fp8 as
# bytes. A number of its own for each type, so that text tells whose bytes were read.
KV_TYPES = {
    "float32": (torch.float32, 65521),
    "float16": (torch.float16, 2039),
    "bfloat16": (torch.bfloat16, 251),
    "fp8": (torch.uint8, 241),
    "fp8_e4m3": (torch.uint8, 241),
    "fp8_e5m2": (torch.uint8, 239),
}


class FakeBackend:
    """Declares the layout of the fake model's cache, as attention backends do before 0.29."""

    def __init__(self, family: str) -> None:
        self.family = family

    def get_name(self) -> str:
        return "HARNESS"

    def get_kv_cache_shape(self, num_blocks, block_size, num_kv_heads, head_size, cache_dtype_str="auto"):
        sizes = {
            "P": 2,
            "B": num_blocks,
            "N": block_size,
            "H": num_kv_heads,
            "D": head_size,
            "C": 2 * head_size,
        }
        return tuple(sizes[dim] for dim in self.family)


def layer_name(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.attn"


def allocate(o: Any, layers: Sequence[int], heads: int) -> tuple[dict[str, torch.Tensor], dict[int, torch.Tensor]]:
    """(tensors as the engine registers them, views [block, head, token, plane, dim] of the same memory).

    o: the harness's Options; heads: of one rank.
    """
    tensors, cells = {}, {}
    n, h, b = o.block_size, heads, o.blocks
    slots = len(layers) // 2 if o.hybrid else len(layers)  # hybrid groups alias each other's memory
    cell, never = o.cells[0], 255 if o.cells[0] is torch.uint8 else -1

    def blank(*shape: int) -> torch.Tensor:
        return torch.full(shape, never, dtype=cell)

    packed = blank(b, slots, h, n, 2 * DIM)
    made: dict[int, tuple] = {}
    for place, layer in enumerate(layers):
        slot = place % slots
        if slot not in made:
            if o.family == "PBHND":
                t = blank(2, b, h, n, DIM)
                view = t.permute(1, 2, 3, 0, 4)
            elif o.family == "PBNHD":
                t = blank(2, b, n, h, DIM)
                view = t.permute(1, 3, 2, 0, 4)
            elif o.family == "BPNHD":
                t = blank(b, 2, n, h, DIM)
                view = t.permute(0, 3, 2, 1, 4)
            elif o.family == "BNHC":
                t = blank(b, n, h, 2 * DIM).permute(0, 2, 1, 3)
                view = t.unflatten(3, (2, DIM))
            elif o.family == "BLHNC":
                t = packed[:, slot]
                view = t.unflatten(3, (2, DIM))
            else:
                t = blank(b, h, n, 2 * DIM)
                view = t.unflatten(3, (2, DIM))
            made[slot] = (t, view)
        tensors[layer_name(layer)], cells[layer] = made[slot]
    return tensors, cells
