"""Server-sent events (WHATWG HTML, section 9.2), from bytes that were cut anywhere."""

from __future__ import annotations

import re

DONE = "[DONE]"
_LINE_END = re.compile(rb"\r\n|\n|\r(?!\Z)")  # a CR at the end of what is there may be half of a CRLF
_DONE_LINE = re.compile(rb"data: ?\[DONE\]\r?")
_MAX_LINE = 16 << 20


class NotEvents(ValueError):
    """The bytes are no event stream."""


class Parser:
    """Feed it pieces in order; each call returns the data of the events that the piece completed.

    Comments and the fields `event`, `id` and `retry` carry no data and are left out. `[DONE]` counts as complete as
    soon as it is there: servers are known to leave out the empty line after it. Not thread-safe.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[str]:
        """Raises NotEvents on a line that is no field of an event stream, and on one of more than 16 MiB."""
        lines = _LINE_END.split(self._rest + piece)
        self._rest = lines.pop()
        if len(self._rest) > _MAX_LINE:
            raise NotEvents("a line of more than 16 MiB")
        events = [event for line in lines for event in self._take(line)]
        if not self._data and _DONE_LINE.fullmatch(self._rest):
            self._rest = b""
            events.append(DONE)
        return events

    def _take(self, line: bytes) -> list[str]:
        if not line:
            event, self._data = b"\n".join(self._data), []
            return [event.decode(errors="replace")] if event else []
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
            if value == DONE.encode() and len(self._data) == 1:
                self._data = []
                return [DONE]
        elif name not in (b"", b"event", b"id", b"retry"):
            raise NotEvents(f"expected 'data: ...', got {line[:80].decode(errors='replace')!r}")
        return []
