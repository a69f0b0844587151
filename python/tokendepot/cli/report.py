"""`tokendepot report`: imports what it runs when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import show
from .arguments import print_json

EXIT_CODES = (
    "Exit codes: 0 all well; 1 the page is written, but the comparison is not valid, and the page says why; 2 wrong usage, or runs "
    "that did not measure the same thing; 3 it could not be written."
)
EXTRA = "tokendepot report needs the package {}: pip install 'tokendepot[bench]'"
INVALID, NOT_WRITTEN = 1, 3


def report(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="Result of bench ttft without the depot.")],
    after: Annotated[
        list[Path], typer.Argument(metavar="AFTER", help="Result with it; more of them, in their order, show a window of time.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Page to write; never written over.")] = Path("report.html"),
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the server.")] = 1,
    gpu_hour: Annotated[float | None, typer.Option(help="Dollars of one GPU for an hour.", show_default="no costs")] = None,
    metrics: Annotated[Path | None, typer.Option(help="Text of the engine's /metrics after AFTER.", show_default="none")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as one JSON document, too.")] = False,
) -> None:
    """What the depot changed, as one HTML page: time to first token, hits, GPU time, cost, stability, assumptions."""
    try:
        from ..bench.report import figures, inputs, page
        from ..bench.ttft.settings import BadSetting
    except ModuleNotFoundError as error:
        raise typer.BadParameter(EXTRA.format(error.name)) from None
    try:
        if gpu_hour is not None and not 0 < gpu_hour < float("inf"):
            raise BadSetting(f"--gpu-hour is {gpu_hour}, expected dollars above 0")
        if out.exists():
            raise BadSetting(f"--out is {str(out)!r}, which exists; name another file or remove it")
        base = inputs.load(before, "BEFORE")
        runs = [inputs.load(file, "AFTER") for file in after]
        for file, run in zip(after, runs, strict=True):
            inputs.check_same(base, run, f"AFTER {str(file)!r}")
        counters = inputs.engine_metrics(metrics) if metrics else None
    except BadSetting as error:
        raise typer.BadParameter(str(error)) from None
    content = page.document(base, runs[0], runs[1:], figures.Prices(gpus, gpu_hour), counters)
    html = page.render(content, base, runs[0], runs[1:])
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(html)
    except OSError as error:
        show.complain(f"--out is {str(out)!r}, which cannot be written ({error.strerror})")
        raise typer.Exit(NOT_WRITTEN) from None
    if as_json:
        print_json(content)
    else:
        for reason in content["refused"]:
            show.say(f"NOT A VALID COMPARISON: {show.clean(reason)}")
        show.say(f"Wrote {show.clean(str(out))}")
    if content["refused"]:
        raise typer.Exit(INVALID)
