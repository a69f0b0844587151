"""What the demo measured, as a table, as JSON, as a plot, and whether it is good enough."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One context. Times are seconds to the first token."""

    context: int  # tokens of the document
    prompt_tokens: int  # of the second turn: document, two questions, the first answer
    cold_s: float  # first turn, nothing stored
    restart_cold_s: float  # second turn after a restart, no depot
    restart_warm_s: float  # second turn after a restart, from the depot
    loaded_bytes: int
    load_s: float  # the connector's own seconds for those bytes, summed over extents
    cached_tokens: int
    answers_equal: bool
    warm_answer: str
    cold_answer: str

    @property
    def speedup(self) -> float:
        return self.restart_cold_s / self.restart_warm_s

    @property
    def load_gbps(self) -> float:
        return self.loaded_bytes / self.load_s / 1e9 if self.load_s > 0 else 0.0


def complaints(rows: Sequence[Row]) -> list[str]:
    """Why the demo failed; empty when it did not."""
    if not rows:
        return ["no context was measured"]
    found = []
    for row in rows:
        where = f"context {row.context}: "
        if not row.answers_equal:
            found.append(f"{where}the warm answer {row.warm_answer!r} differs from the cold one {row.cold_answer!r}")
        if row.loaded_bytes <= 0:
            found.append(where + "nothing was loaded from the depot")
        if row.cached_tokens <= 0:
            found.append(where + "the engine counts no cached token")
        slowest_cold = min(row.cold_s, row.restart_cold_s)
        if row.restart_warm_s >= slowest_cold:
            found.append(f"{where}warm ({row.restart_warm_s:.3f} s) is not faster than cold ({slowest_cold:.3f} s)")
    return found


def table(rows: Sequence[Row]) -> Table:
    out = Table(title="Time to first token after kill -9 and restart", title_justify="left")
    for name in ("tokens", "turn 1\ncold", "turn 2\nno depot", "turn 2\ndepot", "speed-up", "from depot", "loaded", "load rate"):
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("answers", no_wrap=True)
    for row in rows:
        out.add_row(
            f"{row.prompt_tokens:,}",
            f"{row.cold_s:.2f} s",
            f"{row.restart_cold_s:.2f} s",
            f"{row.restart_warm_s:.2f} s",
            f"{row.speedup:.1f} x",
            f"{row.cached_tokens:,} tok",
            f"{row.loaded_bytes / 1e6:.1f} MB",
            f"{row.load_gbps:.2f} GB/s" if row.load_gbps else "-",
            "equal" if row.answers_equal else "DIFFER",
        )
    return out


def write_json(rows: Sequence[Row], about: dict, file: pathlib.Path) -> None:
    content = {**about, "rows": [{**asdict(row), "speedup": round(row.speedup, 2)} for row in rows]}
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_plot(rows: Sequence[Row], subtitle: str, file: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    contexts = [row.context for row in rows]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot(contexts, [row.restart_cold_s for row in rows], "o-", color="#b3423a", label="recomputed (no depot)")
    axes.plot(contexts, [row.restart_warm_s for row in rows], "s-", color="#2f6f9f", label="loaded from the depot")
    for row in rows:
        axes.annotate(f"{row.speedup:.0f}x", (row.context, row.restart_warm_s), textcoords="offset points", xytext=(0, -14), ha="center")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("time to first token (s)")
    axes.set_title(f"Turn 2 after kill -9 and restart\n{subtitle}", fontsize=10)
    axes.grid(True, which="both", alpha=0.3)
    axes.margins(y=0.2)
    axes.legend()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
