"""`tokendepot bench io`: imports what it runs when it is called."""

from __future__ import annotations

from typing import Annotated

import typer

EXIT_CODES = (
    "Exit codes: 0 measured; 1 bytes were wrong or could not be loaded; 2 wrong usage, or too little room; 3 it could "
    "not be done; 130 interrupted, with what was measured so far. docs/bench.md explains the figures."
)


def io(
    roots: Annotated[
        list[str],
        typer.Argument(metavar="ROOT", help="Directories, with keys of a root if wanted: /srv/nvme?transport=direct"),
    ],
    device: Annotated[str, typer.Option(metavar="LIST", help="host, cuda:0, ...; A+B deals processes to both.")] = "host",
    operation: Annotated[str, typer.Option("--op", metavar="LIST", help="read, write, mixed, burst.")] = "read,write",
    size: Annotated[
        str, typer.Option(metavar="LIST", help="Sizes of an extent's payload; A+B mixes sizes in one cell.")
    ] = "64KiB,1MiB,10MiB",
    model: Annotated[str, typer.Option(metavar="NAME", help="The size of this model's extents instead.")] = "",
    tp: Annotated[str, typer.Option(metavar="LIST", help="With --model: tensor-parallel sizes.")] = "1",
    chunk_tokens: Annotated[int, typer.Option(min=1, help="With --model: tokens of a chunk.")] = 256,
    kv_dtype: Annotated[str, typer.Option(help="With --model: type of a KV element.")] = "bf16",
    in_flight: Annotated[
        str, typer.Option(metavar="LIST", help="Extents in flight in each process; with burst, requests.")
    ] = "8,32",
    processes: Annotated[str, typer.Option(metavar="LIST", help="Client processes, each with a depot of its own.")] = "1",
    request_extents: Annotated[int, typer.Option(min=1, max=1024, help="With burst: extents of a request.")] = 8,
    volume: Annotated[
        str, typer.Option(metavar="SIZE", help="Payload on the medium, of each process.", show_default="512MiB")
    ] = "",
    seconds: Annotated[float, typer.Option(min=0.01, max=3600, help="Of each cell; its limit takes as long.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Turns of ours and the limit in a cell.")] = 6,
    verify: Annotated[str, typer.Option(help="all, sample or off: extents compared byte by byte.")] = "all",
    keep_cache: Annotated[
        bool, typer.Option("--keep-cache", help="Leave the page cache between store and load as it is.")
    ] = False,
    engine: Annotated[str, typer.Option(metavar="JSON", help="More keys of the depot's configuration.")] = "{}",
    csv: Annotated[str, typer.Option(metavar="FILE", help="Write a table for other programs.")] = "",
    plot: Annotated[str, typer.Option(metavar="FILE", help="Draw throughput and tail latency, e.g. out.png.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Storage to paged cache: a depot's loads and stores next to what the medium and the link give without it."""
    from ..bench.io import plan, run

    planned = plan.plan_of(
        roots,
        device=device,
        operation=operation,
        sizes=plan.sizes_of(size, model, tp, chunk_tokens, kv_dtype),
        in_flight=in_flight,
        processes=processes,
        request_extents=request_extents,
        volume=volume,
        seconds=seconds,
        rounds=rounds,
        verify=verify,
        keep_cache=keep_cache,
        engine=engine,
    )
    raise typer.Exit(run.run(planned, as_json, csv, plot))
