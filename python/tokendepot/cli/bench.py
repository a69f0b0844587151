"""`tokendepot bench ...`: measures storage and servers."""

from __future__ import annotations

import typer

from . import bench_io, bench_ttft

app = typer.Typer(help="Measure storage and servers.", no_args_is_help=True)
app.command(epilog=bench_io.EXIT_CODES)(bench_io.io)
app.command()(bench_ttft.ttft)
