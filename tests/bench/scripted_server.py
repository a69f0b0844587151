"""A server that sends scripted bytes at scripted times, on raw sockets, in a process of its own.

A test derives from ScriptedServer and overrides what it scripts; `running(server)` forks a process for it. What the
server saw and when it sent what is at GET /log, and what it was asked besides completions at GET /others; its clock is
time.perf_counter, which all processes share.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import re
import selectors
import signal
import socket
import struct
import time
import traceback
import urllib.request
import zlib
from collections.abc import Iterator
from typing import Any

CLOSE, RESET, HANG = "close", "reset", "hang"
Script = list[tuple[float, "bytes | str"]]  # (seconds since the request was there, bytes of the body, or an end)


def event(content: Any, newline: str = "\n") -> bytes:
    return f"data: {json.dumps(content)}{newline}{newline}".encode()


DONE = b"data: [DONE]\n\n"


def text_event(piece: str | None, **more: Any) -> bytes:
    return event({"choices": [{"text": piece, **more}]})


def delta_event(**delta: Any) -> bytes:
    return event({"choices": [{"delta": delta}]})


def usage_event(prompt: int, output: int = 4, **details: Any) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": output, **details}})


def word_ids(text: str) -> list[int]:
    """A tokenizer: a word with the space before it, a mark, or a space is a token."""
    return [zlib.crc32(piece.encode()) >> 8 for piece in re.findall(r" ?\w+| ?[^\w\s]|\s", text)]


class ScriptedServer:
    model = "stub"
    limit: int | None = None
    has_tokenize = True
    takes_ids = True
    metrics = ""

    def __init__(self) -> None:
        self.log: list[dict[str, Any]] = []
        self.others: list[dict[str, Any]] = []
        self.started = 0

    # --- what tests override ---

    def tokens(self, body: dict[str, Any]) -> list[int]:
        """The prompt of a request as the server sees it."""
        prompt = body.get("prompt")
        if isinstance(prompt, list):
            return prompt
        if isinstance(prompt, str):
            return ([1] if body.get("add_special_tokens", True) else []) + word_ids(prompt)
        ids = [1]
        for message in body["messages"]:
            ids += [2, 3 if message["role"] == "user" else 4, *word_ids(message["content"]), 5]
        return [*ids, 2, 4]

    def usage(self, body: dict[str, Any]) -> dict[str, Any] | None:
        return {"prompt_tokens": len(self.tokens(body)), "completion_tokens": 4}

    def script(self, body: dict[str, Any], number: int) -> Script:
        """What the completion `number` (0 is the first) gets."""
        usage = [event({"choices": [], "usage": found})] if (found := self.usage(body)) else []
        pieces = [self.piece(body, word) for word in (" one", " two", " three", " four")]
        return [(0.001, b"".join([*pieces, self.end(body), *usage, DONE]))]

    def status(self, body: dict[str, Any], number: int) -> tuple[int, str]:
        return 200, "text/event-stream"

    def refusal_headers(self, body: dict[str, Any], number: int) -> dict[str, str]:
        """What a completion whose status is not 200 gets besides."""
        return {}

    # --- pieces ---

    def piece(self, body: dict[str, Any], text: str) -> bytes:
        return text_event(text) if "prompt" in body else delta_event(content=text)

    def end(self, body: dict[str, Any]) -> bytes:
        return event({"choices": [{"text": "", "delta": {}, "finish_reason": "length"}]})

    # --- the wire ---

    async def serve(self, listener: socket.socket) -> None:
        server = await asyncio.start_server(self._connection, sock=listener, limit=1 << 26)
        async with server:
            await server.serve_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                size = re.search(rb"(?i)content-length: *(\d+)", head)
                content = await reader.readexactly(int(size[1])) if size else b""
                there = time.perf_counter()
                path = head.split(b" ", 2)[1].decode()
                if path.startswith("/v1/") and path.endswith("completions"):
                    await self._complete(json.loads(content), there, writer)
                    await writer.drain()
                    writer.close()
                else:
                    self.others.append({"path": path, "there": there})
                    self._plain(writer, *self.answer(path, json.loads(content) if content else {}))
                    await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except Exception:
            traceback.print_exc()
        finally:
            writer.close()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and content of everything that is no completion."""
        if path == "/log":
            return 200, self.log
        if path == "/others":
            return 200, self.others
        if path == "/v1/models":
            entry = {"id": self.model, **({"max_model_len": self.limit} if self.limit else {})}
            return 200, {"data": [entry]}
        if path == "/version":
            return 200, {"version": "scripted"}
        if path == "/tokenize" and self.has_tokenize:
            ids = self.tokens(body)
            return 200, {"tokens": ids, "count": len(ids)}
        if path == "/metrics" and self.metrics:
            return 200, self.metrics
        return 404, {"detail": "Not Found"}

    def _plain(
        self, writer: asyncio.StreamWriter, status: int, content: Any, kind: str = "application/json", **more: str
    ) -> None:
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        headers = {"Content-Type": kind, "Content-Length": len(data), **more}
        head = f"HTTP/1.1 {status} -\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"{head}\r\n".encode() + data)

    async def _complete(self, body: dict[str, Any], there: float, writer: asyncio.StreamWriter) -> None:
        number, self.started = self.started, self.started + 1
        entry = {"prompt": body.get("prompt", body.get("messages")), "there": there, "sent": []}
        self.log.append(entry)
        if isinstance(body.get("prompt"), list) and not self.takes_ids:
            return self._plain(writer, 400, {"error": "expected a string"})
        status, kind = self.status(body, number)
        script = self.script(body, number)
        if status != 200:
            text = b"".join(p for _, p in script if isinstance(p, bytes)).decode()
            return self._plain(writer, status, text, kind, **self.refusal_headers(body, number))
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        for at, piece in script:
            await asyncio.sleep(max(0.0, there + at - time.perf_counter()))
            if piece == HANG:
                await asyncio.sleep(60)
            if piece == RESET:
                await asyncio.sleep(0.02)  # what was sent before is read first
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                return writer.transport.abort()
            if piece == CLOSE:
                return writer.close()
            assert isinstance(piece, bytes)
            entry["sent"].append(time.perf_counter())
            writer.write(head + b"%x\r\n%b\r\n" % (len(piece), piece))
            head = b""
        writer.write(b"0\r\n\r\n")


class Running:
    def __init__(self, url: str) -> None:
        self.url = url

    def log(self) -> list[dict[str, Any]]:
        return self._seen("/log")

    def others(self) -> list[dict[str, Any]]:
        return self._seen("/others")

    def _seen(self, path: str) -> list[dict[str, Any]]:
        with urllib.request.urlopen(self.url + path) as answer:
            return json.load(answer)


@contextlib.contextmanager
def running(server: ScriptedServer) -> Iterator[Running]:
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            gc.disable()  # a walk through all that it logged takes 10 ms
            loop = asyncio.SelectorEventLoop(selectors.SelectSelector())  # epoll's timeouts are whole milliseconds
            loop.run_until_complete(server.serve(listener))
        finally:
            os._exit(1)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()
    try:
        yield Running(url)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
