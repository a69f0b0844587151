"""What bench/ttft_gpu gives LMCache's server, which runs on a GPU only: LMCache takes it, and it works."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

pytest.importorskip("lmcache", reason="LMCache was not fetched: scripts/setup lmcache")

from storage import Storage, content, key, memory

BENCH = Path(__file__).resolve().parents[2] / "bench" / "ttft_gpu"


@pytest.mark.parametrize("system", ["lmcache", "lmcache-depot"])
def test_both_storages_are_made_by_lmcache_and_keep_chunks(
    memory_root: Path, system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    systems = importlib.import_module("systems")
    assert systems.SYSTEMS[system].restarts
    assert systems.transfer_config(system, "", "", {})["kv_connector"] == "LMCacheMPConnector"
    memory_root.mkdir(mode=0o700)
    for _ in range(2):  # the second stands for the server after its restart
        with Storage(systems.lmcache_storage(system, str(memory_root), "256MiB")) as storage:
            if storage.found([key(1)]) == [False]:
                assert storage.store([key(1)], [memory(1 << 20, 1)])
            back = memory(1 << 20)
            assert storage.load([key(1)], [back]) == [True] and content(back) == content(memory(1 << 20, 1))
