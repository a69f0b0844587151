"""`tokendepot top`: imports what it runs when it is called."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import _core
from . import show
from .arguments import Json, print_json
from .metrics import root_and_capacity

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..live import Now, Reading

EXTRA = "tokendepot top needs the package {}: pip install 'tokendepot[metrics]'"
NOT_DONE = 3
UNKNOWN = "-"


def top(
    roots: Annotated[
        list[str] | None, typer.Argument(metavar="ROOT", help="Directories of roots, each with ?capacity=SIZE if known.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="Metrics of an engine or of LMCache's server: http://127.0.0.1:8000/metrics.")
    ] = None,
    every: Annotated[float, typer.Option(min=0.2, max=3600, help="Seconds between two readings.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Show one interval and end.")] = False,
    as_json: Json = False,
) -> None:
    """What a depot does now: rates, queues, hit ratio and what its roots hold, until interrupted."""
    try:
        from .. import live
    except ModuleNotFoundError as error:
        raise typer.BadParameter(EXTRA.format(error.name)) from None
    if not roots and url is None:
        raise typer.BadParameter("neither ROOT nor --url is given, expected at least one")
    if url is not None and not url.startswith(("http://", "https://")):
        raise typer.BadParameter(f"--url is {url!r}, expected http://HOST:PORT/metrics")
    watched = [root_and_capacity(text) for text in roots or []]
    for path, _ in watched:
        _core.inspect_root(path)  # what is no root is wrong usage; one that goes later is trouble
    screen = Screen(live, watched, url)
    try:
        screen.look(first=True)
    except live.Unreadable as error:
        show.complain(str(error))
        raise typer.Exit(NOT_DONE) from None
    if once or as_json or not show.out.is_terminal:
        while True:
            if url is not None or not once:
                time.sleep(every)
            now = screen.look()
            print_json(asdict(now)) if as_json else show.out.print(_drawn(now, url))
            if once:
                return
    from rich.live import Live

    with Live(console=show.out, screen=True, auto_refresh=False) as view:
        while True:
            view.update(_drawn(screen.look(), url), refresh=True)
            time.sleep(every)


class Screen:
    """Remembers the reading before. An engine that does not answer is trouble that passes."""

    def __init__(self, live: Any, roots: list[tuple[str, int | None]], url: str | None) -> None:
        self._live, self._roots, self._url = live, roots, url
        self._before: Reading | None = None

    def look(self, first: bool = False) -> Now:
        """Raises Unreadable for the first reading only."""
        trouble, after = [], None
        if self._url is not None:
            try:
                after = self._live.read(self._url)
            except self._live.Unreadable as error:
                if first:
                    raise
                trouble.append(str(error))
        before, self._before = self._before, after
        now: Now = self._live.compare(before, after)
        now.trouble = trouble
        for path, capacity in self._roots:
            try:
                now.roots.append(self._live.inspect(path, capacity, before, after))
            except _core.DepotError as error:
                now.trouble.append(str(error))
        return now


def _drawn(now: Now, url: str | None) -> RenderableType:
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def table(*columns: str) -> Table:
        view = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
        for number, column in enumerate(columns):
            view.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
        return view

    parts: list[RenderableType] = [Text(f"tokendepot top  {time.strftime('%H:%M:%S')}", style="bold")]
    if url is not None:
        flow = table(show.clean(url), "bytes/s", "extents/s", "mean s", "of them queued s")
        for way in ("load", "store"):
            flow.add_row(
                way,
                _bytes(now.rates[f"{way}_bytes"]),
                _number(now.rates[f"{way}_extents"]),
                _number(now.seconds[f"{way}_latency"], 4),
                _number(now.seconds[f"{way}_queue"], 4),
            )
        tokens = table("tokens/s asked", "hit", "ratio", "ever", "saved s/s", "failed loads/s", "dropped stores/s")
        tokens.add_row(
            _number(now.rates["queried_tokens"]),
            _number(now.rates["hit_tokens"]),
            _share(now.hit_ratio),
            _share(now.hit_ratio_ever),
            _number(now.rates["saved_seconds"], 2),
            _number(now.rates["failed_loads"]),
            _number(now.rates["dropped_stores"]),
        )
        parts += [flow, tokens]
        causes = {cause: rate for cause, rate in now.misses.items() if rate > 0}
        if causes:
            said = ", ".join(f"{cause} {rate:,.0f}" for cause, rate in sorted(causes.items(), key=lambda c: -c[1]))
            parts.append(Text(f"missed tokens/s: {said}"))
    if now.roots:
        view = table("root", "used", "of", "extents", "writers", "loaded/s", "stored/s", "evicted/s")
        for root in now.roots:
            view.add_row(
                root["root"],
                show.size(root["used_bytes"]),
                show.size(root["capacity_bytes"]) if root["capacity_bytes"] is not None else UNKNOWN,
                f"{root['extents']:,}",
                str(root["writers"]),
                *(_bytes(root[f"{what}_per_second"]) for what in ("load_bytes", "store_bytes", "evicted_bytes")),
            )
        if url is None:
            parts.append(Text("rates need --url, the metrics of an engine"))
        parts += [view, *(Text(show.clean(f"{root['root']} is {root['path']}")) for root in now.roots)]
    parts += [Text(show.clean(text), style="red") for text in now.trouble]
    return Group(*parts)


def _bytes(count: float | None) -> str:
    return UNKNOWN if count is None else show.size(int(count))


def _number(value: float | None, digits: int = 0) -> str:
    return UNKNOWN if value is None else f"{value:,.{digits}f}"


def _share(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.0%}"
