import pathlib
import sys
import tempfile

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from faulty_system import FaultySystem  # noqa: E402 found by the line above


@pytest.fixture(params=["memory", "disk"])
def root(request, tmp_path):
    """A path for a root on tmpfs, where it is mapped, and on a disk."""
    if request.param == "disk":
        yield tmp_path / "root"
        return
    with tempfile.TemporaryDirectory(prefix="tokendepot-test-", dir="/dev/shm") as directory:
        yield pathlib.Path(directory) / "root"


@pytest.fixture
def faulty_system(tmp_path):
    return FaultySystem(tmp_path)


@pytest.fixture
def memory_root():
    with tempfile.TemporaryDirectory(prefix="tokendepot-test-", dir="/dev/shm") as directory:
        yield pathlib.Path(directory) / "root"
