"""Native module: the engine behind `tokendepot`. All calls release the GIL around work and are thread-safe.

Keys travel as one `bytes` object of n * 32 bytes, plans as opaque `bytes`. Errors are `DepotError`.
"""

from collections.abc import Callable
from typing import Any, Sequence

class DepotError(Exception):
    """kind: one of invalid_argument, not_found, corrupt, io, no_space, permission, unsupported, busy, timed_out, closed."""

    kind: str
    errno: int

KEY_BYTES: int
SKIP_BLOCK: int
FORMAT_VERSION: int

def version() -> str: ...
def log_warnings_only() -> None:
    """For programs whose output is not a log: the process logs nothing below warnings any more."""

def parse_size(text: str) -> int:
    """"1GiB" -> 1073741824, as sizes in the configuration are read; raises DepotError(invalid_argument)."""

def parse_options(config_json: str) -> dict[str, Any]:
    """The effective options as a plain dict (defaults filled in); raises DepotError(invalid_argument)."""

class KeyChain:
    """Grows the chunk keys of one prompt. See include/tokendepot/key.h."""

    def __init__(self, namespace: bytes, chunk_tokens: int, salt: str | bytes = "", lora: str | bytes = "") -> None: ...
    def append(self, tokens: Any, media: Sequence[tuple[str | bytes, int, int]] = ()) -> int:
        """tokens: a list/tuple of ints in [0, 2**32) or any 1-d int32/uint32/int64 buffer. media: (content hash,
        first token, tokens). Returns the number of keys so far."""
    def keys(self, first: int = 0, last: int = -1) -> bytes: ...
    @property
    def tokens_seen(self) -> int: ...
    def __len__(self) -> int: ...

class GroupWant:
    """What a lookup asks of one KV-cache group; part = (layer_begin, layer_end, head_begin, head_end) over all ranks."""

    def __init__(self, group: int, kind: str, part: tuple[int, int, int, int], tokens: int, window_chunks: int = 0) -> None: ...
    group: int
    kind: str
    part: tuple[int, int, int, int]
    tokens: int
    window_chunks: int

class Depot:
    @staticmethod
    def open(config_json: str, *, catalog: bool = True, writer: bool = True) -> "Depot": ...
    def close(self) -> None: ...
    def register_namespace(self, manifest_json: str) -> bytes: ...
    # scheduler half
    def longest_prefix(self, keys: bytes, wants: Sequence[GroupWant]) -> int: ...
    def stored(self, keys: bytes, want: GroupWant) -> bytes:
        """One byte a key, 1 = stored."""
    def plan_load(
        self,
        namespace: bytes,
        keys: bytes,
        groups: Sequence[tuple[GroupWant, int, int, Sequence[int]]],
        deadline_s: float,
    ) -> bytes:
        """groups: (want, first_chunk, blocks_per_chunk, block ids with SKIP_BLOCK where nothing is wanted).
        Raises DepotError(not_found) when an extent has gone since the lookup."""
    def forget(self, key: bytes, group: int) -> None: ...
    def history(self, key: bytes) -> str:
        """"never", "stored" (some extent of the chunk, whatever group and part) or "gone" (evicted, condemned or
        removed; an estimate, see include/tokendepot/depot.h)."""
    # worker half
    def attach(
        self,
        *,
        group: int,
        kind: str,
        part: tuple[int, int, int, int],
        tokens: int,
        block_tokens: int,
        block_count: int,
        row_bytes: int = 0,
        page_bytes: int = 0,
        layers: Sequence[Sequence[tuple[int, int, int, int, int]]],
    ) -> None:
        """layers: per layer, per plane or piece: (address, block_stride, head_stride, token_stride, piece_bytes),
        strides in bytes. Memory must outlive the Depot. See include/tokendepot/layout.h."""
    def mark_stream(self, stream: int) -> None:
        """Marks the present end of a CUDA stream (its address, as torch's Stream.cuda_stream; 0 = the default
        stream): what is submitted later touches the cache only when the stream has come so far. Waits for nothing;
        does nothing on the host device."""
    def engine_step(self, begins: bool) -> None:
        """Before (True) and after (False) a step's work is queued on the device. See include/tokendepot/depot.h."""
    def submit_load(self, job: int, plan: bytes) -> None: ...
    def submit_hold(self, job: int, plan: bytes) -> None:
        """Verifies the plan's extents into staging memory without writing to the cache; poll() reports it as a load."""
    def place(self, job: int, held_job: int, blocks: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        """Writes what submit_hold() verified; blocks: (chunk, group, block ids). Lets go of everything held."""
    def drop_held(self, held_job: int) -> None: ...
    def submit_store(self, job: int, plan: bytes) -> None: ...
    def wait_gathered(self, timeout_s: float) -> bool: ...
    def cancel(self, job: int) -> None: ...
    def poll(self) -> list[dict[str, Any]]:
        """Completions: job, kind ("load"/"store"), items_ok, bytes, seconds, failures: list of
        (item, chunk, group, reason)."""
    def flush(self, timeout_s: float) -> bool: ...
    # both
    def refresh(self) -> None: ...
    def stats(self) -> dict[str, Any]:
        """DepotStats of include/tokendepot/stats.h as nested dicts."""

def plan_store(namespace: bytes, items: Sequence[tuple[bytes, int, int, Sequence[int]]]) -> bytes:
    """Encodes a StorePlan; items: (key, chunk, group, block ids)."""

def describe_plan(plan: bytes) -> dict[str, Any]:
    """A decoded load or store plan as plain dicts; raises DepotError(corrupt | unsupported)."""

# --- tools: read a root without opening it as an engine (safe while engines run) ---
def memory_limit() -> tuple[int, str] | None:
    """Bytes that the control groups of this process allow, where that is less than the machine has, and the file that says so."""

def unused_memory() -> int | None:
    """The least that any of those groups has left, files on tmpfs counted as taken; None where memory_limit() is None."""

def inspect_root(path: str) -> dict[str, Any]:
    """path, root_id, format_version, created, file_system, available_bytes, transport, extents, live_bytes, file_bytes,
    namespaces (digest, manifest, damaged, extents, bytes), segments (segment, file, file_bytes, live_bytes, extents,
    sealed, last_used), journals (writer, file, records, bad_records, damaged, in_use), foreign_files. Times are
    seconds since 1970. See include/tokendepot/tools.h."""

def list_extents(path: str) -> list[dict[str, Any]]:
    """Every live extent of a root: key (bytes), namespace (the first 16 hex digits of its digest), group, kind, part,
    tokens, segment ("<writer>-<sequence>"), offset, bytes, stored_at."""

def verify_extents(path: str, extents: Sequence[dict[str, Any]]) -> list[str]:
    """"ok", or "<kind>: <message>" of the failure, for each extent of list_extents (reads and checks all its bytes)."""
def remove_extents(path: str, extents: Sequence[dict[str, Any]], corrupt: bool = False) -> int:
    """Appends condemn records; live engines drop them at their next poll. Returns how many. `corrupt` is the cause that
    they name: else they were removed by hand."""
def evict_segments(path: str, bytes: int, dry_run: bool = False) -> dict[str, int]:
    """Evicts the coldest sealed segments until `bytes` of the root are freed; returns segments and bytes. With
    `dry_run` only says what it would do."""

class RootWatch:
    """What comes into a root and what goes. Changes are (stored, key, namespace, group, tokens): namespace = the first
    16 hex digits of its digest, tokens = held. See include/tokendepot/watch.h."""

    def poll(self, most: int) -> list[tuple[bool, bytes, str, int, int]]:
        """Since the last call, at most `most`; at first all that is stored. Raises DepotError when the root cannot be read
        or is another one now; what is known stays known."""
    def stored(self) -> list[tuple[bool, bytes, str, int, int]]:
        """All that is stored, as of the last poll."""
    @property
    def root_id(self) -> str: ...
    @property
    def in_memory(self) -> bool: ...

def watch_root(path: str) -> RootWatch: ...

def repair_root(path: str, sources: Sequence[str], apply: bool, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """What a root lost of its own account, and with `apply` its restoration (include/tokendepot/repair.h): marker,
    journals, segments, manifests, lost_manifests, damaged_extents, left, nothing_to_do. `progress` is told bytes looked through
    and bytes in all."""
def trace_extents(path: str, keys: bytes) -> list[dict[str, Any]]:
    """Every extent of these keys that a journal still speaks of (include/tokendepot/history.h): as list_extents(), and
    fate ("live", "condemned", "evicted", "vanished"), ended_at."""

class Exporter:
    """Writes an export file (include/tokendepot/export.h). Calls come from one thread; the descriptor is lent."""

    @staticmethod
    def begin(fd: int, manifest: str, extents: int, bytes: int) -> Exporter: ...
    def add(self, root: str, extents: Sequence[dict[str, Any]]) -> list[str]:
        """"ok", or "<kind>: <message>" of what is wrong with the extent, which then is not in the file. Raises when
        the file cannot be written."""
    def finish(self) -> None: ...
    @property
    def file_bytes(self) -> int: ...

class Importer:
    """Reads an export file into a root (include/tokendepot/export.h). Calls come from one thread; the descriptor is lent."""

    @staticmethod
    def begin(fd: int, path: str, capacity: int, create: bool, free_space_reserve: int) -> Importer: ...
    def go_on(self, bytes: int) -> bool:
        """Reads about `bytes` more. False: the file has ended, or the root has no room."""
    def report(self) -> dict[str, Any]:
        """namespace, manifest, planned_extents, planned_bytes, file_bytes, imported, imported_bytes, present, damaged,
        junk_bytes, full, whole, reason."""

def inspect_policies(path: str) -> dict[str, Any]:
    """rules (kind "ttl" | "quota" | "pin", namespace in hex or "" for the root, value, made, chunks, bytes), damage,
    capacity (0 = not noted), pinned_bytes, pin_limit, scrub_began, scrub_bytes, scrub_bad, scrub_finished,
    scrub_finished_bytes, scrub_finished_bad. `value`: ns of a ttl, bytes of a quota, end of a pin in ns since 1970."""

def set_policy(
    path: str, kind: str, namespace: bytes, value: int, keys: bytes = b"", capacity: int = 0, dry_run: bool = False
) -> None:
    """Adds or replaces a rule; namespace b"" = the root. See include/tokendepot/tools.h."""

def drop_policies(path: str, kind: str, namespace: bytes, keys: bytes | None = None, dry_run: bool = False) -> int:
    """Takes back rules of this kind and namespace; of pins only that of `keys`, where given. Returns how many."""

# --- workload: a depot of its own beside the limits of its medium and link (include/tokendepot/workload.h) ---
class Workload:
    """Calls come from one thread; a signal whose handler raises ends fill(), run() and verify() early."""

    @staticmethod
    def open(
        config_json: str,
        *,
        kind: str,
        extent_bytes: Sequence[int],
        volume_bytes: int,
        in_flight: int,
        request_extents: int = 1,
        process: int = 0,
        keep_cache: bool = False,
    ) -> "Workload":
        """kind: "read", "write", "mixed" or "burst". The configuration has one root, absent or an empty directory."""
    def fill(self) -> None: ...
    def run(self, seconds: float) -> dict[str, Any]:
        """WorkloadRun as a dict; classes: write, extent_bytes, count, latency as (largest nanoseconds, count)."""
    def limits(self, seconds: float) -> list[dict[str, Any]]:
        """what, gb_per_s."""
    def verify(self, every: int = 1) -> dict[str, Any]:
        """extents, bytes, wrong, first_wrong."""
    def about(self) -> dict[str, Any]:
        """transport, reason, file_system, in_memory, payload_gb_per_s."""

class LMCacheConnector:
    """LMCache's storage connector contract over a depot of its own. Keys are LMCache's texts
    model@rank@group@chunk hash[@salt]; buffers are any objects with the buffer protocol, one a key, that nobody else
    writes to (set) or uses (get) until their batch is drained. Every submit returns the batch's id at once and never
    waits for a medium; each batch is drained exactly once, also when the connector is closed meanwhile. Thread-safe."""

    @staticmethod
    def open(config_json: str, *, namespace_json: str, load_timeout_s: float) -> "LMCacheConnector":
        """namespace_json: an object that joins every namespace. load_timeout_s: then the rest of a batch of gets fails."""
    def event_fd(self) -> int:
        """Readable while completions wait. Belongs to the connector."""
    def submit_batch_set(self, keys: Sequence[str], buffers: Sequence[Any]) -> int: ...
    def submit_batch_get(self, keys: Sequence[str], buffers: Sequence[Any]) -> int: ...
    def submit_batch_exists(self, keys: Sequence[str]) -> int: ...
    def submit_batch_delete(self, keys: Sequence[str]) -> int: ...
    def drain_completions(self) -> list[tuple[int, bool, str, list[bool]]]:
        """(id, all keys succeeded, what failed in words, one answer a key) of each batch that ended."""
    def stats_json(self) -> str:
        """The fields of include/tokendepot/stats.h; "{}" once closed."""
    def close(self) -> None: ...
