"""What the scheduler half remembers of live requests and of the jobs under way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tokendepot import _core


@dataclass
class Promise:
    local_tokens: int
    hit_tokens: int


@dataclass
class Hold:
    """Extents that the workers verify, or have verified, before they are promised."""

    job: int
    request_id: str
    chunks: int  # of the prefix
    keys: bytes
    began: float
    until: float  # when it is given up
    ended_by: int = 0
    failed: bool = False
    missed: set[int] = field(default_factory=set)  # chunks that failed


@dataclass
class Tracked:
    """What is known about one live request."""

    request: Any
    chain: _core.KeyChain | None = None  # None: the request takes no part (see `barred`)
    barred: str = ""
    media: list[tuple[str, int, int]] = field(default_factory=list)
    promise: Promise | None = None
    hold: Hold | None = None
    load_failed: bool = False  # from then on it computes
    not_worth: int = 0  # tokens that the last look-up found and left to be computed
    tables: list[list[int]] = field(default_factory=list)  # block ids of each group
    next_chunk: int = 0  # chunks before it need no more thought
    counted: bool = False  # in queried_tokens
    found: bool | None = None  # whether the last look-up found anything; None = there was none
    asked_chunks: int = 0  # of the last look-up; 0 = there was none
    missing: int = 0  # chunk at which its hit ended
    local_tokens: int = 0  # that the engine had then


@dataclass
class Load:
    request_id: str
    keys: bytes
    local: int  # tokens that the engine had
    tokens: int  # that are loaded
    total: int  # of the prompt
    began: float
    failed: bool = False
    missed: set[int] = field(default_factory=set)  # chunks that failed


@dataclass
class Store:
    keys: list[tuple[bytes, int]]
    firsts: list[tuple[bytes, int]]  # of the keys, those of first chunks
    ended_by: int = 0


def bar(request: Any) -> str:
    """Why a request takes no part, or ""."""
    if getattr(request, "prompt_embeds", None) is not None:
        return "prompt embeddings have no token ids to make keys of"
    if getattr(request, "resumable", False) or getattr(request, "streaming_queue", None) is not None:
        return "the prompt of a streaming session can still change"
    if any(item.identifier is None for item in request.mm_features or ()):
        return "a multimodal item has no content hash"
    return ""
