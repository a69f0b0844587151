"""Throughput and tail latency against extent size and against extents in flight, with the limit as a line."""

from __future__ import annotations

from collections.abc import Callable
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
    """One row of four panels for each root and device. The file's ending says which format."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result["root"], result["device"]), []).append(result)
    figure, axes = pyplot.subplots(len(groups), 4, figsize=(19, 4.6 * len(groups)), squeeze=False)
    for row, ((root, device), of_group) in zip(axes, groups.items(), strict=True):
        first = of_group[0]
        sources = "/".join(dict.fromkeys(r["source"] for r in of_group))
        row[0].set_title(f"{root} ({first['file_system']}, {first['transport']}), device {device}: {sources}", loc="left", fontsize=10)
        _panel(row[0], of_group, _size, _series_of_size, _throughput, limit=True)
        _panel(row[1], of_group, _size, _series_of_size, _tail)
        _panel(row[2], of_group, _flight, _series_of_flight, _throughput, limit=True)
        _panel(row[3], of_group, _flight, _series_of_flight, _tail)
        for axis in row[:2]:
            axis.set_xlabel("extent size")
        for axis in row[2:]:
            axis.set_xlabel("extents in flight (burst: requests)")
        for axis in (row[0], row[2]):
            axis.set_ylabel("throughput, GB/s")
            axis.set_ylim(bottom=0)
        for axis in (row[1], row[3]):
            axis.set_ylabel("latency, ms: p50 dotted, p99 solid")
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _size(result: Result) -> float:
    return float(max(result["extent_bytes"]))


def _flight(result: Result) -> float:
    return float(result["in_flight"])


def _throughput(result: Result) -> float:
    return result["gb_per_s"]


def _tail(result: Result) -> float:
    return max(counted["p99_ms"] for counted in result["latency"])


def _series_of_size(result: Result) -> str:
    return f"{result['operation']}, {result['in_flight']} in flight{_processes(result)}"


def _series_of_flight(result: Result) -> str:
    return f"{result['operation']}, {'+'.join(map(size_text, result['extent_bytes']))}{_processes(result)}"


def _processes(result: Result) -> str:
    return f" x {result['processes']} processes" if result["processes"] > 1 else ""


def _panel(
    axis: Axes, results: list[Result], x: Value, series: Callable[[Result], str], y: Value, limit: bool = False
) -> None:
    of_series: dict[str, list[Result]] = {}
    for result in results:
        if result["latency"]:
            of_series.setdefault(series(result), []).append(result)
    for i, (name, points) in enumerate(of_series.items()):
        points.sort(key=x)
        color = f"C{i % 10}"
        axis.plot([x(p) for p in points], [y(p) for p in points], "o-", color=color, label=name, markersize=4)
        if limit:
            at = [x(p) for p in points]
            lines = [p["limit_gb_per_s"] for p in points]
            axis.plot(at, lines, "--", color=color, linewidth=1, marker="_", label="its limit" if i == 0 else None)
        else:
            middle = [max(counted["p50_ms"] for counted in p["latency"]) for p in points]
            axis.plot([x(p) for p in points], middle, ":", color=color, linewidth=1, marker=".", markersize=3)
    places = sorted({x(result) for result in results})
    axis.set_xscale("log", base=2)
    axis.set_xticks(places)
    named = (lambda value, _: size_text(int(value))) if x is _size else (lambda value, _: f"{value:g}")
    axis.xaxis.set_major_formatter(FuncFormatter(named))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
