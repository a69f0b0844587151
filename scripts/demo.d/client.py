"""Talks to an OpenAI-compatible server: streamed completions with their time to first token, tokens, metrics."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families


class ServerFault(Exception):
    """The server refused, broke off, or answered something that is no completion."""


@dataclass(frozen=True)
class Answer:
    text: str
    ttft_s: float
    total_s: float
    prompt_tokens: int
    cached_tokens: int


def events(lines: Iterable[str]) -> Iterator[dict]:
    """The JSON events of a server-sent stream. ServerFault on an in-band error, on a line that is no event, and when
    the stream ends without [DONE]."""
    for line in lines:
        if not line.strip() or line.startswith(":"):
            continue
        if not line.startswith("data:"):
            raise ServerFault(f"unexpected line in the stream: {line[:200]!r}, expected 'data: ...'")
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError as error:
            raise ServerFault(f"event is not JSON ({error}): {data[:200]!r}") from error
        if "error" in event:
            raise ServerFault(f"the server reported an error in the stream: {event['error']}")
        yield event
    raise ServerFault("the stream ended without [DONE]")


class Client:
    def __init__(self, base_url: str, timeout_s: float = 600.0) -> None:
        self._http = httpx.Client(base_url=base_url, timeout=timeout_s, trust_env=False)

    def close(self) -> None:
        self._http.close()

    def ready(self) -> bool:
        try:
            return self._http.get("/health", timeout=2.0).status_code == 200
        except httpx.HTTPError:
            return False

    def complete(self, prompt: str, max_tokens: int) -> Answer:
        """Greedy. The first token is the first event with a text that is not empty."""
        body = {
            "model": "demo",
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        begin = time.perf_counter()
        first = None
        pieces: list[str] = []
        usage: dict | None = None
        try:
            with self._http.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    text = response.read().decode(errors="replace")
                    raise ServerFault(f"status {response.status_code}: {text[:300]}")
                for event in events(response.iter_lines()):
                    usage = event.get("usage") or usage
                    for choice in event.get("choices", ()):
                        text = choice.get("text") or ""
                        if text and first is None:
                            first = time.perf_counter()
                        pieces.append(text)
        except httpx.HTTPError as error:
            raise ServerFault(f"{type(error).__name__}: {error}") from error
        end = time.perf_counter()
        if first is None:
            raise ServerFault("the answer is empty")
        if usage is None:
            raise ServerFault("the stream carried no usage")
        details = usage.get("prompt_tokens_details") or {}
        return Answer("".join(pieces), first - begin, end - begin, usage["prompt_tokens"], details.get("cached_tokens") or 0)

    def _post(self, path: str, body: dict) -> dict:
        try:
            response = self._http.post(path, json={"model": "demo", **body})
        except httpx.HTTPError as error:
            raise ServerFault(f"{path}: {type(error).__name__}: {error}") from error
        if response.status_code != 200:
            raise ServerFault(f"{path}: status {response.status_code}: {response.text[:300]}")
        return response.json()

    def first_tokens(self, text: str, count: int) -> str:
        """The text of the first `count` tokens of `text`; ServerFault when it has fewer."""
        tokens = self._post("/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]
        if len(tokens) < count:
            raise ServerFault(f"the document has {len(tokens)} tokens, expected at least {count}")
        return self._post("/detokenize", {"tokens": tokens[:count]})["prompt"]

    def metrics(self) -> dict[str, float]:
        """Every counter of /metrics, summed over its labels."""
        try:
            text = self._http.get("/metrics").text
        except httpx.HTTPError as error:
            raise ServerFault(f"/metrics: {type(error).__name__}: {error}") from error
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
        return sums
