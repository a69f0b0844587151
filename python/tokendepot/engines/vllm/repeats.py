"""Whether what an engine stores is ever found again.

A prompt repeats when its first chunk is one that this engine has stored. A repeat of which nothing is found was evicted
(the roots are too small for what comes back), or what is stored goes by other keys than what is looked up, which would
otherwise show as nothing but a hit rate of 0 for ever.
"""

from __future__ import annotations

from collections import OrderedDict

REMEMBERED = 4096  # first chunks, the latest ones
PROOF = 20  # repeats that were all missed


class Repeats:
    """Of one engine; the caller brings the clock's time."""

    def __init__(self) -> None:
        self._stored: OrderedDict[bytes, float] = OrderedDict()  # key -> when it can be found
        self._found = self._missed = 0

    def stored(self, key: bytes, visible: float) -> None:
        self._stored[key] = visible
        self._stored.move_to_end(key)
        if len(self._stored) > REMEMBERED:
            self._stored.popitem(last=False)

    def looked_up(self, key: bytes, found: bool, now: float) -> bool:
        """Whether this is a repeat that was missed."""
        visible = self._stored.get(key)
        if visible is None or visible > now:
            return False
        self._found += found
        self._missed += not found
        return not found

    def complaint(self) -> str:
        if self._found or self._missed < PROOF:
            return ""
        return (
            f"{self._missed} prompts began with a chunk that this engine had stored, and nothing of any of them was "
            "found: the roots are too small for what comes back, or keys of stores and look-ups differ"
        )
