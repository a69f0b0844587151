"""PyTorch's expandable segments under a depot: see expandable_segments.py."""

import subprocess
import sys
from pathlib import Path

import pytest


def test_a_cache_in_expandable_segments_is_byte_exact_across_their_mappings(tmp_path):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU on this machine")
    script = Path(__file__).with_name("expandable_segments.py")
    done = subprocess.run([sys.executable, script, tmp_path / "kv"], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["exact"]), done.stdout + done.stderr
