"""What is to be measured: axes as the user writes them, checked, and the cells that they span."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ... import _core
from .. import shapes

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PAGE = 4096
LARGEST_EXTENT = 256 * MIB
OPERATIONS = ("read", "write", "mixed", "burst")
MOST_IN_FLIGHT = 1024
MOST_PROCESSES = 256
DEFAULT_VOLUME = 512 * MIB


def refuse(sentence: str) -> NoReturn:
    """Bad input: one sentence for the user, exit code 2."""
    error = _core.DepotError(sentence)
    error.kind = "invalid_argument"
    raise error


@dataclass(frozen=True)
class Root:
    """A directory to measure below, and the keys of a root's configuration that came with it."""

    path: str
    keys: dict[str, Any] = field(hash=False)
    capacity: int = 0  # 0 = as much as the cell needs


@dataclass(frozen=True)
class Cell:
    """One combination: a depot for each process, `in_flight` extents (or, with burst, requests) at a time."""

    root: Root
    devices: tuple[str, ...]
    operation: str
    sizes: tuple[int, ...]
    in_flight: int
    processes: int
    request_extents: int
    volume: int  # payload on the medium, of each process

    def describe(self) -> str:
        size = "+".join(size_text(one) for one in self.sizes)
        return f"{self.root.path} {self.device} {self.operation} {size} x {self.in_flight} x {self.processes}"

    @property
    def device(self) -> str:
        return "+".join(self.devices)

    @property
    def stored_bytes(self) -> int:
        """`volume` with the header of each extent."""
        each = sum(self.sizes)
        return self.volume // each * (each + len(self.sizes) * 2 * PAGE)

    @property
    def segment_bytes(self) -> int:
        given = self.root.keys.get("segment", "auto")
        if given != "auto":
            return given
        least = 2 * (max(self.sizes) + 16 * PAGE)
        return _pages(max(MIB, min(64 * MIB, self.stored_bytes // 8), least))

    @property
    def capacity(self) -> int:
        return self.root.capacity or self.least_capacity

    @property
    def least_capacity(self) -> int:
        """Bytes of segment files that a process needs: what is read stays, what is written goes round."""
        passes = {"read": 1, "burst": 1, "write": 2, "mixed": 3}[self.operation]
        largest = max(self.sizes) + 2 * PAGE
        segment = max(self.segment_bytes, largest)  # the engine makes it so large
        # What does not fit any more leaves the end of a segment empty; two in a row hold more than one.
        unfilled = largest if len(self.sizes) > 1 else segment % largest
        segments = -(-passes * self.stored_bytes // max(segment - unfilled, segment // 2))
        return _pages((segments + 8) * segment)

    @property
    def file_bytes(self) -> int:
        """The most that all processes write at once, the limit's own files included."""
        return self.processes * (self.capacity + self.volume)

    @property
    def memory_bytes(self) -> int:
        """The most that all processes take: paged cache, staging memory, buffers of the limit."""
        burst = self.request_extents if self.operation == "burst" else 1
        of_each = -(-self.in_flight // len(self.sizes)) * burst
        moved = sum(max(of_each * size, min(256 * MIB, self.volume) // len(self.sizes)) for size in self.sizes)
        other = sum(max(2 * size, 64 * MIB) for size in self.sizes)
        cache = 2 * moved if self.operation == "mixed" else moved + other
        limit = min(self.in_flight * burst * max(self.sizes), max(GIB, 4 * max(self.sizes)))
        return self.processes * (cache + self.slab_bytes + limit)

    @property
    def slab_bytes(self) -> int:
        return max(256 * MIB, 4 * max(self.sizes), min(self.in_flight * max(self.sizes), GIB))


@dataclass(frozen=True)
class Plan:
    """Everything that `tokendepot bench io` was asked for."""

    cells: tuple[Cell, ...]
    seconds: float
    rounds: int
    verify_every: int  # 0 = not at all
    keep_cache: bool
    engine: dict[str, Any]


def size_text(count: int) -> str:
    """The size as users write it, without loss: "2.5MiB", "116992"."""
    for unit, text in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        halves = count * 4 / unit
        if count >= unit and halves == int(halves):
            return f"{count / unit:g}{text}"
    return str(count)


def _pages(count: int) -> int:
    return (count + PAGE - 1) // PAGE * PAGE


def _items(option: str, text: str) -> list[str]:
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        refuse(f'{option} is "{text}"; expected a list such as "a,b" without empty items')
    return list(dict.fromkeys(items))


def _count(option: str, text: str, most: int) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or not 1 <= int(text) <= most:
        refuse(f'{option} has the value "{text}"; expected whole numbers from 1 to {most}')
    return int(text)


def _size(option: str, text: str) -> int:
    try:
        count = _core.parse_size(text)
    except _core.DepotError as error:
        refuse(f"{option}: {error}")
    if count < PAGE or count > LARGEST_EXTENT or count % PAGE:
        refuse(f'{option} has the size "{text}"; expected multiples of 4KiB from 4KiB to 256MiB')
    return count


def root_of(text: str) -> Root:
    """`PATH?key=value&...`, the keys as in the configuration; `capacity` may be left out.

    The path must be a directory that can be written and is not, and does not lie in, the root of a depot.
    """
    path, mark, keys = text.partition("?")
    path = os.path.abspath(path)
    asks_capacity = any(pair.startswith("capacity=") for pair in keys.split("&"))
    complete = f"{path}?{keys}" if asks_capacity else f"{path}?{keys}{'&' if keys else ''}capacity=1TiB"
    parsed = _core.parse_options(json.dumps({"roots": [complete]}))["roots"][0]
    if parsed["read_only"]:
        refuse(f'root "{text}" says read_only=true; expected a root that can be written')
    _check_directory(path)
    capacity = parsed.pop("capacity")
    for key in ("path", "read_only"):
        del parsed[key]
    return Root(path, parsed, capacity if asks_capacity else 0)


def _check_directory(path: str) -> None:
    if not os.path.isdir(path):
        refuse(f'root "{path}" is not a directory; expected one to make a directory of the benchmark\'s own in')
    above = path
    while True:
        if os.path.lexists(os.path.join(above, "DEPOT")):
            what = "is" if above == path else f'lies in "{above}", which is'
            refuse(f'root "{path}" {what} the root of a depot; expected another directory of that file system')
        if above == os.path.dirname(above):
            break
        above = os.path.dirname(above)
    if not os.access(path, os.W_OK | os.X_OK):
        refuse(f'root "{path}" cannot be written by this user; expected a directory that can')


def _mix(option: str, text: str) -> tuple[int, ...]:
    return tuple(_size(option, one.strip()) for one in text.split("+"))


def sizes_of(sizes: str, model: str, tp: str, chunk_tokens: int, dtype: str) -> list[tuple[int, ...]]:
    """Extent sizes by `sizes`, or the size of a rank's extent of `model` at each of `tp`, padded to pages."""
    if not model:
        return [_mix("--size", item) for item in _items("--size", sizes)]
    try:
        shape = shapes.shape_of(model)
        ranks = [_count("--tp", one, shapes.TENSOR_PARALLEL_MAX) for one in _items("--tp", tp)]
        counts = [_pages(shapes.extent_bytes(shape, chunk_tokens, rank, dtype)) for rank in ranks]
    except shapes.ShapeError as error:
        refuse(str(error))
    for count in counts:
        if count > LARGEST_EXTENT:
            refuse(f"--model {model}: an extent of {count} bytes; expected at most 256MiB: a larger --tp or fewer --chunk-tokens")
    return [(count,) for count in dict.fromkeys(counts)]


def _devices(text: str) -> tuple[str, ...]:
    devices = tuple(one.strip() for one in text.split("+"))
    for one in devices:
        try:
            _core.parse_options(json.dumps({"roots": [{"path": "/bench", "capacity": 1}], "device": one}))
        except _core.DepotError:
            refuse(f'--device has the value "{one}"; expected "host" or "cuda:N" with N from 0 to 255')
    return devices


def _engine(text: str) -> dict[str, Any]:
    try:
        keys = json.loads(text)
    except ValueError:
        keys = None
    if not isinstance(keys, dict) or {"roots", "device"} & keys.keys():
        refuse(f"--engine is '{text}'; expected a JSON object of the depot's keys other than roots and device")
    _core.parse_options(json.dumps({**keys, "roots": [{"path": "/bench", "capacity": 1}]}))
    return keys


def _volume(text: str, operation: str, sizes: tuple[int, ...], in_flight: int, request_extents: int) -> int:
    each = sum(sizes)
    least = each * (in_flight * request_extents if operation == "burst" else 1)
    if not text:
        return max(DEFAULT_VOLUME // each * each, each * in_flight * (request_extents if operation == "burst" else 1))
    try:
        volume = _core.parse_size(text)
    except _core.DepotError as error:
        refuse(f"--volume: {error}")
    if volume < least:
        what = "one burst" if operation == "burst" else "one extent of each size"
        refuse(f'--volume is "{text}"; expected at least {size_text(least)}, {what}: there would be nothing to {operation}')
    return volume


def plan_of(
    roots: Iterable[str],
    *,
    device: str,
    operation: str,
    sizes: list[tuple[int, ...]],
    in_flight: str,
    processes: str,
    request_extents: int,
    volume: str,
    seconds: float,
    rounds: int,
    verify: str,
    keep_cache: bool,
    engine: str,
) -> Plan:
    """Checks every axis before anything is touched. Raises DepotError(invalid_argument)."""
    places = [root_of(text) for text in roots]
    if len({place.path for place in places}) != len(places):
        refuse("a root is named twice; expected different directories")
    operations = _items("--op", operation)
    for one in operations:
        if one not in OPERATIONS:
            refuse(f'--op has the value "{one}"; expected {", ".join(OPERATIONS)}')
    every = {"all": 1, "sample": 16, "off": 0}.get(verify)
    if every is None:
        refuse(f'--verify is "{verify}"; expected all, sample or off')
    flights = [_count("--in-flight", one, MOST_IN_FLIGHT) for one in _items("--in-flight", in_flight)]
    counts = [_count("--processes", one, MOST_PROCESSES) for one in _items("--processes", processes)]
    devices = [_devices(one) for one in _items("--device", device)]
    cells = []
    for place, where, what, mix, flight, count in itertools.product(places, devices, operations, sizes, flights, counts):
        if len(where) > count:
            refuse(f"--device {'+'.join(where)} needs as many processes; expected --processes {len(where)} or more, not {count}")
        if place.keys.get("require_gds") and "host" in where:
            refuse(f'root "{place.path}" says require_gds=true; expected GPUs in --device, not host, which cuFile does not reach')
        if what == "burst" and len(mix) > 1:
            refuse(f"--op burst takes one size a cell, not {'+'.join(map(size_text, mix))}")
        held = _volume(volume, what, mix, flight, request_extents)
        cells.append(Cell(place, where, what, mix, flight, count, request_extents, held))
    for cell in cells:
        if cell.capacity < cell.least_capacity:
            refuse(
                f'root "{cell.root.path}" has the capacity {cell.capacity}; expected at least {cell.least_capacity} '
                f"for {cell.operation} of {size_text(cell.volume)}, or a smaller --volume"
            )
    return Plan(tuple(cells), seconds, rounds, every, keep_cache, _engine(engine))


def config_of(cell: Cell, process: int, directory: str, engine: dict[str, Any]) -> str:
    """The configuration of one process's depot, in `directory`. Processes take the cell's devices in turn."""
    device = cell.devices[process % len(cell.devices)]
    root = {**cell.root.keys, "path": f"{directory}/root", "capacity": cell.capacity}
    root["segment"] = cell.segment_bytes
    config = {
        "roots": [root],
        "device": device,
        "slab": cell.slab_bytes,
        "io_depth": max(16, min(128, cell.in_flight)),
        "store_queue": max(512 * MIB, 2 * cell.in_flight * max(cell.sizes)),
        "free_space_reserve": 16 * MIB,
    }
    if device != "host":
        config["device_slab"] = max(512 * MIB, 4 * max(cell.sizes))
    return json.dumps({**config, **engine})
