"""`tokendepot bench ttft` against a real vLLM on the CPU, with a depot and without: counts, caches, the comparison."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "demo.d"))

import model as checkpoint
import server

CONTEXTS = (600, 1500)
START_LIMIT_S = 600
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return checkpoint.prepare(tmp_path_factory.mktemp("models"), tiny=True)[0]


@contextmanager
def serving(tiny: Path, log: Path, root: str | None) -> Iterator[str]:
    config = server.kv_transfer_config([root]) if root else None
    if config is not None:  # hits are loaded, whatever this machine measures
        config = json.dumps(json.loads(config) | {"kv_connector_extra_config": {"roots": [root], "min_load_tokens": 256}})
    environment = {**server.vllm_environment(kv_cache_gib=1), "VLLM_SERVER_DEV_MODE": "1"}  # for /reset_prefix_cache

    def command(port: int) -> list[str]:
        return [*server.vllm_command(tiny, port, 2048, config), "--chat-template", TEMPLATE]

    one = server.Server(command, environment, log)
    try:
        one.wait_ready(START_LIMIT_S, lambda waited: None)
        yield one.client.url
    finally:
        one.kill()


def bench(url: str, out: Path, *options: str) -> tuple[dict, str]:
    command = [sys.executable, "-c", "from tokendepot.cli import main; main()", "bench", "ttft", "--url", url]
    command += ["--contexts", ",".join(map(str, (*CONTEXTS, 4000))), "--answer-tokens", "8", "--out", str(out), *options]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "160"}, timeout=600)
    assert out.exists() and "Traceback" not in ended.stderr, ended.stderr
    return json.loads(out.read_text()), ended.stdout


def test_a_real_server_is_measured_with_a_depot_and_without(tiny: Path, tmp_path: Path) -> None:
    with serving(tiny, tmp_path / "off.log", None) as url:
        off, _ = bench(url, tmp_path / "off.json", "--cold-gpu")
        off["client"]["saturated"] = False  # on a busy machine it is, and would be refused as a base
        (tmp_path / "off.json").write_text(json.dumps(off))
        chat, _ = bench(url, tmp_path / "chat.json", "--endpoint", "chat", "--repeats", "1")
    with tempfile.TemporaryDirectory(prefix="tokendepot-test-", dir="/dev/shm") as directory:
        with serving(tiny, tmp_path / "on.log", f"{directory}/depot?capacity=1GiB") as url:
            on, output = bench(url, tmp_path / "on.json", "--cold-gpu", "--compare", str(tmp_path / "off.json"))
    for result in (off, on):
        assert result["tokens"]["sent_as"] == "token ids" and result["problems"] == []
        assert [entry["context"] for entry in result["skipped"]] == [4000]
        for record in result["requests"]:
            assert "error" not in record
            if record["turn"] == 1:
                assert record["prompt_tokens"] == record["context"]
            else:
                assert record["common_prefix"] == record["context"]
    for cell in (cell for cell in on["summary"] if cell["turn"] == 2):
        assert cell["cached_tokens"] >= cell["context"] // 256 * 256 and cell["own_cache_tokens"] == 0
        assert cell["external_cache_tokens"] > 0
    assert all(not cell["cached_tokens"] for cell in off["summary"])
    assert [reason for reason in on["comparison"]["refused"] if "saturated" not in reason] == []
    assert "ON t1" in output and "difference" in output
    cold = [record for record in chat["requests"] if record["turn"] == 1]
    assert [record["prompt_tokens"] for record in cold] == list(CONTEXTS)
