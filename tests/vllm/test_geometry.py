"""Cache tensors to addresses: by the engine's declaration, never by shape alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tokendepot import _core
from tokendepot.engines.vllm.geometry import attach_arguments, layer_planes
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


class Store:
    """A depot in a fresh root, through which one tensor's blocks are written and read back."""

    def __init__(self, root, name: str, shape: Group) -> None:
        self.config = f'{{"roots":["{root}?capacity=64MiB"],"free_space_reserve":"1MiB","slab":"16MiB"}}'
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


def test_overlapping_cells_are_refused_as_pages() -> None:
    overlapping = torch.zeros(100000).as_strided((BLOCKS, HEADS, TOKENS, 2 * DIM), (512, 128, 16, 1))
    with pytest.raises(RefusedError, match="overlap"):
        layer_planes(overlapping, group(kind=OPAQUE), BLOCKS, LOGICAL, "layer")
