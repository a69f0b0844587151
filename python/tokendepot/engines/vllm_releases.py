"""The vLLM releases that the connector serves, without importing a vLLM: that takes seconds and may fail."""

from __future__ import annotations

import re

OLDEST = (0, 20)
NEWEST_TESTED = (0, 33)


def parse(version: str) -> tuple[int, int]:
    """(major, minor); a version that has none ("dev") counts as the newest tested."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else NEWEST_TESTED
