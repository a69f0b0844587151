"""How much capacity a trace needs, at which bandwidth, and what it saves.

Hits of an LRU cache come from stack distances, at every capacity at once; those of the depot's own policy from playing the
trace against its model at some. All sizes are bytes of KV of one model, a short last block counted as a whole one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .cache_models import Outcome, SegmentCache, least_capacity_bytes, play
from .extents import SizeError, extent_bytes
from .shapes import Shape, ShapeError, bytes_per_token, prefill_flops
from .stack_distance import NEVER, needed_capacities
from .traces import Trace

TARGETS = (0.90, 0.95, 0.99)
CURVE_POINTS = 16
WINDOWS_AT_MOST = 10_000_000
CURVE_BEGIN = 0.005  # of the unique blocks
SEARCH_STEPS = 6  # halvings of a gap between two points of the curve that SEARCH_PRECISION takes, at most
SEARCH_PRECISION = 0.02  # of a capacity
SECONDS_A_DAY = 86_400.0
SECONDS_A_MONTH = 30 * SECONDS_A_DAY


@dataclass(frozen=True)
class Prefill:
    """Seconds of one GPU that a prefill costs.

    With `tokens_per_s` the rate is the measured one at `measured_at` tokens, and other lengths cost in proportion to their
    floating-point operations (`shapes.prefill_flops`); of a shape without parameters every token costs the same. Without
    it the operations are divided by `tflops` * `utilisation`.
    """

    shape: Shape
    tokens_per_s: float | None
    measured_at: int
    tflops: float
    utilisation: float

    def seconds(self, begin: int, end: int) -> float:
        """Of the tokens [begin, end) of a prompt whose first `begin` tokens are in the cache."""
        if self.tokens_per_s is None:
            return prefill_flops(self.shape, begin, end) / (self.tflops * 1e12 * self.utilisation)
        if self.shape.parameters is None:
            return (end - begin) / self.tokens_per_s
        a_measured_one = prefill_flops(self.shape, 0, self.measured_at)
        return prefill_flops(self.shape, begin, end) / a_measured_one * self.measured_at / self.tokens_per_s

    def in_words(self) -> str:
        if self.tokens_per_s is None:
            return (
                f"{self.shape.parameters / 1e9:g} G weights and attention in FLOP, "
                f"at {self.utilisation:g} of {self.tflops:g} TFLOP/s a GPU"
            )
        if self.shape.parameters is None:
            return f"{self.tokens_per_s:g} tokens/s a GPU at every length"
        return f"{self.tokens_per_s:g} tokens/s a GPU at {self.measured_at:,} tokens, other lengths by their FLOP"


@dataclass
class Point:
    """One capacity and the hits there, as shares of all tokens; `depot` None = too small for a depot, or not played."""

    capacity_bytes: int
    lru: float
    depot: float | None = None


@dataclass
class Target:
    """What it takes and gives to have a share of the hits of an unbounded cache.

    Attributes:
        lru_bytes, depot_bytes: capacity by either policy; depot None = not found (yet).
        read, write: GB/s (10^9 bytes) in the busiest 1 % of windows and in the busiest one.
        saved_gpu_s: GPU-seconds of prefill that the hits save in the whole trace; `a_day`: None = the trace is one moment.
        dollars: of a million prompt tokens, storage included; None = no price was stated.
    """

    share: float
    hit_rate: float
    lru_bytes: int
    read: tuple[float, float]
    write: tuple[float, float]
    saved_gpu_s: float
    saved_gpu_s_a_day: float | None
    depot_bytes: int | None = None
    dollars: float | None = None


@dataclass
class Tiers:
    """Hits of a memory and an NVMe tier, as shares of all blocks, by LRU and by the depot's policy (None: too small)."""

    memory_bytes: int
    nvme_bytes: int
    lru: tuple[float, float]
    depot: tuple[float, float] | None = None


@dataclass
class Plan:
    """Filled from the top down; `curve` and what follows may be incomplete when the work was interrupted.

    depot_at_least_bytes: the smallest capacity that is a depot, all ranks together.
    """

    block_bytes: int
    unique_bytes: int
    depot_at_least_bytes: int
    ideal_blocks: float
    ideal_tokens: float
    gpu_s: float
    dollars_before: float | None
    targets: list[Target] = field(default_factory=list)
    curve: list[Point] = field(default_factory=list)
    tiers: list[Tiers] = field(default_factory=list)


@dataclass(frozen=True)
class Prices:
    """Dollars of a GPU-hour and of a GiB-month of storage; None = not stated."""

    gpu_hour: float | None = None
    gib_month: float = 0.0


class Planner:
    """Plans one trace for one model. `plan` is complete after `start`, `follow_depot` and `try_tiers`, in this order.

    tp: ranks, each with a segment of its own: 1/tp of a block in each.

    Raises:
        ShapeError: a prefill cannot be priced because the shape's parameters are not known.
        SizeError: the trace has more windows than WINDOWS_AT_MOST.
    """

    def __init__(self, trace: Trace, dtype: str, tp: int, prefill: Prefill, prices: Prices, window_s: float) -> None:
        if prefill.tokens_per_s is None and prefill.shape.parameters is None:
            raise ShapeError(
                f"model '{prefill.shape.name}': its number of parameters is not known; expected --prefill-rate"
            )
        if trace.span_s / window_s > WINDOWS_AT_MOST:
            raise SizeError(
                f"window of {window_s:g} s: expected at least {trace.span_s / WINDOWS_AT_MOST:.3g} s "
                f"for a trace of {trace.span_s:.6g} s"
            )
        self._trace = trace
        self._prefill = prefill
        self._prices = prices
        self._window_s = window_s
        self._tp = tp
        self._block_bytes = bytes_per_token(prefill.shape, dtype) * trace.block_tokens
        heads = prefill.shape.kv_heads  # each is a shard, as `replay` stores them
        self._extent_bytes = extent_bytes(-(-self._block_bytes // max(tp, heads)), max(1, heads // tp))
        self.plan = self._start()

    @property
    def runs(self) -> int:
        """How many times the trace will be played, at most: for a progress bar."""
        return CURVE_POINTS + (len(TARGETS) + 1) * SEARCH_STEPS

    # --- by stack distances ---

    def _start(self) -> Plan:
        trace = self._trace
        self._needed = needed_capacities(trace)
        self._lengths = np.fromiter((len(r.blocks) for r in trace.requests), np.int64, len(trace.requests))
        self._times = np.fromiter((r.time_s for r in trace.requests), np.float64, len(trace.requests))
        self._tokens = np.fromiter(
            (
                trace.tokens_of(r, i + 1) - trace.tokens_of(r, i)
                for r in trace.requests
                for i in range(len(r.blocks))
            ),
            np.int64,
            len(self._needed),
        )
        # Cumulated over references by the capacity they need: one search gives the hits of any capacity.
        order = np.argsort(self._needed, kind="stable")
        order = order[self._needed[order] != NEVER]
        self._steps = self._needed[order]
        self._hit_tokens = np.cumsum(self._tokens[order])
        ideal = int(self._hit_tokens[-1]) if len(order) else 0
        gpu_s = sum(self._prefill.seconds(0, r.input_tokens) for r in trace.requests)
        plan = Plan(
            block_bytes=self._block_bytes,
            unique_bytes=trace.unique_blocks * self._block_bytes,
            depot_at_least_bytes=self._tp * least_capacity_bytes(self._extent_bytes),
            ideal_blocks=len(order) / max(1, len(self._needed)),
            ideal_tokens=ideal / max(1, trace.input_tokens),
            gpu_s=gpu_s,
            dollars_before=self._dollars(gpu_s, 0),
        )
        if ideal:
            for share in (*TARGETS, 1.0):
                at = int(np.searchsorted(self._hit_tokens, share * ideal))
                plan.targets.append(self._target(share, int(self._steps[at])))
        for blocks in np.unique(
            np.geomspace(max(1, CURVE_BEGIN * trace.unique_blocks), trace.unique_blocks, CURVE_POINTS).astype(np.int64)
        ):
            plan.curve.append(Point(int(blocks) * self._block_bytes, self._lru_rate(int(blocks))))
        return plan

    def _lru_rate(self, blocks: int) -> float:
        count = int(np.searchsorted(self._steps, blocks, side="right"))
        return int(self._hit_tokens[count - 1]) / self._trace.input_tokens if count else 0.0

    def _target(self, share: float, blocks: int) -> Target:
        hit = self._needed <= blocks
        prompt = np.repeat(np.arange(len(self._lengths)), self._lengths)
        hits = np.bincount(prompt, weights=hit, minlength=len(self._lengths))
        saved = sum(
            self._prefill.seconds(0, min(self._trace.tokens_of(r, int(count)), r.input_tokens - 1))
            for r, count in zip(self._trace.requests, hits, strict=True)
            if count
        )
        return Target(
            share=share,
            hit_rate=self._lru_rate(blocks),
            lru_bytes=blocks * self._block_bytes,
            read=self._rates(hits),
            write=self._rates(self._lengths - hits),
            saved_gpu_s=saved,
            saved_gpu_s_a_day=saved * SECONDS_A_DAY / self._trace.span_s if self._trace.span_s else None,
        )

    def _rates(self, blocks: NDArray[np.float64]) -> tuple[float, float]:
        """GB/s of so many blocks for each prompt, over windows side by side: (99th percentile, largest)."""
        window = ((self._times - self._times[0]) / self._window_s).astype(np.int64)
        rates = np.bincount(window, weights=blocks) * self._block_bytes / self._window_s / 1e9
        return float(np.percentile(rates, 99)), float(rates.max())

    def _dollars(self, gpu_s: float, capacity_bytes: int) -> float | None:
        if self._prices.gpu_hour is None or not self._trace.input_tokens:
            return None
        storage = self._prices.gib_month * capacity_bytes / 2**30 * self._trace.span_s / SECONDS_A_MONTH
        return (gpu_s / 3600 * self._prices.gpu_hour + storage) / self._trace.input_tokens * 1e6

    # --- by the depot's policy ---

    def _play(self, capacities: Sequence[int]) -> Outcome | None:
        try:
            cache = SegmentCache([capacity // self._tp for capacity in capacities], self._extent_bytes)
        except SizeError:
            return None
        outcome = Outcome()
        play(self._trace, cache, outcome)
        return outcome

    def follow_depot(self, advance: Callable[[int], None]) -> None:
        """Plays the trace at the capacities of the curve, then searches the capacity of each target between them."""
        for point in self.plan.curve:
            played = self._play([point.capacity_bytes])
            point.depot = played and played.token_hit_rate
            advance(1)
        for target in self.plan.targets:
            target.depot_bytes = self._search(target.share * self.plan.ideal_tokens, advance)
            target.dollars = self._dollars(self.plan.gpu_s - target.saved_gpu_s, target.depot_bytes)

    def _search(self, wanted: float, advance: Callable[[int], None]) -> int:
        """The smallest capacity, to SEARCH_PRECISION, with the wanted hits; each that is returned was played."""
        enough = [p.capacity_bytes for p in self.plan.curve if p.depot is not None and p.depot >= wanted]
        high = min(enough, default=None) or self._roof()
        low = max((p.capacity_bytes for p in self.plan.curve if p.capacity_bytes < high), default=0)
        least = self.plan.depot_at_least_bytes
        if low < least:
            if self._finds(wanted, least):
                return least
            low = least
        while high - low > SEARCH_PRECISION * high:
            middle = (low + high) // 2
            if self._finds(wanted, middle):
                high = middle
            else:
                low = middle
            advance(1)
        return high

    def _finds(self, wanted: float, capacity: int) -> bool:
        played = self._play([capacity])
        return played is not None and played.token_hit_rate >= wanted

    def _roof(self) -> int:
        """A capacity with all hits there are: mostly twice what the blocks take, more where there are few or small ones."""
        capacity = max(2 * self.plan.curve[-1].capacity_bytes, self.plan.depot_at_least_bytes)
        while not self._finds(self.plan.ideal_tokens, capacity):
            capacity *= 2  # ends: at some size nothing is ever evicted
        return capacity

    def try_tiers(self, memory: Sequence[int], nvme: Sequence[int], advance: Callable[[int], None]) -> None:
        """Each size of memory with each of NVMe; 0 = without that tier. NVMe also holds what memory holds."""
        references = max(1, len(self._needed))
        for first in memory:
            for second in nvme:
                if not first and not second:
                    continue
                in_memory, in_nvme = first // self._block_bytes, second // self._block_bytes
                fast = int((self._needed <= in_memory).sum())
                slow = int((self._needed <= max(in_memory, in_nvme)).sum()) - fast
                tiers = Tiers(first, second, (fast / references, slow / references))
                played = self._play([size for size in (first, second) if size])
                if played is not None:
                    hits = [count / references for count in played.hits_by_tier]
                    if not first:
                        hits.insert(0, 0.0)
                    tiers.depot = (hits[0], hits[1] if len(hits) > 1 else 0.0)
                self.plan.tiers.append(tiers)
                advance(1)
