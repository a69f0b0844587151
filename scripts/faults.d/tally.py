"""What a kind of fault came to, and the table of all of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

MOST_FAILURES_KEPT = 20


@dataclass
class Tally:
    """One row of the table. `wrong` counts chunks served with other bytes than were stored, `lost` acknowledged chunks
    that a later process could not load though nothing had damaged or evicted them, `deaths` processes that ended by
    themselves, `hangs` answers that did not come within their limit."""

    kind: str
    injected: int = 0
    checked: int = 0
    wrong: int = 0
    lost: int = 0
    deaths: int = 0
    hangs: int = 0
    seconds: float = 0.0
    not_here: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return self.wrong + self.lost + self.deaths + self.hangs > 0

    def fail(self, what: str, message: str, count: int = 1) -> None:
        """what: "wrong", "lost", "deaths" or "hangs"."""
        setattr(self, what, getattr(self, what) + count)
        if len(self.failures) < MOST_FAILURES_KEPT:
            self.failures.append(f"{what}: {message}")

    def add(self, other: Tally) -> None:
        for name in ("injected", "checked", "wrong", "lost", "deaths", "hangs"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.not_here += other.not_here
        self.failures += other.failures[: MOST_FAILURES_KEPT - len(self.failures)]


def print_table(tallies: list[Tally], console: Console) -> None:
    table = Table(title="Injected faults", title_justify="left")
    table.add_column("fault")
    for name in ("injected", "loads checked", "wrong", "lost", "deaths", "hangs", "seconds"):
        table.add_column(name, justify="right")
    for t in tallies:
        if t.not_here and t.injected == 0:
            table.add_row(t.kind, "not here", *[""] * 6)
            continue
        counts = [t.injected, t.checked, t.wrong, t.lost, t.deaths, t.hangs]
        table.add_row(t.kind, *(f"{n:,}" for n in counts), f"{t.seconds:.1f}", style="red" if t.failed else None)
    console.print(table)


def summary(tallies: list[Tally]) -> str:
    total = Tally("all")
    for t in tallies:
        total.add(t)
    return (
        f"FAULTS injected {total.injected} wrong {total.wrong} lost {total.lost} "
        f"deaths {total.deaths} hangs {total.hangs}"
    )


def as_json(tallies: list[Tally], seed: int, length: str) -> dict:
    return {
        "seed": seed,
        "length": length,
        "kinds": [dataclasses.asdict(t) for t in tallies],
        "summary": summary(tallies),
    }
