"""`tokendepot bench ...`: measures storage and servers."""

from __future__ import annotations

import typer

from . import bench_io, bench_ttft
from .arguments import help_of

app = typer.Typer(help="Measure storage and servers.", invoke_without_command=True)


@app.callback()
def bench(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        help_of(context)


app.command(epilog=bench_io.EXIT_CODES)(bench_io.io)
app.command()(bench_ttft.ttft)
