"""Limits and forbidden calls of a process: the depot goes another way or refuses with a reason, and stays exact."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from campaign import Campaign, open_or_none
from client import Roots, one_root
from tally import Tally

KIND = "limits and forbidden calls"
BEFORE, UNDER = range(0, 30), range(1000, 1060)
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


RING = ["io_uring_setup", "io_uring_enter", "io_uring_register"]
DIRECT = _Comparison(2, _MASKED_EQUAL, os.O_DIRECT, os.O_DIRECT)

# name, what is done to the process before it opens, keys of the root, whether refusing is right, too
TRIALS: list[tuple[str, Callable[[], None], dict, bool]] = [
    ("files of at most 256 KiB", lambda: file_size(256 << 10), {}, False),
    ("files of at most 8 KiB", lambda: file_size(8 << 10), {}, True),
    ("64 KiB of memory to lock", lambda: memory_to_lock(64 << 10), {}, False),
    ("64 KiB of memory to lock, io_uring asked for", lambda: memory_to_lock(64 << 10), {"io": "uring"}, True),
    ("no memory to lock", lambda: memory_to_lock(0), {}, False),
    ("io_uring forbidden (EPERM)", lambda: forbid(RING, errno.EPERM), {}, False),
    ("io_uring forbidden (ENOSYS)", lambda: forbid(RING, errno.ENOSYS), {}, False),
    ("io_uring forbidden though asked for", lambda: forbid(RING, errno.EPERM), {"io": "uring"}, True),
    ("io_uring set up, but not to be used", lambda: forbid(RING[1:], errno.EPERM), {}, False),
    ("no O_DIRECT", lambda: forbid(["openat"], errno.EINVAL, DIRECT), {}, False),
    ("no O_DIRECT though asked for", lambda: forbid(["openat"], errno.EINVAL, DIRECT), {"transport": "direct"}, True),
    ("no fallocate", lambda: forbid(["fallocate"], errno.EOPNOTSUPP), {}, False),
    ("fallocate without space", fallocate_without_space, {}, True),
    ("64 descriptors", few_descriptors, {}, False),
]


def store_and_load(roots: Roots, prompts: range, loads: Sequence[int], hinder: Callable[[], None] | None = None):
    """Stores `prompts`, tells which were acknowledged and what `loads` bring."""

    def body(tell) -> None:
        if hinder:
            hinder()
        client = open_or_none(roots)
        if client is None:
            tell(["refused", None])
            return
        if hinder is None:
            for prompt in client.store_all(prompts):
                tell(["stored", prompt])
        else:
            descriptors = set()
            for prompt in prompts:
                if client.store(prompt):
                    tell(["stored", prompt])
                descriptors.add(len(os.listdir("/proc/self/fd")))
            tell(["descriptors", max(descriptors)])
        for prompt in loads:
            tell(["loaded", [prompt, client.load(prompt)]])
        client.close()

    return body


def run(campaign: Campaign) -> Tally:
    tally = Tally(KIND)
    for seed, _ in campaign.series(120 if campaign.long else 0):
        for name, hinder, keys, may_refuse in TRIALS:
            for disk in (True, False):
                where = f"seed {seed}, {name}, {'disk' if disk else 'memory'}"
                with campaign.directory(disk=disk) as path:
                    _trial(campaign, tally, where, one_root(path, 64 << 20, 512 << 10), hinder, keys, may_refuse)
    return tally


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
    told = campaign.run(store_and_load(roots.with_root_keys(**keys), UNDER, loads, hinder), tally, where)
    tally.injected += 1
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
