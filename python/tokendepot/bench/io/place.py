"""Where the benchmark writes: a directory of its own below each root, and whether there is room for it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from ... import _core
from ...cli import show
from .plan import MIB, Cell, refuse

SPARE_BYTES = 64 * MIB  # left free on every file system


def free_bytes(path: str) -> int:
    system = os.statvfs(path)
    return system.f_bavail * system.f_frsize


def available_memory() -> int:
    """What the machine and the control groups of this process have left."""
    unused = _core.unused_memory()
    return machines_memory() if unused is None else min(unused, machines_memory())


def machines_memory() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    raise OSError("/proc/meminfo has no line MemAvailable")


def check_room(cells: Iterable[Cell]) -> None:
    """Refuses before the first byte is written: every cell must fit its file system and the memory."""
    memory = available_memory()
    for cell in cells:
        free = free_bytes(cell.root.path)
        needed = cell.file_bytes + SPARE_BYTES
        if needed > free:
            refuse(
                f'root "{cell.root.path}" has {show.size(free)} free; {cell.operation} with '
                f"{show.number(cell.processes, 'process')} needs {show.size(needed)}: expected a smaller --volume or more space"
            )
        taken = cell.memory_bytes + (cell.file_bytes if in_memory(cell.root.path) else 0)
        if taken > memory:
            refuse(
                f"{show.size(memory)} of memory are available; {cell.describe()} needs {show.size(taken)}: "
                "expected fewer extents in flight, fewer processes, smaller extents or a smaller --volume"
            )


def in_memory(path: str) -> bool:
    """Whether files there are memory that the machine has no more of elsewhere."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            if before.split()[2] == number:
                return after.split()[0] in ("tmpfs", "ramfs", "hugetlbfs")
    return False


@contextmanager
def own_directory(path: str) -> Iterator[str]:
    """`path`/tokendepot-bench-<random>, made now and removed with all that is in it."""
    try:
        own = tempfile.mkdtemp(prefix="tokendepot-bench-", dir=path)  # by name nobody else's: other hosts have the same pids
    except OSError as error:
        refuse(f'root "{path}" cannot be written: {error.strerror}; expected a directory that can')
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)
