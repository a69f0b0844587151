"""Throughput and tail latency against extent size and against extents in flight, with the limit as a line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from .plan import size_text

Result = dict[str, Any]
Value = Callable[[Result], float]


def draw(path: str, results: list[Result]) -> None:
    """A row for each root, device and operation; against extent size, and against extents in flight if there are several.

    The file's ending says which format.
    """
    rows: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        rows.setdefault((result["root"], result["device"], result["operation"]), []).append(result)
    views = [(_size, _series_of_size, "extent size")]
    if len({_flight(result) for result in results}) > 1:
        views.append((_flight, _series_of_flight, "extents in flight"))
    figure, axes = pyplot.subplots(len(rows), 2 * len(views), figsize=(10 * len(views), 3.6 * len(rows)), squeeze=False)
    for row, ((root, device, operation), of_row) in zip(axes, rows.items(), strict=True):
        ways, sources = ("/".join(dict.fromkeys(r[what] for r in of_row)) for what in ("transport", "source"))
        title = f"{operation}: {root} ({of_row[0]['file_system']}, {ways}), device {device}; {sources}"
        row[0].set_title(title, loc="left", fontsize=10)
        for i, (x, series, label) in enumerate(views):
            throughput, latency = row[2 * i : 2 * i + 2]
            for axis in (throughput, latency):
                axis.set_xlabel(label if operation != "burst" or x is _size else "requests at once")
            _draw_throughput(throughput, of_row, x, series)
            _draw_latency(latency, of_row, x, series)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _size(result: Result) -> float:
    return float(max(result["extent_bytes"]))


def _flight(result: Result) -> float:
    return float(result["in_flight"])


def _series_of_size(result: Result) -> str:
    what = "requests" if result["operation"] == "burst" else "in flight"
    return f"{result['in_flight']} {what}{_processes(result)}"


def _series_of_flight(result: Result) -> str:
    return f"{'+'.join(map(size_text, result['extent_bytes']))}{_processes(result)}"


def _processes(result: Result) -> str:
    return f" x {result['processes']} processes" if result["processes"] > 1 else ""


def _lines(results: list[Result], x: Value, series: Callable[[Result], str]) -> Iterator[tuple[str, str, list[Result]]]:
    """(name, colour, points in order) of each line."""
    of_series: dict[str, list[Result]] = {}
    for result in results:
        if result["latency"]:
            of_series.setdefault(series(result), []).append(result)
    for i, (name, points) in enumerate(of_series.items()):
        yield name, f"C{i % 10}", sorted(points, key=x)


def _draw_throughput(axis: Axes, results: list[Result], x: Value, series: Callable[[Result], str]) -> None:
    for name, color, points in _lines(results, x, series):
        at = [x(p) for p in points]
        axis.plot(at, [p["gb_per_s"] for p in points], "o-", color=color, label=name, markersize=4)
        axis.plot(at, [p["limit_gb_per_s"] for p in points], "_--", color=color, linewidth=1)
    axis.plot([], [], "_--", color="gray", linewidth=1, label="limit, same colour")
    axis.set_ylabel("throughput, GB/s")
    axis.set_ylim(bottom=0)
    _finish(axis, results, x)


def _draw_latency(axis: Axes, results: list[Result], x: Value, series: Callable[[Result], str]) -> None:
    for name, color, points in _lines(results, x, series):
        at = [x(p) for p in points]
        axis.plot(at, [_worst(p, "p99_ms") for p in points], "o-", color=color, label=name, markersize=4)
        axis.plot(at, [_worst(p, "p50_ms") for p in points], ".:", color=color, linewidth=1, markersize=3)
    axis.plot([], [], ".:", color="gray", linewidth=1, label="p50, same colour")
    axis.set_ylabel("latency p99, ms")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    _finish(axis, results, x)


def _worst(result: Result, percentile: str) -> float:
    """Of the size classes."""
    return max(counted[percentile] for counted in result["latency"])


def _finish(axis: Axes, results: list[Result], x: Value) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted({x(result) for result in results}))
    axis.minorticks_off()
    named = (lambda value, _: size_text(int(value))) if x is _size else (lambda value, _: f"{value:g}")
    axis.xaxis.set_major_formatter(FuncFormatter(named))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
