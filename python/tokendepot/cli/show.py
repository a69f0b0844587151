"""How things look in a terminal: sizes, ages, tables that fit 80 columns, a progress bar for what takes long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

SHORT_DIGEST = 12
PATIENCE_S = 1.0  # what ends sooner needs no progress shown
LINE_EVERY_S = 10.0

out = Console(highlight=False, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, markup=False, emoji=False)


def clean(text: str) -> str:
    """Text of others on one line: control characters cannot steer the terminal."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def size(count: int) -> str:
    if count < 1024:
        return f"{count} B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        value /= 1024
        if value < 999.95:
            break
    return f"{value:.1f} {unit}"


def number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def age(seconds_since_1970: float) -> str:
    if seconds_since_1970 <= 0:
        return "never"
    passed = max(0.0, time.time() - seconds_since_1970)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if passed >= length:
            return f"{int(passed / length)} {unit} ago"
    return f"{int(passed)} s ago"


def say(*parts: str) -> None:
    out.print(Text(" ".join(parts)), soft_wrap=True)


def complain(text: str) -> None:
    """One line on stderr."""
    err.print(Text(f"tokendepot: {clean(text)}"), soft_wrap=True)


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]], wide: int | tuple[int, ...] = ()) -> None:
    """Columns whose name starts with ">" are right-aligned. Only `wide` ones give way to the width."""
    flexible = (wide,) if isinstance(wide, int) else wide
    out.print(Text(title, style="bold"))
    view = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for i, column in enumerate(columns):
        right = column.startswith(">")
        view.add_column(
            Text(column.removeprefix(">")), justify="right" if right else "left", no_wrap=i not in flexible, overflow="fold"
        )
    for row in rows:
        view.add_row(*(Text(clean(cell)) for cell in row))
    out.print(view)


def progress_of_bytes(what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Yields a function that is told how many more bytes are done. Shows a bar on a terminal, else a line now and then."""
    columns = (DownloadColumn(binary_units=True), TransferSpeedColumn())
    return _progress(what, total, columns, lambda done: f"{size(done)} of {size(total)}", True)


def progress_of_count(what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """The same for a number of things."""
    return _progress(what, total, (MofNCompleteColumn(),), lambda done: f"{done:,} of {total:,}", True)


def progress_of_tokens(what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """The same for tokens; drawn only when that function is called, so that nothing is disturbed in between."""
    columns = (TaskProgressColumn(),)
    return _progress(what, total, columns, lambda done: f"{done:,} of {total:,} tokens", False)


@contextmanager
def _progress(
    what: str, total: int, columns: Iterable[ProgressColumn], line: Callable[[int], str], auto_refresh: bool
) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn())
    bar = Progress(*columns, console=err, transient=True, auto_refresh=auto_refresh)
    task = bar.add_task(what, total=total)
    began = last_line = time.monotonic()
    done = 0
    shown = False

    def advance(count: int) -> None:
        nonlocal done, last_line, shown
        done += count
        bar.advance(task, count)
        now = time.monotonic()
        if now - began < PATIENCE_S:
            return
        if err.is_terminal:
            if not shown:
                bar.start()
                shown = True
            if not auto_refresh:
                bar.refresh()
        elif now - last_line >= LINE_EVERY_S or not shown:
            err.print(Text(f"{what}: {line(done)}"))
            last_line, shown = now, True

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()
