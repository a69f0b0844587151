"""Cache tensors to addresses: by the engine's declaration, never by shape alone."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from tokendepot import _core
from tokendepot.engines.vllm.geometry import attach_arguments, cache_device, check_cells, layer_planes
from tokendepot.engines.vllm.groups import CANONICAL, FULL, OPAQUE, Group
from tokendepot.engines.vllm.settings import RefusedError

BLOCKS, HEADS, TOKENS, DIM = 97, 2, 16, 128
LOGICAL = ("B", "H", "N", "C")


def group(**changes) -> Group:
    values = dict(
        index=0,
        attention=FULL,
        window=0,
        block_tokens=TOKENS,
        chunk_tokens=32,
        stored_tokens=32,
        kind=CANONICAL,
        planes=2,
        row_bytes=DIM * 4,
        page_bytes=0,
        heads=HEADS,
        rank_heads=HEADS,
        replicas=1,
        head_size=DIM,
        layer_names=("layer",),
        layers=1,
    )
    return Group(**{**values, **changes})


def numbered(*shape: int, strides: tuple[int, ...] | None = None) -> torch.Tensor:
    count = 1
    for size in shape:
        count *= size
    flat = torch.arange(count, dtype=torch.float32) + 1
    return flat.as_strided(shape, strides) if strides else flat.view(shape)


@pytest.fixture
def tmp_path(tmp_path):
    """In memory where that can be had: opening a root on a disk measures the disk each time."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    path = Path(tempfile.mkdtemp(prefix="tokendepot-geometry-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


class Store:
    """A depot in a fresh root, through which one tensor's blocks are written and read back."""

    def __init__(self, root, name: str, shape: Group) -> None:
        self.config = f'{{"roots":["{root}?capacity=16MiB"],"free_space_reserve":"1MiB","slab":"4MiB"}}'
        self.shape = shape
        catalog = _core.Depot.open(self.config, catalog=True, writer=False)
        self.namespace = catalog.register_namespace(f'{{"name":"{name}"}}')
        catalog.close()

    def attached(self, tensor: torch.Tensor, declared) -> _core.Depot:
        depot = _core.Depot.open(self.config, catalog=True, writer=True)
        planes = layer_planes(tensor, self.shape, BLOCKS, declared, "layer")
        part = (0, 1, 0, self.shape.heads)
        depot.attach(**attach_arguments(self.shape, part, BLOCKS, [planes]))
        return depot

    def blocks_of(self, chunk: int) -> list[int]:
        per_chunk = self.shape.stored_blocks
        return [block % BLOCKS for block in range(chunk * per_chunk + 1, (chunk + 1) * per_chunk + 1)]

    def keys(self, chunks: int) -> bytes:
        chain = _core.KeyChain(self.namespace, self.shape.chunk_tokens)
        chain.append(list(range(chunks * self.shape.chunk_tokens)))
        return bytes(chain.keys())

    def write(self, tensor, declared, chunks: int) -> None:
        depot, keys = self.attached(tensor, declared), self.keys(chunks)
        items = [(keys[32 * n : 32 * n + 32], n, 0, self.blocks_of(n)) for n in range(chunks)]
        depot.submit_store(1, _core.plan_store(self.namespace, items))
        assert depot.wait_gathered(10.0) and depot.flush(10.0)
        assert [item["items_ok"] for item in depot.poll()] == [chunks]
        depot.close()

    def read(self, tensor, declared, chunks: int) -> list:
        depot, keys = self.attached(tensor, declared), self.keys(chunks)
        ids = [block for n in range(chunks) for block in self.blocks_of(n)]
        want = self.shape.want()
        assert depot.longest_prefix(keys, [want]) == chunks
        depot.submit_load(
            2, depot.plan_load(self.namespace, keys, [(want, 0, self.shape.stored_blocks, ids)], 10.0)
        )
        done = []
        while not done:
            done = depot.poll()
        depot.close()
        return done[0]["failures"]


CASES = {
    "head-major": (lambda: numbered(BLOCKS, HEADS, TOKENS, 2 * DIM), LOGICAL),
    "token-major": (lambda: numbered(BLOCKS, HEADS, TOKENS, 2 * DIM, strides=(8192, 256, 512, 1)), LOGICAL),
    "K and V outermost": (lambda: numbered(2, BLOCKS, TOKENS, HEADS, DIM), ("P", "B", "N", "H", "D")),
    "K and V outermost, head-major": (
        lambda: numbered(2, BLOCKS, HEADS, TOKENS, DIM),
        ("P", "B", "H", "N", "D"),
    ),
    "K and V in the block": (lambda: numbered(BLOCKS, 2, TOKENS, HEADS, DIM), ("B", "P", "N", "H", "D")),
    "all layers in the block": (lambda: numbered(BLOCKS, 3, HEADS, TOKENS, 2 * DIM)[:, 1], LOGICAL),
    "heads outside layers": (lambda: numbered(BLOCKS, HEADS, 3, TOKENS, 2 * DIM)[:, :, 1], LOGICAL),
    "two kernel blocks in a block": (
        lambda: numbered(2 * BLOCKS, HEADS, TOKENS // 2, 2 * DIM, strides=(4096, 256, 512, 1)),
        LOGICAL,
    ),
}


@pytest.mark.parametrize("kind", [CANONICAL, OPAQUE])
@pytest.mark.parametrize("name", CASES)
def test_blocks_come_back_to_their_places_and_nothing_else_changes(name: str, kind: str, tmp_path) -> None:
    make, declared = CASES[name]
    shape = group(kind=kind, heads=HEADS if kind == CANONICAL else 1, rank_heads=HEADS)
    if kind == OPAQUE:
        shape = dataclasses.replace(shape, planes=0, row_bytes=0)
    store = Store(tmp_path / "root", name, shape)
    source, target = make(), make().mul_(-1)
    store.write(source, declared, 3)
    assert store.read(target, declared, 3) == []
    split = source.shape[declared.index("B")] // BLOCKS
    place = declared.index("B")
    loaded = [split * block + part for n in range(3) for block in store.blocks_of(n) for part in range(split)]
    for block in range(BLOCKS * split):
        expected = source.select(place, block) if block in loaded else make().mul_(-1).select(place, block)
        assert torch.equal(target.select(place, block), expected), block


# What the attention backends of vLLM 0.20-0.33 hand over on CUDA: name -> (logical dimensions, memory order of them).
# The tensor is allocated in memory order and handed over as a permuted view.
CUDA_LAYOUTS = {
    "FlashAttention to 0.22, NHD": ("PBNHD", (0, 1, 2, 3, 4)),
    "FlashAttention to 0.22, HND": ("PBNHD", (0, 1, 3, 2, 4)),
    "FlashAttention to 0.25, Triton and FlashInfer, NHD": ("BPNHD", (0, 1, 2, 3, 4)),
    "FlashAttention to 0.25, Triton and FlashInfer, HND": ("BPNHD", (0, 1, 3, 2, 4)),
    "FlexAttention 0.23-0.25": ("BPNHD", (0, 2, 1, 3, 4)),
    "all backends from 0.26, NHD": ("BHNC", (0, 2, 1, 3)),
    "all backends from 0.26, HND": ("BHNC", (0, 1, 2, 3)),
    # with a dimension of layers (L), of which a layer's tensor is one slice
    "cross-layer, NHD, 0.20-0.22": ("LPBNHD", (2, 0, 1, 3, 4, 5)),
    "cross-layer, HND, 0.20-0.22": ("LPBNHD", (2, 4, 0, 1, 3, 5)),
    "cross-layer, NHD, 0.23-0.25": ("LBPNHD", (1, 0, 2, 3, 4, 5)),
    "cross-layer, HND, 0.23-0.25": ("LBPNHD", (1, 4, 0, 2, 3, 5)),
    "cross-layer, HND, Triton and FlashInfer to 0.22": ("LBPNHD", (1, 2, 4, 0, 3, 5)),
    "cross-layer, NHD, 0.26-0.28": ("LBHNC", (1, 0, 3, 2, 4)),
    "cross-layer, HND, 0.26-0.28": ("LBHNC", (1, 2, 0, 3, 4)),
    "blocks outside layers (BLHNC) from 0.29": ("LBHNC", (1, 0, 2, 3, 4)),
    "layers outside blocks (LBNHC) from 0.29": ("LBHNC", (0, 1, 3, 2, 4)),
}
CUDA_TYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8 e4m3": torch.float8_e4m3fn,
    "fp8 e5m2": torch.float8_e5m2,
    "fp8 as bytes": torch.uint8,
}
LAYERS_INSIDE = 3


def as_engine(logical: str, order: tuple[int, ...], dtype: torch.dtype, fill: int) -> torch.Tensor:
    """One layer's tensor as the engine makes it; bytes are random by `fill`, 0 leaves them zero."""
    size = {"L": LAYERS_INSIDE, "P": 2, "B": BLOCKS, "N": TOKENS, "H": HEADS, "D": DIM, "C": 2 * DIM}
    shape = [size[dim] for dim in logical]
    memory = torch.zeros([*(shape[dim] for dim in order[:-1]), shape[order[-1]] * dtype.itemsize], dtype=torch.uint8)
    if fill:
        memory.random_(0, 256, generator=torch.Generator().manual_seed(fill))
    view = memory.view(dtype).permute(*(order.index(dim) for dim in range(len(order))))
    return view[1] if logical[0] == "L" else view


def cells(tensor: torch.Tensor, logical: str) -> torch.Tensor:
    """[block, head, token, plane, byte of the row], whatever the tensor's order."""
    names = logical.removeprefix("L")
    if "C" in names:
        tensor, names = tensor.unflatten(names.index("C"), (2, DIM)), names.replace("C", "PD")
    ordered = tensor.permute(*(names.index(dim) for dim in "BHNPD")).contiguous()
    return ordered.view(torch.uint8).view(*ordered.shape[:-1], -1)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in CUDA_LAYOUTS for kind in ("bf16", "fp8 e4m3")]
    + [("all backends from 0.26, NHD", kind) for kind in CUDA_TYPES if kind not in ("bf16", "fp8 e4m3")],
)
def test_every_layout_of_cuda_is_exchanged_cell_by_cell(name: str, kind: str, tmp_path) -> None:
    (logical, order), dtype = CUDA_LAYOUTS[name], CUDA_TYPES[kind]
    declared = tuple(logical.removeprefix("L"))
    shape = group(row_bytes=DIM * dtype.itemsize)
    source = as_engine(logical, order, dtype, 1)
    store = Store(tmp_path / "root", name, shape)
    store.write(source, declared, 3)
    expected = cells(source, logical)
    loaded = [block for n in range(3) for block in store.blocks_of(n)]
    others = [block for block in range(BLOCKS) if block not in loaded]
    for other_logical, other_order in (CUDA_LAYOUTS[name], ("BHNC", (0, 2, 1, 3)), ("PBNHD", (0, 1, 3, 2, 4))):
        target = as_engine(other_logical, other_order, dtype, 2)
        before = cells(target, other_logical)
        assert store.read(target, tuple(other_logical.removeprefix("L")), 3) == []
        after = cells(target, other_logical)
        assert torch.equal(after[loaded], expected[loaded]), other_logical
        assert torch.equal(after[others], before[others]), other_logical


@pytest.mark.parametrize("name", CUDA_LAYOUTS)
def test_every_layout_of_cuda_round_trips_as_opaque_pages(name: str, tmp_path) -> None:
    logical, order = CUDA_LAYOUTS[name]
    declared = tuple(logical.removeprefix("L"))
    shape = group(kind=OPAQUE, planes=0, row_bytes=0, heads=1)
    source, target = (as_engine(logical, order, torch.bfloat16, fill) for fill in (1, 2))
    store = Store(tmp_path / "root", name, shape)
    store.write(source, declared, 3)
    before = cells(target, logical)
    assert store.read(target, declared, 3) == []
    loaded = [block for n in range(3) for block in store.blocks_of(n)]
    others = [block for block in range(BLOCKS) if block not in loaded]
    assert torch.equal(cells(target, logical)[loaded], cells(source, logical)[loaded])
    assert torch.equal(cells(target, logical)[others], before[others])


def test_padded_pages_and_layers_packed_into_one_block_are_read_by_their_strides(tmp_path) -> None:
    """page_size_padded, and layers of other page sizes between the blocks (block_stride of 0.26)."""
    page, gap, offset = HEADS * TOKENS * 2 * DIM, 4096, 512
    for number, logical in enumerate(("BHNC", "BPNHD")):
        memory = [torch.zeros(BLOCKS * (page + gap), dtype=torch.bfloat16) for _ in range(2)]
        memory[0].view(torch.int16).random_(generator=torch.Generator().manual_seed(1))
        size = {"P": 2, "B": BLOCKS, "N": TOKENS, "H": HEADS, "D": DIM, "C": 2 * DIM}
        inner = torch.empty([size[dim] for dim in logical[1:]], device="meta")
        strides = (page + gap, *inner.stride())
        views = [flat.as_strided((BLOCKS, *inner.shape), strides, offset) for flat in memory]
        store = Store(tmp_path / str(number), logical, group(row_bytes=DIM * 2))
        store.write(views[0], tuple(logical), 3)
        assert store.read(views[1], tuple(logical), 3) == []
        loaded = [block for n in range(3) for block in store.blocks_of(n)]
        assert torch.equal(cells(views[1], logical)[loaded], cells(views[0], logical)[loaded])
        for block in loaded:
            views[1][block] = 0
        assert not memory[1].any(), "nothing but the blocks was written"


def test_latent_rows_with_scales_inside_are_one_plane(tmp_path) -> None:
    """fp8_ds_mla: 656 bytes a token; [blocks, tokens, 656] before 0.29, [blocks, 1, tokens, 656] from there on."""
    shape = group(planes=1, row_bytes=656, heads=1, rank_heads=1, head_size=576)
    store = Store(tmp_path / "root", "latent", shape)
    source = torch.zeros(BLOCKS, TOKENS, 656, dtype=torch.uint8)
    source.random_(0, 256, generator=torch.Generator().manual_seed(1))
    store.write(source, ("B", "N", "C"), 3)
    target = torch.zeros(BLOCKS, 1, TOKENS, 656, dtype=torch.uint8)
    assert store.read(target, LOGICAL, 3) == []
    assert torch.equal(target[1:7, 0], source[1:7]) and not target[7:].any()


def test_pages_of_unknown_content_need_only_their_blocks(tmp_path) -> None:
    shape = group(kind=OPAQUE, planes=0, row_bytes=0, heads=1)
    store = Store(tmp_path / "root", "unknown", shape)
    source, target = numbered(BLOCKS, 4, TOKENS, 72), torch.zeros(BLOCKS, 4, TOKENS, 72)
    store.write(source, None, 3)
    assert store.read(target, None, 3) == []
    assert torch.equal(target[1:7], source[1:7]) and not target[7:].any()
    with pytest.raises(RefusedError, match="2 dimensions may be the 97 blocks"):
        layer_planes(torch.zeros(BLOCKS, 4, 2 * BLOCKS, 72), shape, BLOCKS, None, "layer")


def test_a_cache_that_is_nowhere_to_be_moved_from_is_refused() -> None:
    assert cache_device([torch.zeros(1), torch.zeros(2)]) == "host"
    with pytest.raises(RefusedError, match="is on meta but"):
        cache_device([torch.zeros(1, device="meta")])
    with pytest.raises(RefusedError, match="several devices"):
        cache_device([torch.zeros(1, device="meta"), torch.zeros(1)])


def test_canonical_extents_fit_every_canonical_layout(tmp_path) -> None:
    shape = group()
    store = Store(tmp_path / "root", "exchange", shape)
    source = numbered(BLOCKS, HEADS, TOKENS, 2 * DIM)
    store.write(source, LOGICAL, 3)
    target = torch.zeros(2, BLOCKS, TOKENS, HEADS, DIM)
    assert store.read(target, ("P", "B", "N", "H", "D"), 3) == []
    for block in store.blocks_of(0):
        assert torch.equal(target[:, block], source[block].unflatten(2, (2, DIM)).permute(2, 1, 0, 3))


def test_latent_attention_is_one_plane_with_one_head(tmp_path) -> None:
    shape = group(planes=1, row_bytes=576 * 4, heads=1, rank_heads=1, head_size=576)
    for declared in (("B", "N", "D"), LOGICAL):
        store = Store(tmp_path / "root", str(declared), shape)
        source, target = numbered(BLOCKS, TOKENS, 576), torch.zeros(BLOCKS, TOKENS, 576)
        store.write(source, declared, 3)
        assert store.read(target, declared, 3) == []
        assert torch.equal(target[1:7], source[1:7]) and not target[7:].any()


def test_a_packed_shape_without_declaration_is_refused_where_it_has_two_meanings() -> None:
    ambiguous = numbered(BLOCKS, 16, 16, 2 * DIM)
    with pytest.raises(RefusedError, match="may be"):
        layer_planes(ambiguous, group(rank_heads=16, heads=16), BLOCKS, None, "layer")
    clear = numbered(2, BLOCKS, TOKENS, 4, DIM)
    assert len(layer_planes(clear, group(rank_heads=4, heads=4), BLOCKS, None, "layer")) == 2


def test_tensors_that_do_not_fit_the_group_are_refused() -> None:
    refused = {
        "3 in dimension H where 2": numbered(BLOCKS, 3, TOKENS, 2 * DIM),
        "no multiple of the 97": numbered(BLOCKS + 1, HEADS, TOKENS, 2 * DIM),
        "in dimension C where": numbered(BLOCKS, HEADS, TOKENS, DIM),
        "declares": numbered(BLOCKS, TOKENS, 2 * DIM),
        "not contiguous": numbered(BLOCKS, HEADS, TOKENS, 4 * DIM)[..., ::2],
        "do not follow each other": numbered(2 * BLOCKS, HEADS, TOKENS // 2, 2 * DIM),
    }
    for text, tensor in refused.items():
        with pytest.raises(RefusedError, match=text):
            layer_planes(tensor, group(), BLOCKS, LOGICAL, "layer")


def test_cells_of_another_dtype_than_the_engine_declares_are_refused_by_both_names() -> None:
    cells = torch.zeros(8)
    for foreign in (torch.int16, torch.bfloat16, torch.float64, torch.bool):
        with pytest.raises(RefusedError, match=f"cache tensor of {foreign} where the engine declares torch.float32"):
            check_cells(cells.to(foreign), torch.float32, "layer")
    with pytest.raises(RefusedError, match="complex128: cells of 16 bytes are not kept"):
        check_cells(cells.to(torch.complex128), torch.complex128, "layer")


def test_cells_may_be_viewed_as_any_dtype_of_their_size() -> None:
    one_byte = (torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
    for seen in one_byte:
        for declared in one_byte:
            check_cells(torch.zeros(8, dtype=torch.uint8).view(seen), declared, "layer")
    for seen, declared in ((torch.float32, torch.float32), (torch.int16, torch.bfloat16), (torch.float16, torch.bfloat16)):
        check_cells(torch.zeros(8, dtype=seen), declared, "layer")


def test_overlapping_cells_are_refused_as_pages() -> None:
    overlapping = torch.zeros(100000).as_strided((BLOCKS, HEADS, TOKENS, 2 * DIM), (512, 128, 16, 1))
    with pytest.raises(RefusedError, match="overlap"):
        layer_planes(overlapping, group(kind=OPAQUE), BLOCKS, LOGICAL, "layer")
