"""The self-test with caches that the harness does not make."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokendepot import _core
from tokendepot.engines.vllm import self_test, versions
from tokendepot.engines.vllm.geometry import attach_arguments, block_cells, layer_planes
from tokendepot.engines.vllm.groups import CANONICAL, FULL, Group
from tokendepot.engines.vllm.settings import RefusedError

BLOCKS, HEADS, LAYERS = 8, 2, 3
DECLARED = ("B", "H", "N", "C")


def lent(dtype: torch.dtype, made_in=contextlib.nullcontext, *, blocks: int = BLOCKS, splits: int = 1) -> self_test.Lent:
    """Caches of zeros; with `splits` the engine's kernels have that many blocks for each of the pool's."""
    with made_in():
        shape = (blocks * splits, HEADS, 16, 64)
        tensors = [torch.zeros(shape, dtype=dtype) for _ in range(LAYERS)]
        if splits > 1:  # tokens of a block follow each other
            tensors = [tensor.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3) for tensor in tensors]
    row, tokens = 32 * dtype.itemsize, 16 * splits
    group = Group(
        index=0,
        attention=FULL,
        window=0,
        block_tokens=tokens,
        chunk_tokens=4 * tokens,
        stored_tokens=4 * tokens,
        kind=CANONICAL,
        planes=2,
        row_bytes=row,
        page_bytes=2 * HEADS * tokens * row,
        heads=HEADS,
        rank_heads=HEADS,
        replicas=1,
        head_size=32,
        layer_names=tuple(f"layer{number}" for number in range(LAYERS)),
        layers=LAYERS,
    )
    named = list(zip(tensors, group.layer_names, strict=True))
    planes = [layer_planes(tensor, group, blocks, DECLARED, name) for tensor, name in named]
    cells = [block_cells(tensor, group, blocks, DECLARED, name) for tensor, name in named]
    return self_test.Lent(attach_arguments(group, (0, LAYERS, 0, HEADS), blocks, planes), cells)


@pytest.mark.parametrize("made_in", (contextlib.nullcontext, torch.inference_mode))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.uint8))
def test_caches_of_every_type_pass_and_are_put_back(dtype, made_in, capfd) -> None:
    group = lent(dtype, made_in)
    self_test.run([group], "host")
    assert not any(cells.of(block).any() for cells in group.cells for block in range(BLOCKS))
    assert "ERROR" not in capfd.readouterr().err


def test_blocks_that_kernels_split_pass() -> None:
    self_test.run([lent(torch.bfloat16, splits=2)], "host")


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8))
def test_two_layers_in_one_place_are_found(dtype) -> None:
    group = lent(dtype)
    layers = group.arguments["layers"]
    mixed = self_test.Lent({**group.arguments, "layers": [layers[0], layers[0], layers[2]]}, group.cells)
    with pytest.raises(RefusedError, match="self-test: layer 1 of group 0 came back with other bytes"):
        self_test.run([mixed], "host")


def test_a_pool_of_one_block_cannot_be_tested() -> None:
    with pytest.raises(RefusedError, match="the pool has 1 blocks, but two are needed"):
        self_test.run([lent(torch.bfloat16, blocks=1)], "host")


def test_the_directory_has_room_and_may_be_written_to(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(self_test.tempfile, "gettempdir", lambda: str(tmp_path))
    with pytest.raises(self_test.NoRoomError, match="no temporary directory has room"):
        self_test._directory_for(1 << 60)
    monkeypatch.setattr(os, "access", lambda path, mode: path == str(tmp_path))
    assert Path(self_test._directory_for(1 << 20)).parent == tmp_path


def test_a_directory_that_cannot_be_made_does_not_rule_out_the_other(tmp_path, monkeypatch) -> None:
    made = self_test.tempfile.mkdtemp

    def without(refused: str):
        def mkdtemp(prefix: str, dir: str) -> str:
            if dir == refused:
                raise OSError(errno.ENOSPC, "no inode is free", dir)
            return made(prefix=prefix, dir=tmp_path)

        return mkdtemp

    def nowhere() -> str:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr(os, "access", lambda path, mode: True)
    monkeypatch.setattr(self_test.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 30))
    monkeypatch.setattr(self_test.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(self_test.tempfile, "mkdtemp", without("/dev/shm"))
    assert Path(self_test._directory_for(1 << 20)).parent == tmp_path
    monkeypatch.setattr(self_test.tempfile, "gettempdir", nowhere)
    monkeypatch.setattr(self_test.tempfile, "mkdtemp", without("elsewhere"))
    assert Path(self_test._directory_for(1 << 20)).parent == tmp_path


def test_space_that_others_take_meanwhile_is_no_fault(monkeypatch, caplog) -> None:
    monkeypatch.setattr(versions, "log", logging.getLogger("tokendepot-self-test"))
    group = lent(torch.bfloat16)
    opened = _core.Depot.open

    def without_space(config: str, **named):
        return opened(json.dumps({**json.loads(config), "free_space_reserve": 1 << 60}), **named)

    monkeypatch.setattr(self_test, "_core", SimpleNamespace(**{**vars(_core), "Depot": SimpleNamespace(open=without_space)}))
    self_test.run([group], "host")
    assert "no self-test: storing a block of group 0 found no space" in caplog.text
