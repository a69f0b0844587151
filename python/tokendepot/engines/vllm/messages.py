"""What travels between the two halves every engine step. Pickled by vLLM, so plain data and small."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

SKIP = -1  # block id of a place that is not wanted (the engine's SKIP_BLOCK)


@dataclass
class GroupBlocks:
    """The blocks of one group that a load fills: `per_chunk` ids for each chunk from `first_chunk` on."""

    group: int
    first_chunk: int
    per_chunk: int
    packed_ids: bytes  # array("i")

    @classmethod
    def pack(cls, group: int, first_chunk: int, per_chunk: int, ids: list[int]) -> GroupBlocks:
        return cls(group, first_chunk, per_chunk, array("i", ids).tobytes())

    def ids(self) -> list[int]:
        numbers = array("i")
        numbers.frombytes(self.packed_ids)
        return numbers.tolist()

    def by_chunk(self) -> list[tuple[int, list[int]]]:
        """(chunk, its ids) for each chunk from first_chunk on."""
        ids = self.ids()
        return [
            (self.first_chunk + at // self.per_chunk, ids[at : at + self.per_chunk])
            for at in range(0, len(ids), self.per_chunk)
        ]

    def wanted(self) -> set[int]:
        return {block for block in self.ids() if block != SKIP}

    def of_chunk(self, chunk: int) -> set[int]:
        """The wanted blocks of one chunk; empty when the chunk is not of this load."""
        first = (chunk - self.first_chunk) * self.per_chunk
        if first < 0:
            return set()
        return {block for block in self.ids()[first : first + self.per_chunk] if block != SKIP}


@dataclass
class LoadOrder:
    """One request's load. `plan` is None when the promise could not be kept: workers then report it failed; or when the
    bytes were verified before the promise and are held under `held_job`."""

    job: int
    request_id: str
    plan: bytes | None
    groups: list[GroupBlocks]
    held_job: int = 0


@dataclass
class HoldOrder:
    """Extents to read and verify before anything is promised."""

    job: int
    plan: bytes


@dataclass
class StoreOrder:
    """Stores of one group."""

    job: int
    group: int
    plan: bytes


@dataclass
class StepOrders(KVConnectorMetadata):
    """Scheduler half to every worker half."""

    loads: list[LoadOrder] = field(default_factory=list)
    stores: list[StoreOrder] = field(default_factory=list)
    holds: list[HoldOrder] = field(default_factory=list)
    drops: list[int] = field(default_factory=list)  # held jobs that will not be promised
    counts: dict[str, float] = field(default_factory=dict)  # the scheduler half's, for the metrics of rank 0
    fence: bool = False  # no store may read a block any more when this step's loads and its forward pass begin
    timed: int = 0  # to be reported as it is when the step ends; 0 = not wanted
    computes: bool = True  # the step has a forward pass


@dataclass
class StepReport(KVConnectorWorkerMetadata):
    """Worker half to scheduler half; one step's reports of all ranks are merged by vLLM."""

    failed_chunks: dict[tuple[int, int, int], str] = field(default_factory=dict)  # (load job, chunk, group) -> reason
    ended_stores: dict[int, int] = field(default_factory=dict)  # store job -> ranks that ended it
    failed_stores: set[tuple[int, int]] = field(default_factory=set)  # (store job, item)
    ended_holds: dict[int, int] = field(default_factory=dict)  # hold job -> ranks that ended it
    failed_holds: set[int] = field(default_factory=set)  # hold jobs of which a rank lacks something
    disabled: str = ""  # why a rank can neither load nor store any more
    steps: set[int] = field(default_factory=set)  # StepOrders.timed of the steps that have ended

    def aggregate(self, other: KVConnectorWorkerMetadata) -> StepReport:
        assert isinstance(other, StepReport)
        return StepReport(
            self.failed_chunks | other.failed_chunks,
            _added(self.ended_stores, other.ended_stores),
            self.failed_stores | other.failed_stores,
            _added(self.ended_holds, other.ended_holds),
            self.failed_holds | other.failed_holds,
            self.disabled or other.disabled,
            self.steps | other.steps,
        )

    def is_empty(self) -> bool:
        return self == StepReport()


def _added(one: dict[int, int], other: dict[int, int]) -> dict[int, int]:
    return {job: one.get(job, 0) + other.get(job, 0) for job in one.keys() | other.keys()}
