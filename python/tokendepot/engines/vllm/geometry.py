"""Cache tensors of the engine -> the addresses and strides that the depot's worker needs.

Dimensions are named by the engine's declaration (see versions.declared_shape), never by comparing sizes: with
two KV heads, [blocks, heads, tokens, 2 * dim] and [blocks, K|V, tokens, heads * dim] have the same shape. Without
a declaration a tensor is taken only when exactly one known family of shapes fits its sizes, or as opaque pages when
exactly one dimension can be the blocks. Strides come from the tensor itself, so what a backend calls its layout
(NHD, HND, layers inside blocks, padded pages) does not matter. Addresses are those of the tensor's device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from tokendepot.engines.vllm.groups import CANONICAL, OPAQUE, Group
from tokendepot.engines.vllm.settings import RefusedError

# (address, block stride, head stride, token stride, piece bytes), strides in bytes
Plane = tuple[int, int, int, int, int]

KNOWN_FAMILIES = (
    ("P", "B", "N", "H", "D"),
    ("P", "B", "H", "N", "D"),
    ("B", "P", "N", "H", "D"),
    ("B", "P", "H", "N", "D"),
    ("B", "H", "N", "C"),
    ("B", "N", "H", "C"),
    ("B", "N", "C"),
)
MAX_PIECES = 1024
DEVICES = ("cpu", "cuda")
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def cache_device(kv_caches: Iterable[Any]) -> str:
    """Where the cache is, as the engine option "device" says it: "host" or "cuda:N"; RefusedError when it is nowhere
    that KV can be moved from, or in several places."""
    devices = {tensor.device for tensor in kv_caches if isinstance(tensor, torch.Tensor)}
    if len(devices) > 1:
        raise RefusedError(f"the KV cache lies on several devices ({', '.join(sorted(map(str, devices)))})")
    device = devices.pop() if devices else torch.device("cpu")
    if device.type not in DEVICES:
        raise RefusedError(f"the KV cache is on {device} but KV is moved from and to {' and '.join(DEVICES)} only")
    if device.type == "cpu":
        return "host"
    return f"cuda:{device.index if device.index is not None else torch.cuda.current_device()}"


def check_cells(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    """RefusedError when the cells are not as large as those of the dtype that the engine declares. Bytes are moved, so they
    may be viewed as anything of that size, as fp8 caches are."""
    size = tensor.element_size()
    if size not in INTEGERS:
        raise RefusedError(f"layer {name} has a cache tensor of {tensor.dtype}: cells of {size} bytes are not kept")
    if size != dtype.itemsize:
        raise RefusedError(f"layer {name} has a cache tensor of {tensor.dtype} where the engine declares {dtype}")


def layer_planes(
    tensor: torch.Tensor, group: Group, block_count: int, declared: tuple[str, ...] | None, name: str
) -> list[Plane]:
    """Planes (canonical) or pieces (opaque) of one layer; RefusedError when the tensor does not fit the group."""
    names = _dimensions(tensor, group, block_count, declared, name)
    size = dict(zip(names, tensor.shape, strict=True))
    stride = {dim: step * tensor.element_size() for dim, step in zip(names, tensor.stride(), strict=True)}
    if size["B"] % block_count:
        raise RefusedError(
            f"layer {name} has {size['B']} blocks in its cache tensor, which is no multiple of the "
            f"{block_count} blocks "
            "of the pool"
        )
    if group.kind == CANONICAL:
        return _rows(tensor, group, block_count, size, stride, name)
    return _pages(tensor, block_count, size, stride, name)


@dataclass(frozen=True)
class BlockCells:
    """The cells of one layer as the engine indexes them, without regard to strides."""

    tensor: torch.Tensor
    dimension: int  # that counts the blocks
    rows: int  # of that dimension in one block of the pool

    def of(self, block: int) -> torch.Tensor:
        """A view of one block as whole numbers, because a NaN is equal to nothing."""
        cells = self.tensor.narrow(self.dimension, block * self.rows, self.rows)
        return cells.view(INTEGERS[self.tensor.element_size()])


def block_cells(
    tensor: torch.Tensor, group: Group, block_count: int, declared: tuple[str, ...] | None, name: str
) -> BlockCells:
    """Arguments and errors as of layer_planes()."""
    dimension = _dimensions(tensor, group, block_count, declared, name).index("B")
    return BlockCells(tensor, dimension, tensor.shape[dimension] // block_count)


def page_bytes(planes: list[Plane]) -> int:
    return sum(plane[4] for plane in planes)


def _dimensions(
    tensor: torch.Tensor, group: Group, block_count: int, declared: tuple[str, ...] | None, name: str
) -> tuple[str, ...]:
    if declared is not None:
        if len(declared) == tensor.dim() + 1 and "H" in declared and group.rank_heads == 1:
            declared = tuple(dim for dim in declared if dim != "H")  # MLA caches leave the single head out
        if len(declared) != tensor.dim():
            raise RefusedError(
                f"layer {name} has a cache tensor of shape {tuple(tensor.shape)} but its backend declares "
                f"[{', '.join(declared)}]"
            )
        return declared
    fitting = [family for family in KNOWN_FAMILIES if _fits(tensor, group, block_count, family)]
    if len(fitting) != 1 and group.kind == OPAQUE:
        return _dimensions_of_pages(tensor, block_count, name)
    if len(fitting) != 1:
        found = " or ".join(f"[{', '.join(family)}]" for family in fitting) or "nothing known"
        raise RefusedError(
            f"layer {name} has a cache tensor of shape {tuple(tensor.shape)} without a declared layout, "
            f"which may be {found}"
        )
    return fitting[0]


def _dimensions_of_pages(tensor: torch.Tensor, block_count: int, name: str) -> tuple[str, ...]:
    """A page may hold anything, so all that has to be known is which dimension counts the blocks."""
    may_be_blocks = [dim for dim, size in enumerate(tensor.shape) if size and size % block_count == 0]
    if len(may_be_blocks) != 1:
        raise RefusedError(
            f"layer {name} has a cache tensor of shape {tuple(tensor.shape)} without a declared layout, in which "
            f"{len(may_be_blocks)} dimensions may be the {block_count} blocks of the pool"
        )
    return tuple("B" if dim == may_be_blocks[0] else f"inner{dim}" for dim in range(tensor.dim()))


def _fits(tensor: torch.Tensor, group: Group, block_count: int, family: tuple[str, ...]) -> bool:
    if len(family) != tensor.dim():
        return False
    size = dict(zip(family, tensor.shape, strict=True))
    if size["B"] % block_count or group.block_tokens % size["N"]:
        return False
    if size["B"] // block_count != group.block_tokens // size["N"] or size.get("P", 2) != 2:
        return False
    if "H" in size and group.kind == CANONICAL and size["H"] != group.rank_heads:
        return False
    return size["D"] == group.head_size if "D" in size else size["C"] % group.head_size == 0


def _rows(
    tensor: torch.Tensor,
    group: Group,
    block_count: int,
    size: dict[str, int],
    stride: dict[str, int],
    name: str,
) -> list[Plane]:
    """Canonical: one strided view a plane."""
    content = "D" if "D" in size else "C"
    splits = size["B"] // block_count  # kernel blocks in one block of the pool
    planes_in_row = 1 if "P" in size else group.planes
    expected = {
        "N": group.block_tokens // splits if group.block_tokens % splits == 0 else -1,
        "H": group.rank_heads,
        "P": group.planes,
        content: planes_in_row * group.row_bytes // tensor.element_size(),
    }
    for dim, wanted in expected.items():
        if dim in size and size[dim] != wanted:
            raise RefusedError(
                f"layer {name} has a cache tensor of shape {tuple(tensor.shape)} with {size[dim]} in "
                f"dimension {dim} where "
                f'{wanted} is expected: use "layout": "opaque"'
            )
    if stride[content] != tensor.element_size():
        raise RefusedError(f'layer {name} has rows that are not contiguous: use "layout": "opaque"')
    if splits > 1 and stride["B"] != stride["N"] * size["N"]:
        raise RefusedError(
            f"layer {name} splits each block of {group.block_tokens} tokens into {splits} kernel blocks "
            "that do not follow "
            'each other token by token: use "layout": "opaque"'
        )
    plane_step = stride["P"] if "P" in size else group.row_bytes
    return [
        (
            tensor.data_ptr() + plane * plane_step,
            stride["B"] * splits,
            stride.get("H", 0),
            stride["N"],
            group.row_bytes,
        )
        for plane in range(group.planes)
    ]


def _pages(
    tensor: torch.Tensor, block_count: int, size: dict[str, int], stride: dict[str, int], name: str
) -> list[Plane]:
    """Opaque: the contiguous runs that one block consists of."""
    splits = size["B"] // block_count
    inner = [(size[dim], stride[dim]) for dim in size if dim != "B" and size[dim] > 1]
    if splits > 1:
        inner.append((splits, stride["B"]))
    inner.sort(key=lambda dim: dim[1])
    run = tensor.element_size()
    outer: list[tuple[int, int]] = []
    for count, step in inner:
        if not outer and step == run:
            run *= count
        elif step < run:
            raise RefusedError(
                f"layer {name} has a cache tensor whose cells overlap (strides {tensor.stride()})"
            )
        else:
            outer.append((count, step))
    offsets = sorted(
        sum(index * step for index, (_, step) in zip(place, outer, strict=True))
        for place in product(*(range(count) for count, _ in outer))
    )
    if len(offsets) > MAX_PIECES:
        raise RefusedError(
            f"layer {name} keeps each block in {len(offsets)} pieces but at most {MAX_PIECES} are handled"
        )
    return [(tensor.data_ptr() + offset, stride["B"] * splits, 0, 0, run) for offset in offsets]


def attach_arguments(
    group: Group, part: tuple[int, int, int, int], block_count: int, layers: list[list[Plane]]
) -> dict[str, Any]:
    """Keyword arguments of Depot.attach for one group."""
    if part[1] - part[0] != len(layers):
        raise RefusedError(
            f"KV-cache group {group.index} has {len(layers)} layers on this rank but [{part[0]}, {part[1]}) "
            "is its share"
        )
    arguments: dict[str, Any] = {
        "group": group.index,
        "kind": group.kind,
        "part": part,
        "tokens": group.stored_tokens,
        "block_tokens": group.block_tokens,
        "block_count": block_count,
        "layers": layers,
    }
    if group.kind == CANONICAL:
        arguments["row_bytes"] = group.row_bytes
    else:
        sizes = {page_bytes(planes) for planes in layers}
        if len(sizes) != 1:
            raise RefusedError(
                f"the layers of KV-cache group {group.index} have pages of different sizes {sorted(sizes)}"
            )
        arguments["page_bytes"] = sizes.pop()
    return arguments
