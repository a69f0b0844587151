"""The vLLM releases that the connector serves, without importing a vLLM: that takes seconds and may fail."""

from __future__ import annotations

import re

OLDEST = (0, 20)
NEWEST_TESTED = (0, 33)
RANGE = " to ".join(".".join(map(str, release)) for release in (OLDEST, NEWEST_TESTED))


def parse(version: str) -> tuple[int, int]:
    """(major, minor); a version that has none ("dev") counts as the newest tested."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else NEWEST_TESTED


def refusal(version: str) -> str | None:
    """Why a vLLM of this version cannot be served, or None. A newer one than was tested is tried."""
    if parse(version) < OLDEST:
        return f"vLLM {version} is not supported: tokendepot serves {RANGE}"
    return None


def misfit(version: str, problem: str) -> str:
    """Why a vLLM that was tried cannot be served after all."""
    return f"vLLM {version} does not fit tokendepot, which serves {RANGE}: {problem}"
