"""Reads traces of prompts: which blocks each request's prompt consists of, and when it came.

Three public formats, plain or gzip, told apart by their fields (docs/bench.md has the references):

- Mooncake (FAST'25): a request a line, `timestamp` in ms, `input_length`, `output_length`, `hash_ids`;
- Qwen-Bailian (ATC'25): the same with `chat_id`, and `timestamp` in seconds;
- agent sessions (kv-cache-tester, SemiAnalysis): a session an object, `requests` of `t` in s, `in`, `out`, `hash_ids`,
  with sub-agents nested; `hash_id_scope` says whether equal ids of two sessions are equal blocks (default "local": no).

A block is known by its id and by all before it, because KV depends on both: ids that hash a block alone are safe, too.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

GZIP_MAGIC = b"\x1f\x8b"
TIME_UNITS = {"ms": 1e-3, "s": 1.0}
BLOCK_TOKENS_CHOICES = tuple(2**power for power in range(13))
BLOCK_TOKENS_QUORUM = 0.75  # of prompts that must fit a block size that is not stated
LINES_PER_REPORT = 1000
BROKEN_KEPT = 100  # descriptions of broken lines that are kept; all are counted
TOKENS_AT_MOST = 2**31  # of a prompt or a block: sums and products of these stay exact


class TraceError(ValueError):
    """A trace that cannot be used, in one sentence for the user."""


class _Broken(ValueError):
    """Why one line or request is no request."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt. `blocks` are numbers of the trace's unique blocks, in the prompt's order."""

    time_s: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]


@dataclass
class Trace:
    """Requests in the order of their times.

    Attributes:
        block_tokens: tokens of a block; the last one of a prompt may be shorter.
        unique_blocks: how many different blocks there are.
        broken: (where, why) of the first `BROKEN_KEPT` lines that were skipped; `broken_count` counts all.
    """

    name: str
    format: str
    block_tokens: int
    requests: list[Request]
    unique_blocks: int
    broken: list[tuple[str, str]] = field(default_factory=list)
    broken_count: int = 0

    @property
    def references(self) -> int:
        return sum(len(request.blocks) for request in self.requests)

    @property
    def input_tokens(self) -> int:
        return sum(request.input_tokens for request in self.requests)

    @property
    def span_s(self) -> float:
        """Seconds from the first to the last request; 0 for a single moment."""
        return self.requests[-1].time_s - self.requests[0].time_s

    def tokens_of(self, request: Request, blocks: int) -> int:
        """Tokens in the first `blocks` blocks of a prompt."""
        return min(blocks * self.block_tokens, request.input_tokens)


@dataclass
class _Raw:
    """A request as it was written, before its block size is known. `scope` keeps ids of sessions apart."""

    where: str
    time_s: float
    input_tokens: int
    output_tokens: int
    ids: list[Any]
    scope: int


@dataclass
class _Reader:
    strict: bool
    time_unit: str | None
    session_every_s: float
    advance: Callable[[int], None]
    raw: list[_Raw] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)
    broken_count: int = 0
    sessions: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    stated_block_tokens: set[int] = field(default_factory=set)

    def skip(self, where: str, why: str) -> None:
        if self.strict:
            raise TraceError(f"{where}: {why}")
        self.broken_count += 1
        if len(self.broken) < BROKEN_KEPT:
            self.broken.append((where, why))

    # --- documents ---

    def take_file(self, path: str) -> None:
        try:
            with open(path, "rb") as file:
                packed = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
                file.seek(0)
                lines = gzip.GzipFile(fileobj=file) if packed else file
                first = lines.readline()
                if _is_piece_of_a_document(first):
                    self._take_document_or_lines(path, first + lines.read())
                else:
                    self._take_lines(path, first, lines, file.tell)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise TraceError(f"trace '{path}': expected whole gzip data: {error}") from None
        except OSError as error:
            raise TraceError(f"trace '{path}': cannot be read: {error.strerror or error}") from None

    def _take_lines(self, path: str, first: bytes, rest: Iterator[bytes], read_bytes: Callable[[], int]) -> None:
        told = 0
        for number, line in enumerate(chain((first,), rest), 1):
            if line.strip():
                self._take_json(f"trace '{path}', line {number}", line)
            if number % LINES_PER_REPORT == 0:
                self.advance(read_bytes() - told)
                told = read_bytes()

    def _take_document_or_lines(self, path: str, text: bytes) -> None:
        where = f"trace '{path}'"
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            # The first of many lines may be the broken one: it costs itself only, as any other.
            lines, found = io.BytesIO(text), len(self.raw)
            self._take_lines(path, lines.readline(), lines, lambda: 0)
            if len(self.raw) == found:
                raise TraceError(f"{where}: expected one JSON object a line, or one JSON document") from None
            return
        for i, item in enumerate(document if isinstance(document, list) else [document]):
            self._take_object(f"{where}, item {i + 1}", item)

    def _take_json(self, where: str, line: bytes) -> None:
        try:
            item = json.loads(line)
        except (ValueError, RecursionError):
            self.skip(where, "expected a JSON object")
            return
        self._take_object(where, item)

    def _take_object(self, where: str, item: Any) -> None:
        try:
            if not isinstance(item, dict):
                raise _Broken(f"expected a JSON object, got {_shown(item)}")
            if "requests" in item:
                self._take_session(where, item)
            else:
                self._take_request(where, item)
        except _Broken as broken:
            self.skip(where, str(broken))

    # --- requests ---

    def _take_request(self, where: str, item: dict[str, Any]) -> None:
        form = "qwen-bailian" if "chat_id" in item else "mooncake"
        unit = TIME_UNITS[self.time_unit or ("s" if form == "qwen-bailian" else "ms")]
        found = _Raw(
            where,
            _seconds(item, "timestamp") * unit,
            _count(item, "input_length"),
            _count(item, "output_length", 0),
            _ids(item),
            scope=-1,
        )
        self._note_block_tokens(item)
        self.formats[form] += 1
        self.raw.append(found)

    def _take_session(self, where: str, session: dict[str, Any]) -> None:
        if not isinstance(session["requests"], list):
            raise _Broken(f"expected a list as requests, got {_shown(session['requests'])}")
        self._note_block_tokens(session)
        scope = -1 if session.get("hash_id_scope") == "global" else self.sessions
        begin = self.sessions * self.session_every_s
        self.sessions += 1
        self.formats["agent sessions"] += 1
        self._take_turns(where, session["requests"], begin, scope)

    def _take_turns(self, where: str, turns: list[Any], begin: float, scope: int) -> None:
        for i, turn in enumerate(turns):
            here = f"{where}, request {i + 1}"
            try:
                if not isinstance(turn, dict):
                    raise _Broken(f"expected a JSON object, got {_shown(turn)}")
                time_s = _seconds(turn, "t")
                if turn.get("type") == "subagent":
                    nested = turn.get("requests")
                    if not isinstance(nested, list):
                        raise _Broken(f"expected a list as requests, got {_shown(nested)}")
                    # Some producers count a sub-agent's times from its own start, others from the session's.
                    times = [n.get("t") for n in nested if isinstance(n, dict)]
                    own = any(isinstance(t, (int, float)) and t < time_s for t in times)
                    self._take_turns(here, nested, begin + (time_s if own else 0.0), scope)
                    continue
                tokens = _count(turn, "in")
                self.raw.append(_Raw(here, begin + time_s, tokens, _count(turn, "out", 0), _ids(turn), scope))
            except _Broken as broken:
                self.skip(here, str(broken))

    def _note_block_tokens(self, item: dict[str, Any]) -> None:
        if "block_size" in item:
            size = _count(item, "block_size")
            if size == 0:
                raise _Broken("expected a whole number above 0 as block_size, got 0")
            self.stated_block_tokens.add(size)


def read_trace(
    paths: Sequence[str],
    *,
    block_tokens: int | None = None,
    time_unit: str | None = None,
    session_every_s: float = 0.0,
    limit: int | None = None,
    strict: bool = False,
    advance: Callable[[int], None] = lambda file_bytes: None,
) -> Trace:
    """Reads one trace from one or more files.

    Args:
        paths: files of the formats above, plain or gzip.
        block_tokens: tokens of a block; None takes what the trace says, or the power of two that fits its prompts.
        time_unit: "ms" or "s"; None takes the format's own.
        session_every_s: seconds between the starts of agent sessions, which carry only times of their own.
        limit: keeps the first so many requests; None keeps all.
        strict: the first broken line ends the reading instead of being skipped and counted.
        advance: is told now and then how many more bytes of the files are read.

    Raises:
        TraceError: a file cannot be read, or nothing in it is a request, or (strict) a line is broken.
    """
    if not paths:
        raise TraceError("expected at least one trace")
    reader = _Reader(strict, time_unit, session_every_s, advance)
    for path in paths:
        reader.take_file(path)
    name = ", ".join(paths)
    if not reader.raw:
        if reader.broken:
            where, why = reader.broken[0]
            raise TraceError(f"trace '{name}': expected requests, found none; the first of {reader.broken_count} "
                             f"broken lines is {where}: {why}")
        raise TraceError(f"trace '{name}': expected requests, found nothing")
    size = block_tokens or _block_tokens(name, reader)
    raw = []
    for request in reader.raw:
        count = len(request.ids)
        if count in (request.input_tokens // size, -(-request.input_tokens // size)):
            raw.append(request)
        else:
            reader.skip(request.where, f"{count} hash_ids do not fit {request.input_tokens} tokens in blocks of {size}")
    if not raw:
        raise TraceError(f"trace '{name}': no request fits blocks of {size} tokens; expected another --block-tokens")
    raw.sort(key=lambda request: request.time_s)
    if limit is not None:
        raw = raw[:limit]
    requests, unique = _numbered(raw)
    if not unique:
        raise TraceError(f"trace '{name}': expected hash_ids, none of its {len(requests)} requests has any")
    form = " and ".join(sorted(reader.formats))
    return Trace(name, form, size, requests, unique, reader.broken, reader.broken_count)


def in_chunks(trace: Trace, chunk_tokens: int) -> Trace:
    """The same prompts in chunks of another size, as a depot keeps them: complete chunks only.

    Raises:
        TraceError: `chunk_tokens` is neither a multiple nor a divisor of the trace's block.
    """
    old = trace.block_tokens
    if chunk_tokens < 1 or max(chunk_tokens, old) % min(chunk_tokens, old):
        raise TraceError(f"chunk of {chunk_tokens} tokens: expected a multiple or a divisor of the trace's blocks of {old}")
    requests = []
    if chunk_tokens >= old:
        # A block's number stands for everything before it, so the last block of a chunk names the chunk.
        step = chunk_tokens // old
        names: dict[int, int] = {}
        for request in trace.requests:
            whole = request.input_tokens // chunk_tokens * step
            last = request.blocks[step - 1 : whole : step]
            chunks = tuple(names.setdefault(block, len(names)) for block in last)
            requests.append(replace(request, blocks=chunks))
        unique = len(names)
    else:
        parts = old // chunk_tokens
        seen: set[int] = set()
        for request in trace.requests:
            whole = request.input_tokens // chunk_tokens
            chunks = tuple(block * parts + i for block in request.blocks for i in range(parts))[:whole]
            seen.update(chunks)
            requests.append(replace(request, blocks=chunks))
        unique = len(seen)
    if not unique:
        raise TraceError(f"chunk of {chunk_tokens} tokens: expected one that a prompt fills, the longest has "
                         f"{max(request.input_tokens for request in requests)} tokens")
    return replace(trace, block_tokens=chunk_tokens, requests=requests, unique_blocks=unique)


def _numbered(raw: list[_Raw]) -> tuple[list[Request], int]:
    """Numbers blocks by (the block before, id): a trie of all prompts."""
    numbers: dict[tuple[int, Any], int] = {}
    requests = []
    for request in raw:
        before = -1 - max(0, request.scope + 1)  # one root of the trie for each scope
        blocks = []
        for block_id in request.ids:
            before = numbers.setdefault((before, block_id), len(numbers))
            blocks.append(before)
        requests.append(Request(request.time_s, request.input_tokens, request.output_tokens, tuple(blocks)))
    return requests, len(numbers)


def _block_tokens(name: str, reader: _Reader) -> int:
    if len(reader.stated_block_tokens) == 1:
        return min(reader.stated_block_tokens)
    if reader.stated_block_tokens:
        raise TraceError(f"trace '{name}': expected one block_size, got {sorted(reader.stated_block_tokens)}")
    votes: Counter[int] = Counter()
    for request in reader.raw:
        count, tokens = len(request.ids), request.input_tokens
        votes.update(size for size in BLOCK_TOKENS_CHOICES if count and count in (tokens // size, -(-tokens // size)))
    # Of sizes that fit as many prompts the smallest: a prompt of one block fits every size above its length.
    best = max(votes, key=lambda size: (votes[size], -size), default=0)
    if not best or votes[best] < BLOCK_TOKENS_QUORUM * sum(1 for request in reader.raw if request.ids):
        raise TraceError(f"trace '{name}': the tokens of a block cannot be told from its lengths; expected --block-tokens")
    return best


def _is_piece_of_a_document(line: bytes) -> bool:
    """Whether a first line begins a JSON document that goes on over other lines."""
    text = line.strip()
    if text[:1] not in (b"{", b"["):
        return False
    try:
        return isinstance(json.loads(text), list)
    except (ValueError, RecursionError):
        return text in (b"{", b"[") or text[:1] == b"[" or not text.endswith(b"}")


# --- values ----------------------------------------------------------------------------------------------------------


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _value(item: dict[str, Any], key: str) -> Any:
    if key not in item:
        raise _Broken(f"expected the field {key}")
    return item[key]


def _count(item: dict[str, Any], key: str, default: int | None = None) -> int:
    if default is not None and key not in item:
        return default
    value = _value(item, key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _Broken(f"expected a whole number of 0 or more as {key}, got {_shown(value)}")
    if value > TOKENS_AT_MOST:
        raise _Broken(f"expected at most {TOKENS_AT_MOST} as {key}, got {_shown(value)}")
    return value


def _seconds(item: dict[str, Any], key: str) -> float:
    value = _value(item, key)
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0:
            return float(value)
    except OverflowError:  # a whole number that no float holds
        pass
    raise _Broken(f"expected a time of 0 or more as {key}, got {_shown(value)}")


def _ids(item: dict[str, Any]) -> list[Any]:
    value = _value(item, "hash_ids")
    if not isinstance(value, list) or not all(isinstance(i, (int, str)) for i in value):
        raise _Broken(f"expected a list of numbers or texts as hash_ids, got {_shown(value)}")
    return value
