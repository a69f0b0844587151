"""What a streamed completion means: which events bear tokens, when it is complete, what the server counted."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from .sse import DONE

# What a whole answer ends with. None comes with [DONE] only; anything else, as abort or error, is no end of a model's.
ENDS = (None, "stop", "length", "tool_calls", "function_call", "content_filter", "stop_sequence", "eos_token", "repetition")


class RequestFailed(Exception):
    """One request without a complete answer. `kind` is one of:

    refused, unreachable (no connection) · http_NNN (any status but 200) · context_overflow (400, 413 or 422 that says
    so) · not_a_stream (200 without events) · malformed (an event that is no JSON object) · error_event (an error
    inside the stream) · reset · truncated (ended without [DONE] and finish_reason) · timeout (no token in time) ·
    stalled (no end in time, after a token) · empty (complete, without a token) · aborted (ended by the server before
    its end: a finish_reason that is none of ENDS). `answer` is what came of an empty one.
    """

    def __init__(self, kind: str, message: str, answer: Answer | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.answer = answer


@dataclass
class Answer:
    """Times are seconds since the request was sent. Lists grow while the answer comes in."""

    connect_s: float = 0.0  # before the request was sent
    sent_at: float = 0.0  # time.perf_counter()
    first_byte_s: float | None = None  # of the body
    token_s: list[float] = field(default_factory=list)  # events that bear tokens, content or reasoning
    first_content_s: float | None = None  # None: reasoning only
    end_s: float = 0.0
    text: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None

    @property
    def ttft_s(self) -> float:
        return self.token_s[0]

    @property
    def prompt_tokens(self) -> int | None:
        return _count(self.usage, "prompt_tokens")

    @property
    def cached_tokens(self) -> int | None:
        """None: not reported, which is not 0."""
        details = (self.usage or {}).get("prompt_tokens_details")
        return _count(details, "cached_tokens")

    @property
    def output_tokens(self) -> int:
        """As the server counts; without usage one an event (see `estimated`)."""
        counted = _count(self.usage, "completion_tokens")
        return len(self.token_s) if counted is None else counted

    @property
    def estimated(self) -> bool:
        return _count(self.usage, "completion_tokens") is None

    def take(self, data: str, at_s: float) -> bool:
        """One event; True when it was the last. RequestFailed when it is none, or an error."""
        if data == DONE:
            return True
        try:
            event = json.loads(data)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise RequestFailed("malformed", f"expected a JSON object as event, got {data[:120]!r}")
        if event.get("error"):
            raise RequestFailed("error_event", f"error inside the stream: {str(event['error'])[:200]}")
        try:
            self.usage = dict(event.get("usage") or {}) or self.usage
            for choice in event.get("choices") or ():
                self._take_choice(choice, at_s)
        except (AttributeError, TypeError, ValueError):
            raise RequestFailed("malformed", f"expected an event of a completion, got {data[:120]!r}") from None
        return False

    def _take_choice(self, choice: dict[str, Any], at_s: float) -> None:
        delta = choice.get("delta") or {}
        content = choice.get("text") or delta.get("content") or ""
        reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        if content or reasoning or delta.get("tool_calls"):
            self.token_s.append(at_s)
        if content and self.first_content_s is None:
            self.first_content_s = at_s
        self.text += content
        self.reasoning += reasoning

    def close(self, done: bool, at_s: float) -> None:
        """The stream has ended, in order or not: RequestFailed unless this is a whole answer."""
        if not done and self.finish_reason is None:
            raise RequestFailed("truncated", f"the stream ended after {len(self.token_s)} tokens without [DONE]")
        if self.finish_reason not in ENDS:
            raise RequestFailed("aborted", f"finish_reason {self.finish_reason!r} after {len(self.token_s)} tokens")
        if not self.token_s:
            raise RequestFailed("empty", f"complete without a token (finish_reason {self.finish_reason!r})", self)
        self.end_s = at_s


def _count(counts: Any, name: str) -> int | None:
    value = counts.get(name) if isinstance(counts, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None
