"""A bar with the time left on a terminal; elsewhere a line a cell. On stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from ...cli import show


class Steps:
    """Told which cell begins and how much of the whole is done."""

    def __init__(self, bar: Progress, total: float, cells: int) -> None:
        self._bar = bar
        self._cells = cells
        self._task = bar.add_task("", total=total)

    def begin(self, number: int, what: str) -> None:
        text = f"{number} of {self._cells}: {show.clean(what)}"
        self._bar.update(self._task, description=text)
        if not show.err.is_terminal:
            show.err.print(Text(text), soft_wrap=True)

    @property
    def advance(self) -> Callable[[float], None]:
        return lambda done: self._bar.advance(self._task, done)


@contextmanager
def steps(total: float, cells: int) -> Iterator[Steps]:
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=show.err,
        transient=True,
        disable=not show.err.is_terminal,
    )
    with bar:
        yield Steps(bar, total, cells)
