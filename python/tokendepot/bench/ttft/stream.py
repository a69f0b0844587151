"""One streamed POST, with the time at which each piece came off the socket.

Clients that hand over parsed chunks (httpx, aiohttp) give no time of arrival: with many streams a chunk waits for the
parsing of all others. Here a piece is stamped when asyncio reads it, and put aside; one piece is parsed in each turn of the
event loop, so that a piece that arrives meanwhile is stamped at most one parse too late. HTTP itself is h11's.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import h11

from .answer import Answer, RequestFailed
from .sse import NotEvents, Parser

CONNECT_TIMEOUT_S = 10.0
_MAX_ERROR_BODY = 1 << 16
_OVERFLOW_STATUS = (400, 413, 422)
# Of vLLM and OpenAI, SGLang, llama.cpp, text-generation-inference.
_OVERFLOW_WORDS = (
    "maximum context length",
    "context_length_exceeded",
    "max_model_len",
    "longer than the max",
    "longer than the model",
    "available context size",
    "exceed_context_size",
    "`max_new_tokens` must be <=",
    "`inputs` must have less than",
)


@dataclass(frozen=True)
class Target:
    """Where requests go. `path` includes the endpoint, e.g. /v1/completions; `tls` is None where it is not used."""

    host: str
    port: int
    path: str
    tls: ssl.SSLContext | None
    headers: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, url: str, headers: Mapping[str, str], tls: ssl.SSLContext | None = None) -> Target:
        """Without `tls` the system's authorities are trusted. Reading them takes tens of ms, too long for each request."""
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        tls = (tls or ssl.create_default_context()) if secure else None
        return cls(parts.hostname or "", parts.port or (443 if secure else 80), parts.path, tls, tuple(headers.items()))

    def request(self, body: bytes) -> bytes:
        """The whole request, made before the clock starts."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        headers = [("Host", f"{host}:{self.port}"), ("Accept", "text/event-stream"), ("Content-Type", "application/json")]
        headers += [("Content-Length", str(len(body))), ("Connection", "close"), *self.headers]
        wire = h11.Connection(h11.CLIENT)
        return b"".join((wire.send(h11.Request(method="POST", target=self.path, headers=headers)) or b"", body))


class Inbox:
    """Pieces of all streams of one event loop in order of arrival, parsed one in each turn of the loop."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[float, _Stream, bytes | Exception]] = deque()

    def put(self, stream: _Stream, item: bytes | Exception) -> None:
        self._waiting.append((time.perf_counter(), stream, item))
        if len(self._waiting) == 1:
            asyncio.get_running_loop().call_soon(self._parse_one)

    def _parse_one(self) -> None:
        stamp, stream, item = self._waiting[0]
        try:
            stream.take(stamp, item)
        finally:
            self._waiting.popleft()
            if self._waiting:
                asyncio.get_running_loop().call_soon(self._parse_one)


class _Stream(asyncio.Protocol):
    def __init__(self, inbox: Inbox) -> None:
        self.answer = Answer()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._inbox = inbox
        self._wire = h11.Connection(h11.CLIENT)
        self._events = Parser()
        self._status = 0
        self._body = b""  # of a response that is no stream of events

    # --- asyncio's side: stamp and put aside ---

    def data_received(self, data: bytes) -> None:
        self._inbox.put(self, data)

    def eof_received(self) -> None:
        self._inbox.put(self, b"")

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self._inbox.put(self, exc)

    def timed_out(self) -> None:
        self._inbox.put(self, TimeoutError())

    # --- the parsing side ---

    def send(self, transport: asyncio.Transport, request: bytes) -> None:
        for event in (h11.Request(method="POST", target="/", headers=[("Host", "-")]), h11.EndOfMessage()):
            self._wire.send(event)  # h11 reads a response only after a request; the bytes are in `request`
        self.answer.sent_at = time.perf_counter()
        transport.write(request)

    def take(self, stamp: float, item: bytes | Exception) -> None:
        if self.ended.done():
            return
        try:
            if isinstance(item, Exception):
                self._broke_off(item)
            elif self._feed(item, stamp - self.answer.sent_at):
                self.ended.set_result(None)
        except RequestFailed as failure:
            self.ended.set_exception(failure)

    def _broke_off(self, reason: Exception) -> None:
        tokens = len(self.answer.token_s)
        if isinstance(reason, TimeoutError):
            raise RequestFailed("stalled" if tokens else "timeout", f"not complete in time, {tokens} tokens came")
        raise RequestFailed("reset", f"{type(reason).__name__} after {tokens} tokens")

    def _feed(self, piece: bytes, at_s: float) -> bool:
        try:
            self._wire.receive_data(piece)
            while True:
                event = self._wire.next_event()
                if event is h11.NEED_DATA or event is h11.PAUSED:
                    return False
                if isinstance(event, h11.Response):
                    self._begin(event)
                elif isinstance(event, h11.Data):
                    if self._read(bytes(event.data), at_s):
                        return True
                elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
                    return self._end(at_s)
        except h11.RemoteProtocolError as error:
            if piece and not self._status:
                raise RequestFailed("not_a_stream", f"no HTTP: {error}") from None
            if self._body:
                return self._end(at_s)
            raise RequestFailed("truncated", str(error)) from None

    def _begin(self, response: h11.Response) -> None:
        self._status = response.status_code
        kind = dict(response.headers).get(b"content-type", b"text/event-stream")
        if self._status != 200 or not kind.lower().startswith(b"text/event-stream"):
            self._body = b" "  # read as a whole, for the message

    def _read(self, data: bytes, at_s: float) -> bool:
        if self._body:
            self._body = (self._body + data)[:_MAX_ERROR_BODY]
            return False
        if self.answer.first_byte_s is None:
            self.answer.first_byte_s = at_s
        try:
            for event in self._events.feed(data):
                if self.answer.take(event, at_s):
                    self.answer.close(True, at_s)
                    return True
        except NotEvents as error:
            raise RequestFailed("not_a_stream", str(error)) from None
        return False

    def _end(self, at_s: float) -> bool:
        text = self._body.decode(errors="replace").strip()
        if self._status and self._status != 200:
            overflow = self._status in _OVERFLOW_STATUS and any(words in text for words in _OVERFLOW_WORDS)
            raise RequestFailed("context_overflow" if overflow else f"http_{self._status}", text[:300])
        if self._body:
            raise RequestFailed("not_a_stream", f"status 200 with {text[:120]!r}, expected a stream of events")
        self.answer.close(False, at_s)
        return True


async def ask(target: Target, body: bytes, timeout_s: float, inbox: Inbox) -> Answer:
    """Sends one request on a connection of its own and reads its answer. RequestFailed when there is none.

    The clock starts when the connection is there and the request is written; nothing is tried twice. A connection
    that was kept from an earlier request could have been closed by the server meanwhile, and that would look like a
    failure of this one.
    """
    loop = asyncio.get_running_loop()
    request = target.request(body)
    began = time.perf_counter()
    connecting = loop.create_connection(lambda: _Stream(inbox), target.host, target.port, ssl=target.tls)
    try:
        transport, stream = await asyncio.wait_for(connecting, min(CONNECT_TIMEOUT_S, timeout_s))
    except ConnectionRefusedError as error:
        raise RequestFailed("refused", str(error)) from None
    except (OSError, asyncio.TimeoutError) as error:
        raise RequestFailed("unreachable", str(error) or f"no connection within {CONNECT_TIMEOUT_S:.0f} s") from None
    stream.answer.connect_s = time.perf_counter() - began
    timer = loop.call_later(timeout_s, stream.timed_out)
    try:
        stream.send(transport, request)
        await stream.ended
        return stream.answer
    finally:
        timer.cancel()
        transport.abort()
