"""The whole of `tokendepot bench io`: room, cells, results; tidy also when it is interrupted."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from typing import Any

from ... import _core
from ...cli import show
from ..image_types import IMAGE_TYPES
from ..interrupts import Interrupts
from . import measure, place, progress, report
from .plan import Plan, refuse

INTERRUPTED, WRONG = 130, 1


def _check_outputs(*paths: str) -> None:
    """An hour of measuring must not end in a file that cannot be written."""
    for path in filter(None, paths):
        directory = os.path.dirname(os.path.abspath(path))
        if not os.access(path if os.path.exists(path) else directory, os.W_OK) or os.path.isdir(path):
            refuse(f'"{path}" cannot be written; expected a file in a directory that can')


def run(plan: Plan, as_json: bool, csv: str, plot: str) -> int:
    """Measures, prints and writes. Returns the exit code: 0; 1 wrong bytes or failed loads; 130 interrupted, also
    when only the clean-up was left to do.

    Raises DepotError, of the cell that could not be measured, after those that could are printed and written.
    """
    _check_outputs(csv, plot)
    if plot:
        _check_plot(plot)
    place.check_room(plan.cells)
    results: list[dict[str, Any]] = []
    interrupted = False
    failure: _core.DepotError | None = None
    try:
        with Interrupts() as interrupts, ExitStack() as stack:
            try:
                _measure(plan, stack, results)
            finally:
                # What is left is to remove what was written: a second Ctrl-C must not leave it.
                interrupts.hold_off()
    except KeyboardInterrupt:
        interrupted = True
    except _core.DepotError as error:
        failure = error
    interrupted = interrupted or bool(results and results[-1]["interrupted"])
    _give(results, interrupted, as_json, csv, plot)
    if interrupted:
        done = f"{len(results)} of {len(plan.cells)} cells were measured"
        print(f"tokendepot: interrupted; {done}", file=sys.stderr)
        return INTERRUPTED
    if failure is not None:
        raise failure
    return WRONG if report.damaged(results) else 0


def _measure(plan: Plan, stack: ExitStack, results: list[dict[str, Any]]) -> None:
    """Up to the first cell that was interrupted; what `stack` holds is to be removed behind the last."""
    own = {
        root: stack.enter_context(place.own_directory(root))
        for root in dict.fromkeys(cell.root.path for cell in plan.cells)
    }
    total = sum(measure.weight_of(plan, cell) for cell in plan.cells)
    bar = stack.enter_context(progress.steps(total, len(plan.cells)))
    for number, cell in enumerate(plan.cells, 1):
        bar.begin(number, cell.describe())
        results.append(measure.measure(plan, cell, own[cell.root.path], bar.advance))
        if results[-1]["interrupted"]:
            return


def _give(results: list[dict[str, Any]], interrupted: bool, as_json: bool, csv: str, plot: str) -> None:
    if as_json:
        print(json.dumps(report.document(results, interrupted), indent=1))
    elif results:
        report.print_tables(results)
    for warning in report.warnings(results):
        show.err.print(f"warning: {warning}", soft_wrap=True)
    if csv:
        report.write_csv(csv, results)
    if plot and results:
        from .plot import draw

        draw(plot, results)


def _check_plot(path: str) -> None:
    if path.rpartition(".")[2].lower() not in IMAGE_TYPES:
        refuse(f'--plot "{path}": expected a name that ends in one of {", ".join(IMAGE_TYPES)}')
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        refuse("--plot needs matplotlib, which is not installed; expected `pip install tokendepot[bench]`")
