"""Pictures of a plan. Needs matplotlib; draws without a display."""

from __future__ import annotations

import math

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from .plan import Plan, Tiers

GIB = 2**30
UNITS = ((1024, "TiB"), (1, "GiB"), (1 / 1024, "MiB"))
LRU, DEPOT, IDEAL = "tab:blue", "tab:orange", "0.35"


def draw_plan(plan: Plan, title: str, path: str) -> None:
    """Hits against capacity, and hits by tier, as one image; the ending of `path` is its type. Raises OSError."""
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(13, 5.2), width_ratios=(3, 2), layout="constrained"
    )
    figure.suptitle(title)
    _hits_by_capacity(left, plan)
    _hits_by_tier(right, plan)
    try:
        figure.savefig(path, dpi=130)
    finally:
        pyplot.close(figure)


def _capacity(gib: float) -> str:
    factor, unit = next(((f, u) for f, u in UNITS if gib >= f), UNITS[-1])
    return f"{gib / factor:.3g} {unit}"


def _hits_by_capacity(axes: Axes, plan: Plan) -> None:
    axes.axhline(plan.ideal_tokens, color=IDEAL, linestyle="--", label="ideal: a cache without a bound")
    axes.plot([p.capacity_bytes / GIB for p in plan.curve], [p.lru for p in plan.curve], color=LRU, label="LRU by block")
    played = [p for p in plan.curve if p.depot is not None]
    if played:
        axes.plot(
            [p.capacity_bytes / GIB for p in played], [p.depot for p in played], "o-", color=DEPOT, label="depot (segments)"
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda gib, _: _capacity(gib)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0, plan.ideal_tokens * 1.25 or 1)
    _name_targets(axes, plan)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("capacity")
    axes.set_ylabel("prompt tokens found, share of all")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", fontsize=9)


def _name_targets(axes: Axes, plan: Plan) -> None:
    """Each in a row of its own above all curves: however close two capacities are, both can be read."""
    found = [(t.depot_bytes / GIB, t.share) for t in plan.targets if t.share < 1.0 and t.depot_bytes is not None]
    for row, (gib, share) in enumerate(sorted(found)):
        height = plan.ideal_tokens * (1.05 + 0.06 * row)
        axes.plot([gib, gib], [0, height], color=DEPOT, linestyle=":", linewidth=1.2)
        least, most = axes.get_xlim()
        from_left = math.log(gib / least) / math.log(most / least)
        axes.annotate(
            f"{share:.0%} of ideal: {_capacity(gib)}",
            (gib, height),
            xytext=(-3 if from_left > 0.4 else 3, 0),
            textcoords="offset points",
            ha="right" if from_left > 0.4 else "left",
            va="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )


def _name(tiers: Tiers) -> str:
    memory, nvme = (_capacity(size / GIB) if size else "none" for size in (tiers.memory_bytes, tiers.nvme_bytes))
    return f"{memory} + {nvme}"


def _hits_by_tier(axes: Axes, plan: Plan) -> None:
    shown = [tiers for tiers in plan.tiers if tiers.depot is not None]
    if not shown:
        axes.set_axis_off()
        return
    rows = range(len(shown))
    memory, nvme = [t.depot[0] for t in shown], [t.depot[1] for t in shown]
    axes.barh(rows, memory, color="tab:green", label="from memory")
    axes.barh(rows, nvme, left=memory, color="tab:purple", label="from NVMe")
    axes.axvline(plan.ideal_blocks, color=IDEAL, linestyle="--", label="ideal")
    axes.set_yticks(rows, [_name(tiers) for tiers in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, plan.ideal_blocks * 1.12)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("blocks found, share of all (depot)")
    axes.set_ylabel("memory + NVMe")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.1), ncols=3, fontsize=8)
