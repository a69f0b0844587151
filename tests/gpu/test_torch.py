"""Caches of PyTorch's under a depot, each in a process of its own: see expandable_segments.py and second_gpu.py."""

import subprocess
import sys
from pathlib import Path

import pytest


def said_by(script: str, root: Path) -> str:
    """Its last line, where it ended well."""
    command = [sys.executable, Path(__file__).with_name(script), root]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture
def gpus() -> int:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU on this machine")
    return torch.cuda.device_count()


def test_a_cache_in_expandable_segments_is_byte_exact_across_their_mappings(gpus, tmp_path):
    assert said_by("expandable_segments.py", tmp_path / "kv") == "exact"


def test_a_depot_on_the_second_gpu_makes_no_context_on_the_first(gpus, tmp_path):
    if gpus < 2:
        pytest.skip("one GPU only")
    assert said_by("second_gpu.py", tmp_path / "kv") == "exact"
