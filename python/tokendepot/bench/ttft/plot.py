"""Time to first token over the context. Needs matplotlib; draws without a display."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {"on": "#2f6f9f", "off": "#b3423a"}
_MARKERS = {"on": "so^Dv", "off": "oD^sv"}


def draw(result: dict[str, Any], base: dict[str, Any] | None, names: tuple[str, str], file: pathlib.Path) -> None:
    """Writes the figure as an image; the ending of `file` is its type."""
    from matplotlib import pyplot

    figure = figure_of(result, base, names)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def figure_of(result: dict[str, Any], base: dict[str, Any] | None, names: tuple[str, str]) -> Figure:
    """Medians with bars from least to most. `names` are those of run and base. The caller closes it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    shown: set[int] = set()
    for which, one, name in (("on", result, names[0]), ("off", base, names[1])):
        if one is None:
            continue
        turns = one["settings"]["turns"]
        for turn in range(1, turns + 1):
            points = [cell for cell in one["summary"] if cell["turn"] == turn and cell["ttft_s"]]
            if not points:
                continue
            tokens = [cell["context"] for cell in points]
            times = [cell["ttft_s"] for cell in points]
            middle = [t["median"] * 1e3 for t in times]
            low = [(t["median"] - t["min"]) * 1e3 for t in times]
            high = [(t["max"] - t["median"]) * 1e3 for t in times]
            shown.update(tokens)
            last = turn == turns
            # Lines that coincide are the rule: earlier turns are hollow and larger, so that they show behind.
            axes.errorbar(
                tokens, middle, yerr=(low, high), color=_COLOURS[which], capsize=3, linestyle="-" if last else ":",
                marker=_MARKERS[which][(turns - turn) % 5], markersize=5 if last else 10, zorder=3 if last else 2,
                markerfacecolor=None if last else "none", label=f"{name}, turn {turn}{' (cold)' if turn == 1 else ''}",
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(_legible(sorted(shown)))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("time to first token (ms)")
    settings = result["settings"]
    reached = max((cell.get("in_flight") or 0 for cell in result["summary"]), default=0) or settings["concurrency"]
    about = f"{settings['repeats']} conversations a context, up to {reached} in flight"
    axes.set_title(f"Time to first token: medians, bars from least to most\n{result['server'].get('model', '')}, {about}", fontsize=10, parse_math=False)
    axes.grid(True, which="both", alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _legible(ticks: list[int]) -> list[int]:
    """Without those that would be written over their neighbour on a logarithmic axis."""
    kept: list[int] = []
    span = ticks[-1] / ticks[0] if ticks else 1.0
    for tick in reversed(ticks):
        if not kept or kept[-1] / tick >= span**0.065:
            kept.append(tick)
    return kept
