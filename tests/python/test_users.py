"""Trial E5: two users on one directory. A root belongs to who made it; another one is refused in one sentence."""

import os
import stat
import subprocess
import sys
import tempfile

import pytest

OWNER, OTHER = 65534, 65533

STORE = """
import numpy.random
from paged import filled_root
become()
filled_root(sys.argv[2])
"""

OPEN = """
from paged import config
from tokendepot import Depot, DepotError
become()
try:
    Depot.open(config(sys.argv[2]))
except DepotError as refused:
    print(f"{refused.kind}: {refused}")
"""

BECOME = """
import os, sys

def become():
    os.setgroups([])
    os.setresgid(0, 0, 0)  # of one group, as pods often are
    os.setresuid(*[int(sys.argv[1])] * 3)
    os.umask(0o022)
"""


def as_user(user, code, root):
    """What goes wrong on the way is in `stderr`; modules are read before the process becomes the user."""
    path = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    command = [sys.executable, "-c", BECOME + code, str(user), root]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60)


@pytest.fixture
def open_directory():
    """One in which every user may make files."""
    if os.geteuid() != 0:
        pytest.skip("not root: no process can become another user")
    with tempfile.TemporaryDirectory(prefix="tokendepot-test-", dir="/tmp") as directory:
        os.chmod(directory, 0o1777)
        yield directory


def test_what_one_user_stored_only_that_user_reads(open_directory):
    root = open_directory + "/root"
    stored = as_user(OWNER, STORE, root)
    assert stored.returncode == 0, stored.stderr
    for directory, _, files in os.walk(root):
        assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700, directory
        for name in files:
            assert stat.S_IMODE(os.stat(os.path.join(directory, name)).st_mode) == 0o600, name

    before = sorted((str(path), names, files) for path, names, files in os.walk(root))
    refused = as_user(OTHER, OPEN, root)
    assert refused.returncode == 0, refused.stderr
    assert refused.stdout.startswith("permission: ") and root in refused.stdout and refused.stdout.count("\n") == 1
    assert sorted((str(path), names, files) for path, names, files in os.walk(root)) == before
    assert as_user(OWNER, OPEN, root).stdout == "", "its owner opens it as before"
