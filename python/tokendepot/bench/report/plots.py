"""The report's pictures, as SVG that can stand in an HTML page: no header, no reference to anything outside."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ..ttft import plot
from . import figures

BEFORE, AFTER = "#b3423a", "#2f6f9f"
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def ttft(before: dict[str, Any], after: dict[str, Any]) -> str:
    return _inline(plot.figure_of(after, before, ("after", "before")), "ttft")


def steadiness(before: dict[str, Any], after: dict[str, Any]) -> str:
    """TTFT of each request over the median of its cell, by the time of its sending."""
    figure, axes = pyplot.subplots(figsize=(8, 3.4), layout="constrained")
    axes.axhline(1.0, color="0.6", linewidth=1)
    for name, run, colour, marker in (("before", before, BEFORE, "o"), ("after", after, AFTER, "x")):
        points = figures.relative(run)
        minutes, ratios = [t / 60 for t, _ in points], [ratio for _, ratio in points]
        axes.plot(minutes, ratios, marker, color=colour, markersize=5, markerfacecolor="none", label=name)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.set_xlabel("minutes since the run began")
    axes.set_ylabel("TTFT over the median of its cell")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2)
    return _inline(figure, "steadiness")


def window(runs: list[figures.Stability]) -> str:
    """Median TTFT of the last turn, run after run, one line a context."""
    figure, axes = pyplot.subplots(figsize=(8, 3.4), layout="constrained")
    places = range(1, len(runs) + 1)
    for context in sorted({context for run in runs for context in run.last_turn_p50_seconds}):
        times = [run.last_turn_p50_seconds.get(context) for run in runs]
        axes.plot(places, [None if t is None else t * 1e3 for t in times], "o-", label=f"{context:,}")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(places, [run.name for run in runs])
    axes.set_ylabel("TTFT of the last turn (ms)")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=6, title="context (tokens)", fontsize=8)
    return _inline(figure, "window")


def _inline(figure: Figure, name: str) -> str:
    with matplotlib.rc_context({"svg.hashsalt": name}):
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=_NO_METADATA)
    pyplot.close(figure)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    # Inside HTML the namespaces of XML are not needed, sizes are the page's, and ids of several pictures would collide.
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r"<style .*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'^<svg([^>]*?) width="[^"]*"', r"<svg\1", re.sub(r'^<svg([^>]*?) height="[^"]*"', r"<svg\1", svg))
    return re.sub(r'( id="| href="#|url\(#)', rf"\g<1>{name}-", svg)
