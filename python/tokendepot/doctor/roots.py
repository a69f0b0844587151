"""Findings on a directory that is a root, or is to be one. It is never made."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from typing import Any

from .. import _core
from ..cli import damage
from ..cli.show import number, size
from .findings import FALLBACK, OK, PROBLEM, Finding, reason
from .host import Host
from .machine import guarded

MEMORY = ("tmpfs", "ramfs", "hugetlbfs")
RESERVE = _core.parse_options('{"roots":["/depot?capacity=1GiB"]}')["free_space_reserve"]  # what engines leave free
SMALLEST_SEGMENT = 1 << 20  # of those that engines choose by themselves
SEGMENTS_LEAST = 3
FEW_INODES = 1000
CLOCK_TOLERANCE_S = 60.0  # file servers stamp files with clocks of their own


def examine(host: Host, path: str, options: dict[str, Any] | None = None) -> list[Finding]:
    """Findings on `path`, absolute, and on "capacity" and "segment" of `options` where they are given.

    Where there is no such path yet, its parent is examined, in which the depot would make it.
    """
    place, below = _place(path)
    if below is None:
        return [place]
    missing = below != path
    content, info = (None, None) if missing else _content(path)
    findings = [place]
    if content is not None:
        findings.append(content)
    system = host.file_system(below)
    findings.append(guarded("file system", lambda: _file_system(host, below, system)))
    if system in MEMORY:
        findings.append(guarded("transport", lambda: _mapped(host, below, system)))
    elif missing or info is not None or (content is not None and content.state != PROBLEM):
        findings.append(guarded("transport", lambda: _transport(host, below, missing, info)))
    findings.append(guarded("space", lambda: _space(host, below, info)))
    if options:
        findings.append(guarded("capacity", lambda: _capacity(host, below, system, options, info)))
    findings.append(guarded("inodes", lambda: _inodes(host, below)))
    if info is not None:
        findings.append(guarded("clock", lambda: _clock(host, path, info)))
    return findings


def _place(path: str) -> tuple[Finding, str | None]:
    """What is at `path`, and the directory to examine: `path`, its parent when it is missing, None when it cannot be."""
    name = "path"
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return _missing(path)
    except OSError as error:
        fix = "Give the user that runs the engine access to all directories above."
        if isinstance(error, NotADirectoryError):
            fix = "Name a path whose parents are directories."
        return Finding(name, f"cannot be reached: {reason(error)}", PROBLEM, fix), None
    if not stat.S_ISDIR(mode):
        return Finding(name, "not a directory", PROBLEM, "Name a directory, or a path where none is yet."), None
    link = f", a symbolic link to {os.path.realpath(path)}" if os.path.islink(path) else ""
    if not os.access(path, os.R_OK | os.X_OK):
        return Finding(name, f"a directory that cannot be read{link}", PROBLEM, "Change its owner or its mode."), None
    if os.access(path, os.W_OK):
        return Finding(name, f"a writable directory{link}"), path
    fix = "Change its owner or its mode, or remount it, so that it stores, too; what it holds is served."
    if not os.path.exists(os.path.join(path, "DEPOT")):
        return Finding(name, f"cannot be written{link}", PROBLEM, "Change its owner or its mode, or remount it."), path
    return Finding(name, f"cannot be written: serves only{link}", FALLBACK, fix), path


def _missing(path: str) -> tuple[Finding, str | None]:
    if os.path.islink(path):
        value = f"a symbolic link to {os.readlink(path)}, which is not there"
        return Finding("path", value, PROBLEM, "Make the directory that it leads to, or remove the link."), None
    parent = os.path.dirname(path)
    if not os.path.isdir(parent):
        value = f"missing, and so is its parent {parent}"
        return Finding("path", value, PROBLEM, "Make the parent: a depot makes its own directory only."), None
    if not os.access(parent, os.W_OK | os.X_OK):
        value = f"missing, and {parent} cannot be written"
        return Finding("path", value, PROBLEM, "Make the directory, owned by the user that runs the engine."), None
    return Finding("path", f"missing: an engine would make it in {parent}"), parent


def _content(path: str) -> tuple[Finding, dict[str, Any] | None]:
    """What the directory holds; the root as `inspect_root` tells it, when it is one."""
    try:
        names = [name for name in os.listdir(path) if name != "lost+found" and not name.startswith(".tmp-")]
    except OSError as error:
        return Finding("content", reason(error), PROBLEM, "Check the medium and the permissions."), None
    if not names:
        return Finding("content", "empty"), None
    if "DEPOT" not in names:
        value = f'holds something else ("{min(names)}") and no DEPOT marker'
        return Finding("content", value, PROBLEM, "Give the depot a directory of its own."), None
    try:
        info = _core.inspect_root(path)
    except _core.DepotError as error:
        fixes = {
            "corrupt": "Restore the marker from a copy, or move the directory away and begin a new one.",
            "unsupported": "Use the version that wrote it, or a new directory.",
            "permission": "Run as the user that runs the engine, or change owner or mode.",
        }
        return Finding("content", str(error), PROBLEM, fixes.get(error.kind, "Check the medium.")), None
    value = (
        f"a depot of format {info['format_version']}: {number(len(info['namespaces']), 'namespace')}, "
        f"{number(info['extents'], 'extent')}, {size(info['live_bytes'])}"
    )
    if damaged := damage.files(info):
        value += f"; {number(len(damaged), 'damaged file')}, first {damaged[0]['file']}"
        return Finding("content", value, PROBLEM, "See tokendepot verify, and check the medium; the rest is served."), info
    return Finding("content", value), info


def _file_system(host: Host, path: str, kind: str) -> Finding:
    name = kind or "not in the mount table"
    read_only = bool(host.space(path).f_flag & os.ST_RDONLY)
    if read_only:
        return Finding("file system", f"{name}, mounted read-only", FALLBACK, "Remount it writable if engines are to store.")
    if kind == "overlay":
        fix = "Mount a volume: the layer of a container is slow and goes with it."
        return Finding("file system", name, FALLBACK, fix)
    return Finding("file system", name)


def _mapped(host: Host, path: str, kind: str) -> Finding:
    space = host.space(path)
    total, limited = space.f_blocks * space.f_frsize, host.memory_limit()
    value = f"mapped: {kind} is memory"
    if limited is not None and limited[0] < total:
        fix = "Keep capacity well below that limit: these files count as memory of the group, and engines use 3/4 of it at most."
        return Finding("transport", f"{value}, limited to {size(limited[0])}", FALLBACK, fix)
    return Finding("transport", value)


def _transport(host: Host, directory: str, missing: bool, info: dict[str, Any] | None) -> Finding:
    fix = "Put the root on a file system with O_DIRECT, such as ext4 or XFS on a disk; the page cache is used here."
    if not os.access(directory, os.W_OK):
        # Nothing may be written, so an engine does not try; a segment that is there tells.
        known = (info or {}).get("transport") or "direct"
        return Finding("transport", f"{known}, not tried", *((FALLBACK, fix) if known == "buffered" else ()))
    try:
        smallest = host.smallest_direct_transfer(directory, may_name=not missing)
    except OSError as error:
        if missing and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return Finding("transport", f"not known before the directory is made: {reason(error)}")
        return Finding("transport", f"buffered: O_DIRECT refused, {reason(error)}", FALLBACK, fix)
    if smallest is None:
        return Finding("transport", "buffered: O_DIRECT wants more than 4096 bytes alignment", FALLBACK, fix)
    return Finding("transport", f"direct: O_DIRECT, alignment {smallest} bytes")


def _space(host: Host, path: str, info: dict[str, Any] | None) -> Finding:
    space = host.space(path)
    free, total = space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize
    value = f"{size(free)} free of {size(total)}"
    if free >= RESERVE:
        return Finding("space", value)
    why = f"less than the {size(RESERVE)} that engines leave free (free_space_reserve)"
    if info is not None and info["segments"]:
        return Finding("space", f"{value}, {why}", FALLBACK, "Free space there: no segment can be added, old ones are reused.")
    return Finding("space", f"{value}, {why}", PROBLEM, "Free space there or enlarge it: nothing would be stored.")


def _capacity(host: Host, path: str, kind: str, options: dict[str, Any], info: dict[str, Any] | None) -> Finding:
    name = "capacity"
    space, wanted = host.space(path), options["capacity"]
    total, free = space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize
    value = size(wanted)
    if wanted > total:
        return Finding(name, f"{value}, larger than its file system of {size(total)}", PROBLEM, "Lower capacity, or enlarge the file system.")
    segment = SMALLEST_SEGMENT if options["segment"] == "auto" else options["segment"]
    if wanted < SEGMENTS_LEAST * segment:
        least = size(SEGMENTS_LEAST * segment)
        return Finding(name, f"{value}, less than {SEGMENTS_LEAST} segments", PROBLEM, f"Give {least} at least, or a smaller segment.")
    limited = host.memory_limit() if kind in MEMORY else None
    if limited is not None and wanted > limited[0] // 4 * 3:
        fix = "Lower capacity, or raise the memory limit."
        return Finding(name, f"{value}, of which engines use 3/4 of the limit of {size(limited[0])}", FALLBACK, fix)
    held = info["file_bytes"] if info is not None else 0
    if wanted > held + max(0, free - RESERVE):
        fix = "Free space there, or lower capacity: stores stop, or use old segments again, where the file system ends."
        return Finding(name, f"{value}, more than is free", FALLBACK, fix)
    return Finding(name, value)


def _inodes(host: Host, path: str) -> Finding:
    space = host.space(path)
    if space.f_files == 0:
        return Finding("inodes", "made as needed")
    value = f"{space.f_favail:,} free of {space.f_files:,}"
    if space.f_favail == 0:
        return Finding("inodes", value, PROBLEM, "Remove files there: no segment can be made.")
    if space.f_favail < FEW_INODES:
        return Finding("inodes", value, FALLBACK, "Remove files there: a depot takes one for each segment.")
    return Finding("inodes", value, OK)


def _times(path: str, info: dict[str, Any]) -> Iterator[tuple[float, str]]:
    """Times of last change of marker, journals and segments, and times of last use in the journals."""
    files = ["DEPOT", *(f"journals/{j['file']}" for j in info["journals"]), *(f"segments/{s['file']}" for s in info["segments"])]
    for file in files:
        try:
            yield os.stat(os.path.join(path, file)).st_mtime, file
        except FileNotFoundError:
            continue  # evicted since
    for segment in info["segments"]:
        yield segment["last_used"], f"last use of segments/{segment['file']}"


def _clock(host: Host, path: str, info: dict[str, Any]) -> Finding:
    newest, what = max(_times(path, info))
    ahead = newest - host.now()
    if ahead <= CLOCK_TOLERANCE_S:
        return Finding("clock", "nothing in the root is from the future")
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(newest))
    fix = "Compare the clocks of all hosts that use the root: what is from the future is evicted last; hits are not concerned."
    return Finding("clock", f"{what} is of {when}, {ahead:,.0f} s ahead of this host", PROBLEM, fix)
