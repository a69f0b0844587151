"""The page: numbers as text, and the template that they go into."""

from __future__ import annotations

import pathlib
from dataclasses import asdict
from typing import Any

import jinja2
from markupsafe import Markup

from ...cli import show
from ..ttft import compare
from . import figures, plots

NOT_REPORTED = "not reported"
_TEMPLATE = pathlib.Path(__file__).with_name("page.html")


def document(
    before: dict[str, Any],
    after: dict[str, Any],
    later: list[dict[str, Any]],
    prices: figures.Prices,
    metrics: dict[str, Any] | None,
) -> dict[str, Any]:
    """All numbers of the report as plain values; `--json` prints them. `later` are runs like `after`, in their order."""
    runs = [figures.stability(f"after {n}" if later else "after", run) for n, run in enumerate([after, *later], 1)]
    return {
        "refused": [reason for run in [after, *later] for reason in compare.refusals(run, before)],
        "cells": [asdict(cell) for cell in figures.cells(before, after)],
        "usage": [asdict(usage) for usage in figures.usages(before, after, prices)],
        "stability": [asdict(figures.stability("before", before)), *(asdict(run) for run in runs)],
        "spread": figures.spread_of_runs(runs),
        "prices": asdict(prices),
        "metrics": metrics,
    }


def render(content: dict[str, Any], before: dict[str, Any], after: dict[str, Any], later: list[dict[str, Any]]) -> str:
    """One HTML page that refers to nothing outside itself. Everything from the results is escaped."""
    runs = [figures.stability(f"after {n}", run) for n, run in enumerate([after, *later], 1)]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "ms": milliseconds, "times": times, "share": share, "signed": signed, "count": count, "dollars": dollars,
        "seconds": seconds, "gigabytes": gigabytes,
    }  # fmt: skip
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        **content,
        gpus=show.number(content["prices"]["gpus"], "GPU"),
        before=before,
        after=after,
        runs=[("before", before), ("after" if not later else "after 1", after)]
        + [(f"after {n}", run) for n, run in enumerate(later, 2)],
        plot_ttft=Markup(plots.ttft(before, after)),
        plot_steadiness=Markup(plots.steadiness(before, after)),
        plot_window=Markup(plots.window(runs)) if later else None,
        not_reported=NOT_REPORTED,
    )


# --- numbers as text --------------------------------------------------------------------------------------------------


def milliseconds(value: float | None) -> str:
    if value is None:
        return NOT_REPORTED
    return f"{value * 1e3:,.0f}" if value >= 0.1 else f"{value * 1e3:.1f}"


def times(value: float | None) -> str:
    return NOT_REPORTED if value is None else f"{value:.3g}x" if value < 100 else f"{value:,.0f}x"


def share(value: float | None) -> str:
    return NOT_REPORTED if value is None else f"{value:.1%}"


def signed(value: float | None) -> str:
    return NOT_REPORTED if value is None else f"{value:+.1%}"


def count(value: float | None) -> str:
    return NOT_REPORTED if value is None else f"{value:,.0f}"


def seconds(value: float | None) -> str:
    return NOT_REPORTED if value is None else f"{value:,.1f}"


def dollars(value: float | None) -> str:
    return NOT_REPORTED if value is None else f"${value:,.2f}" if value >= 0.1 else f"${value:.4f}"


def gigabytes(value: float | None) -> str:
    return NOT_REPORTED if value is None else f"{value / 1e9:,.2f} GB"
