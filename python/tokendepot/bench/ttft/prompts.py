"""Prompts of exactly N tokens that no server has seen, and the turns that go on from them.

A context is a list of common words. The first ones say who it is (run, conversation), so that two contexts, of this run or
of any other, differ from their first token on; the rest comes from the seed. Counting goes by words: what each
adds is asked of the counter once, so that a text of N tokens can be made without sending it first.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .words import WORDS

Prompt = Any  # token ids (list of int), text (str), or chat messages (list of dict)
IDENTITY_WORDS = 16
_REPETITIONS = 8  # of a word when its cost is measured
_REPAIRS = 8


class TooSmall(ValueError):
    """A context of so few tokens has no room for its question."""


def question(turn: int) -> str:
    return f"\nWhat is word {turn}?"


def longer(prompt: Prompt, answer: str, turn: int, ids: Callable[[str], list[int]]) -> Prompt:
    """The prompt of the next turn: everything so far, the answer, a new question. `ids` is asked for ids only."""
    asked = question(turn)
    if isinstance(prompt, str):
        return prompt + answer + asked
    if prompt and isinstance(prompt[0], dict):
        return [*prompt, {"role": "assistant", "content": answer or "-"}, {"role": "user", "content": asked.strip()}]
    return prompt + ids(answer + asked)


@dataclass(frozen=True)
class Identity:
    """What makes a context unlike all others."""

    run: str
    generation: int  # how often the run was resumed before this context was first sent
    number: int  # of the conversation in the run

    def words(self, vocabulary: list[str]) -> list[str]:
        """The first two are a number in the base of the vocabulary: no two conversations of a run share both."""
        rng = random.Random(f"{self.run}/{self.generation}")
        size = len(vocabulary)
        first = (rng.randrange(size) + self.number) % size
        second = (rng.randrange(size) + self.number // size) % size
        rng = random.Random(f"{self.run}/{self.generation}/{self.number}")
        return [vocabulary[first], vocabulary[second], *rng.choices(vocabulary, k=IDENTITY_WORDS - 2)]


class Maker:
    """Makes contexts of exactly N tokens.

    count(text) is the number of tokens of a first turn with that text, everything that the server adds included. With
    `verify`, counting leaves no trace in the server and each text is counted as a whole; otherwise the words' costs
    are trusted (and the server's usage shows whether they were right). `ids(text)` gives bare ids; with `send_ids`
    prompts are those.
    """

    def __init__(
        self,
        count: Callable[[str], int],
        ids: Callable[[str], list[int]] | None,
        send_ids: bool,
        verify: bool,
        words: int = len(WORDS),
    ) -> None:
        self._count, self._verify = count, verify
        self._ids = ids if send_ids else None
        sample = random.Random(5).sample(WORDS, words)
        if self._ids:
            self._word_ids = {word: self._ids(" " + word) for word in sample}
            self.vocabulary = [word for word in sample if self._word_ids[word]]
            self.overhead, self.added = len(self._ids(question(1))), 0
            self.dearest = max(map(len, self._word_ids.values()))
            return
        alone = count("and")
        self.cost: dict[str, int] = {}
        for word in sample:
            cost, odd = divmod(count(" ".join(["and"] + [word] * _REPETITIONS)) - alone, _REPETITIONS)
            if cost > 0 and not odd:
                self.cost[word] = cost
        self.vocabulary = list(self.cost)
        if len(self.vocabulary) < 8:
            raise ValueError("the server's counts of repeated words do not add up, so no prompt can be made to measure")
        self.dearest = max(self.cost.values())
        probe = self.vocabulary[:8]
        taken = sum(self.cost[word] for word in probe)
        self.added = max(0, count(" ".join(probe)) - taken)  # tokens of the server's own around every prompt
        self.overhead = count(" ".join(probe) + question(1)) - taken  # those, and the question's

    def context(self, tokens: int, identity: Identity, seed: str) -> tuple[str | list[int], int]:
        """A first turn, question included, and its number of tokens by the counter: `tokens` where that can be made.

        TooSmall when there is no room for a word or four.
        """
        room = tokens - self.overhead
        head, rng = identity.words(self.vocabulary), random.Random(seed)
        if self._ids:
            if room < 4:
                raise TooSmall(f"its question alone takes {self.overhead} tokens")
            made: list[int] = []
            for word in head:
                made += self._word_ids[word]
            while len(made) < room:
                for word in rng.choices(self.vocabulary, k=max(8, (room - len(made)) // 2)):
                    made += self._word_ids[word]
            return made[:room] + self._ids(question(1)), tokens
        dearest = self.dearest
        if room < 4 * dearest:
            raise TooSmall(f"question and template take {self.overhead} tokens, and four words {4 * dearest}")
        words: list[str] = []
        for word in head:
            if sum(map(self.cost.__getitem__, words)) + self.cost[word] <= room - 2 * dearest:
                words.append(word)
        left = room - sum(self.cost[word] for word in words)
        while (bulk := left // dearest - 4) > 0:
            words += (more := rng.choices(self.vocabulary, k=bulk))
            left -= sum(self.cost[word] for word in more)
        words += self._exactly(left, rng)
        return self._repaired(words, tokens, rng)

    def _exactly(self, room: int, rng: random.Random) -> list[str]:
        """Words that cost `room` together, or as little less as can be."""
        by_cost: dict[int, list[str]] = {}
        for word, cost in self.cost.items():
            by_cost.setdefault(cost, []).append(word)
        last: list[int | None] = [0] + [None] * room  # cost of the last word of some list that costs so much
        for total in range(1, room + 1):
            costs = [cost for cost in by_cost if cost <= total and last[total - cost] is not None]
            last[total] = rng.choice(costs) if costs else None
        total = max(total for total in range(room + 1) if last[total] is not None)
        words = []
        while total:
            cost = last[total]
            assert cost
            words.append(rng.choice(by_cost[cost]))
            total -= cost
        return words

    def _repaired(self, words: list[str], tokens: int, rng: random.Random) -> tuple[str, int]:
        planned = self.overhead + sum(self.cost[word] for word in words)
        text = " ".join(words) + question(1)
        if not self._verify:
            return text, planned
        for _ in range(_REPAIRS):
            planned = self._count(text)
            missing = tokens - planned
            if missing == 0:
                break
            while missing < 0 and len(words) > 4:
                missing += self.cost[words.pop()]
            words = words + self._exactly(max(missing, 0), rng)
            text = " ".join(words) + question(1)
        return text, planned


def common_prefix(a: Any, b: Any) -> int:
    """Leading elements (or characters) that two sequences share."""
    end = min(len(a), len(b))
    equal, step = 0, 8
    while equal < end:
        more = min(step, end - equal)
        if a[equal : equal + more] == b[equal : equal + more]:
            equal += more
            step *= 2
        elif more == 1:
            break
        else:
            step = more // 2
    return equal


def longest_overlap(prompts: list[Any]) -> int:
    """The longest prefix that any two of them share: neighbours in sorted order share the most."""
    ordered = sorted(prompts)
    return max((common_prefix(a, b) for a, b in zip(ordered, ordered[1:])), default=0)
