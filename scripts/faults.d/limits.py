"""Limits and forbidden calls of a process: the depot goes another way or refuses with a reason, and stays exact."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from campaign import Campaign, open_or_none
from client import Client, Roots, one_root
from tally import Tally

KIND = "limits and forbidden calls"
BEFORE, UNDER = range(0, 30), range(1000, 1060)
EMFILE_S = 1.0
ENGINE_KEYS = {"io_depth"}  # all others are of the root
NOBODY = 65534

_ALLOW, _ERRNO, _MASKED_EQUAL = (
    0x7FFF0000,
    0x00050000,
    7,
)  # libseccomp's SCMP_ACT_ALLOW, SCMP_ACT_ERRNO, SCMP_CMP_MASKED_EQ


class _Comparison(ctypes.Structure):
    _fields_ = [("argument", ctypes.c_uint), ("operator", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]


def forbid(calls: list[str], error: int, argument: _Comparison | None = None) -> None:
    """From now on these calls of the process fail with `error` (where the argument fits), as in a container."""
    library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    filter_ = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(_ALLOW)))
    arguments = (_Comparison * 1)(argument) if argument else None
    for call in calls:
        number = library.seccomp_syscall_resolve_name(call.encode())
        action = ctypes.c_uint32(_ERRNO | error)
        if library.seccomp_rule_add_array(filter_, action, number, 1 if argument else 0, arguments) != 0:
            raise OSError(f"no filter for {call}")
    if library.seccomp_load(filter_) != 0:
        raise OSError("the filter was refused")


def file_size(limit: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which Python ignores: the engine has to stand it by itself
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def memory_to_lock(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
    if os.geteuid() == 0:  # whom no limit binds
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def few_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


def fallocate_without_space() -> None:
    forbid(["fallocate"], errno.ENOSPC)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Every open fails with EMFILE meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


RING = ["io_uring_setup", "io_uring_enter", "io_uring_register"]
DIRECT = _Comparison(2, _MASKED_EQUAL, os.O_DIRECT, os.O_DIRECT)

# name, what is done to the process before it opens, keys of the root and of the engine, whether refusing is right, too
TRIALS: list[tuple[str, Callable[[], None], dict, bool]] = [
    ("files of at most 256 KiB", lambda: file_size(256 << 10), {}, False),
    ("files of at most 8 KiB", lambda: file_size(8 << 10), {}, True),
    ("64 KiB of memory to lock", lambda: memory_to_lock(64 << 10), {}, False),
    ("64 KiB of memory to lock, io_uring asked for", lambda: memory_to_lock(64 << 10), {"io": "uring"}, True),
    ("no memory to lock", lambda: memory_to_lock(0), {}, False),
    ("8 MiB of memory to lock", lambda: memory_to_lock(8 << 20), {}, False),
    ("8 MiB of memory to lock, a ring of 64", lambda: memory_to_lock(8 << 20), {"io": "uring", "io_depth": 64}, True),
    ("8 MiB of memory to lock, 64 threads", lambda: memory_to_lock(8 << 20), {"io": "threads", "io_depth": 64}, False),
    ("io_uring forbidden (EPERM)", lambda: forbid(RING, errno.EPERM), {}, False),
    ("io_uring forbidden (ENOSYS)", lambda: forbid(RING, errno.ENOSYS), {}, False),
    ("io_uring forbidden though asked for", lambda: forbid(RING, errno.EPERM), {"io": "uring"}, True),
    ("io_uring set up, but not to be used", lambda: forbid(RING[1:], errno.EPERM), {}, False),
    ("no O_DIRECT", lambda: forbid(["openat"], errno.EINVAL, DIRECT), {}, False),
    ("no O_DIRECT though asked for", lambda: forbid(["openat"], errno.EINVAL, DIRECT), {"transport": "direct"}, True),
    ("no fallocate (EOPNOTSUPP)", lambda: forbid(["fallocate"], errno.EOPNOTSUPP), {}, False),
    ("no fallocate (EINVAL)", lambda: forbid(["fallocate"], errno.EINVAL), {}, False),
    ("fallocate without space", fallocate_without_space, {}, True),
    ("64 descriptors", few_descriptors, {}, False),
]


def store_and_load(roots: Roots, prompts: range, loads: Sequence[int], hinder: Callable[[], None] | None = None):
    """Stores `prompts`, tells which were acknowledged and what `loads` bring."""

    def body(tell) -> None:
        if hinder:
            hinder()
        before = open_descriptors()
        client = open_or_none(roots)
        if client is None:
            tell(["refused", None])
            tell(["descriptors", [before, open_descriptors()]])
            return
        if hinder is None:
            for prompt in client.store_all(prompts):
                tell(["stored", prompt])
        else:
            for prompt in prompts:
                if client.store(prompt):
                    tell(["stored", prompt])
        for prompt in loads:
            tell(["loaded", [prompt, client.load(prompt)]])
        client.close()
        tell(["descriptors", [before, open_descriptors()]])

    return body


def lose_descriptors(roots: Roots):
    """Opens of segments of an earlier process and of new ones fail for a while, then all goes on in the same process."""

    def body(tell) -> None:
        before = open_descriptors()
        client = Client(roots)
        with no_descriptor_left():
            end = time.monotonic() + EMFILE_S
            for prompt in itertools.cycle(BEFORE):
                if (found := client.load(prompt)) is not None:
                    tell(["during", [prompt, found]])
                if client.store(UNDER[prompt]):
                    tell(["stored", UNDER[prompt]])
                if time.monotonic() > end:
                    break
        for prompt in client.store_all(UNDER):
            tell(["stored", prompt])
        for prompt in [*BEFORE, *UNDER]:
            tell(["loaded", [prompt, client.load(prompt)]])
        client.close()
        tell(["descriptors", [before, open_descriptors()]])

    return body


def run(campaign: Campaign) -> Tally:
    tally = Tally(KIND)
    for seed, _ in campaign.series(120 if campaign.long else 0, tally):
        for name, hinder, keys, may_refuse in TRIALS:
            for disk in (True, False):
                where = f"seed {seed}, {name}, {'disk' if disk else 'memory'}"
                with campaign.directory(disk=disk) as path:
                    _trial(campaign, tally, where, one_root(path, 64 << 20, 512 << 10), hinder, keys, may_refuse)
        for disk in (True, False):
            with campaign.directory(disk=disk) as path:
                where = f"seed {seed}, no descriptor left for a while, {'disk' if disk else 'memory'}"
                _trial_without_descriptors(campaign, tally, where, one_root(path, 64 << 20, 512 << 10))
    return tally


def _check_descriptors(told: list, tally: Tally, where: str) -> None:
    for before, after in (what for kind, what in told if kind == "descriptors"):
        if after > before:
            tally.fail("deaths", f"{where}: {after - before} descriptors more are open after it than before")


def _trial_without_descriptors(campaign: Campaign, tally: Tally, where: str, roots: Roots) -> None:
    before = campaign.run(store_and_load(roots, BEFORE, []), tally, where)
    acknowledged = [what for kind, what in before if kind == "stored"]
    told = campaign.run(lose_descriptors(roots), tally, where)
    tally.injected += 1
    _check_descriptors(told, tally, where)
    acknowledged += dict.fromkeys(what for kind, what in told if kind == "stored")
    loaded = dict(what for kind, what in told if kind == "loaded")
    tally.checked += len(loaded)
    for found in filter(None, [*loaded.values(), *(what[1] for kind, what in told if kind == "during")]):
        tally.fail("wrong", f"{where}: {found}")
    for prompt in acknowledged:
        if prompt in loaded and loaded[prompt] is None:
            tally.fail("lost", f"{where}: prompt {prompt} is missed by the process that had no descriptors")
    unstored = set(UNDER) - set(acknowledged)
    if unstored:
        tally.fail("hangs", f"{where}: {len(unstored)} of {len(UNDER)} prompts could not be stored after it")
    campaign.check(roots, acknowledged, [], tally, where)


def _trial(campaign: Campaign, tally: Tally, where: str, roots: Roots, hinder, keys: dict, may_refuse: bool) -> None:
    path = Path(roots.roots[0][0])
    before = campaign.run(store_and_load(roots, BEFORE, BEFORE), tally, where)
    acknowledged = [what for kind, what in before if kind == "stored"]
    if os.geteuid() == 0:
        for each in [path, *path.rglob("*")]:
            os.chown(each, NOBODY, NOBODY)
    # Where no file can be made, the oldest segments are written over, while the next one is made ahead: loads of some
    # would make others the oldest.
    evicts = hinder is fallocate_without_space
    loads = [] if evicts else [*BEFORE, *UNDER]
    engine = {key: value for key, value in keys.items() if key in ENGINE_KEYS}
    root = {key: value for key, value in keys.items() if key not in ENGINE_KEYS}
    told = campaign.run(
        store_and_load(roots.having(**engine).with_root_keys(**root), UNDER, loads, hinder), tally, where
    )
    tally.injected += 1
    _check_descriptors(told, tally, where)
    if ["refused", None] in told:
        if not may_refuse:
            tally.fail("deaths", f"{where}: the depot refused to open, which should have gone another way")
        told = []
    loaded = dict(what for kind, what in told if kind == "loaded")
    tally.checked += len(loaded)
    acknowledged += [what for kind, what in told if kind == "stored"]
    for found in filter(None, loaded.values()):
        tally.fail("wrong", f"{where}: {found}")
    campaign.check(roots, acknowledged, [], tally, where, spared_oldest=evicts)
