"""One LMCache for the whole run: TOKENDEPOT_LMCACHE_VERSION of those under TOKENDEPOT_LMCACHE (scripts/setup lmcache),
the newest where none is named. Two cannot be imported into one process."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]


def lmcache_folders() -> list[Path]:
    """Folders to import from, LMCache's own first; empty when it was not fetched."""
    cache = Path(os.environ.get("TOKENDEPOT_LMCACHE", REPOSITORY / ".cache" / "lmcache"))
    fetched = sorted(cache.glob("[0-9]*.[0-9]*.[0-9]*"), key=lambda path: [int(n) for n in path.name.split(".")])
    wanted = os.environ.get("TOKENDEPOT_LMCACHE_VERSION")
    chosen = [path for path in fetched if wanted in (None, path.name)]
    return [chosen[-1], cache / "needs"] if chosen else []


FOLDERS = lmcache_folders()
sys.path[:0] = [str(folder) for folder in FOLDERS]
os.environ["LMCACHE_TRACK_USAGE"] = "false"


@pytest.fixture
def environment() -> dict[str, str]:
    """For children that import the same LMCache."""
    paths = [*map(str, FOLDERS), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


@pytest.fixture(params=["/dev/shm", "/var/tmp"], ids=["tmpfs", "disk"])
def root(request: pytest.FixtureRequest) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="tokendepot-lmcache-", dir=request.param))
    yield folder / "depot"
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def memory_root() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="tokendepot-lmcache-", dir="/dev/shm"))
    yield folder / "depot"
    shutil.rmtree(folder, ignore_errors=True)
