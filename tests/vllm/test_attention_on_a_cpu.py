"""The demo compares answers of engines on a CPU: what it starts them with must leave nothing to chance."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts/demo.d"))
import server  # noqa: E402


@pytest.mark.skipif(server.has_gpu(), reason="vLLM computes on the GPU here")
def test_what_scratch_memory_holds_changes_no_token_of_the_demos_engines():
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("attention_probe.py"))],
        env=server.vllm_environment(kv_cache_gib=1), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == ["0 of 20 wrong"], done.stdout + done.stderr[-2000:]
