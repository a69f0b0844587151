"""What a run is asked for, and what of it must be equal for a run to go on or to be compared."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any


class BadSetting(ValueError):
    """One sentence that names the option, its value and what was expected."""


@dataclass(frozen=True)
class Settings:
    url: str
    model: str | None
    endpoint: str  # completions or chat
    contexts: tuple[int, ...]  # tokens of the first turn, question included
    turns: int
    repeats: int  # conversations of each context
    concurrency: int  # requests in flight at most
    rate: float | None  # requests started a second, whether or not earlier ones have ended
    answer_tokens: int  # at most
    seed: int
    timeout_s: float  # of one request, connection excluded
    max_error_rate: float
    cold_gpu: bool
    between: str | None  # a shell command to run before each later turn, e.g. a restart of the server
    tokenizer: str | None  # a tokenizer.json, for servers that do not count

    def __post_init__(self) -> None:
        for name in ("turns", "repeats", "concurrency", "answer_tokens"):
            if getattr(self, name) < 1:
                raise BadSetting(f"{option(name)} is {getattr(self, name)}, expected 1 or more")
        if not self.contexts or min(self.contexts) < 1 or list(self.contexts) != sorted(set(self.contexts)):
            listed = ",".join(map(str, self.contexts))
            raise BadSetting(f"--contexts is {listed!r}, expected ascending token counts with commas between")
        if self.endpoint not in ("completions", "chat"):
            raise BadSetting(f"--endpoint is {self.endpoint!r}, expected completions or chat")
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise BadSetting(f"--rate is {self.rate}, expected requests a second above 0")
        if not 0 < self.timeout_s < math.inf:
            raise BadSetting(f"--timeout is {self.timeout_s}, expected seconds above 0")
        if not 0 <= self.max_error_rate <= 1:
            raise BadSetting(f"--max-error-rate is {self.max_error_rate}, expected a share from 0 to 1")

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.endpoint == "chat" else "/v1/completions"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "contexts": list(self.contexts)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Settings:
        """KeyError when a field is missing."""
        return cls(**{**{field.name: content[field.name] for field in fields(cls)}, "contexts": tuple(content["contexts"])})


def option(name: str) -> str:
    """The option of the command line that sets a field."""
    return "--" + name.removesuffix("_s").replace("_", "-")


def parse_contexts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise BadSetting(f"--contexts is {text!r}, expected ascending token counts with commas between") from None
