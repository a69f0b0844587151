"""`tokendepot bench ttft`: imports what it runs when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

CONTEXTS = "50,1000,2000,8000,16000,24000,32000,64000,96000,128000"
EXTRA = "tokendepot bench needs the package {}: pip install 'tokendepot[bench]'"

def ttft(
    context: typer.Context,
    url: Annotated[str, typer.Option(help="The server, without /v1/...", show_default=False)] = "",
    model: Annotated[str | None, typer.Option(help="Its name on the server.", show_default="the only one")] = None,
    endpoint: Annotated[str, typer.Option(help="completions or chat.")] = "completions",
    contexts: Annotated[str, typer.Option(help="Tokens of the first turns.")] = CONTEXTS,
    turns: Annotated[int, typer.Option(help="Turns of each conversation; the first is cold.")] = 2,
    repeats: Annotated[int, typer.Option(help="Conversations of each context.")] = 3,
    concurrency: Annotated[int, typer.Option(help="Requests in flight at most.")] = 1,
    rate: Annotated[float | None, typer.Option(help="Requests started a second.", show_default="as they end")] = None,
    answer_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the contexts' words.")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds for one answer.")] = 600.0,
    max_error_rate: Annotated[float, typer.Option(help="Share of failed requests above which the exit code is 1.")] = 0.0,
    cold_gpu: Annotated[bool, typer.Option("--cold-gpu", help="Later turns must not hit the server's own prefix cache.")] = False,
    between: Annotated[str | None, typer.Option(help="Shell command before each later turn, e.g. a restart.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer.json, for a server that does not count.")] = None,
    out: Annotated[Path | None, typer.Option(help="Result file.", show_default="ttft-RUN.json")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with this result file.")] = None,
    compare: Annotated[Path | None, typer.Option(help="Result file of the run without the depot.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG to draw.")] = None,
    cacert: Annotated[Path | None, typer.Option(help="PEM file of the authorities to trust.", show_default="the system's")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Time to first token of conversations: turn 1 cold, then the same context with new questions.

    Exit codes: 0 all well; 1 requests failed, or the run or the comparison is not valid; 2 wrong usage, or no such
    server or model; 3 the server went away, or a file could not be written any more; 130 interrupted.
    """
    try:
        from ..bench.ttft.command import ttft as run
        from ..bench.ttft.server import ServerFault
        from ..bench.ttft.settings import BadSetting, Settings, parse_contexts

        if plot:
            import matplotlib  # noqa: F401  before hours of measuring, not after
    except ModuleNotFoundError as error:
        raise typer.BadParameter(EXTRA.format(error.name)) from None

    fields = {"timeout": "timeout_s"}
    given = {fields.get(name, name) for name in context.params if _is_given(context, name)}
    given -= {"out", "resume", "compare", "plot", "cacert", "as_json"}
    try:
        if not url and resume is None:
            raise BadSetting("--url is missing, expected the server's http://HOST:PORT")
        asked = Settings(
            url, model, endpoint, parse_contexts(contexts), turns, repeats, concurrency, rate, answer_tokens, seed, timeout,
            max_error_rate, cold_gpu, between, tokenizer,
        )  # fmt: skip
        code = run(asked, given, out, resume, compare, plot, as_json, cacert)
    except (BadSetting, ServerFault) as error:
        raise typer.BadParameter(str(error)) from None
    raise typer.Exit(code)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
