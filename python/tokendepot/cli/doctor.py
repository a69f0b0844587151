"""`tokendepot doctor`: imports what it runs when it is called."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from . import show
from .arguments import Json, once_each, print_json, root_and_options

if TYPE_CHECKING:
    from ..doctor.findings import Finding

EXIT_CODES = "Exit codes: 0 no problem; 1 at least one problem; 2 wrong usage."
PROBLEMS_FOUND = 1


def doctor(
    roots: Annotated[
        list[str] | None,
        typer.Argument(metavar="ROOT", help="Directories that are roots, or are to be, each with ?capacity=SIZE if known."),
    ] = None,
    as_json: Json = False,
) -> None:
    """What this host can do and what a depot would use, with the fix where it could be more. Changes nothing."""
    from ..doctor import machine
    from ..doctor import roots as directories
    from ..doctor.findings import FALLBACK, PROBLEM
    from ..doctor.host import Host

    host = Host()
    on_host = machine.examine(host)
    options = {path: keys for path, keys in map(root_and_options, roots or [])}
    on_roots = {path: directories.examine(host, path, options[path]) for path in once_each([*options])}
    everything = [*on_host, *(finding for found in on_roots.values() for finding in found)]
    problems = sum(finding.state == PROBLEM for finding in everything)
    fallbacks = sum(finding.state == FALLBACK for finding in everything)
    if as_json:
        print_json(
            {
                "host": [asdict(finding) for finding in on_host],
                "roots": [{"path": path, "findings": [asdict(f) for f in found]} for path, found in on_roots.items()],
                "problems": problems,
                "fallbacks": fallbacks,
            }
        )
    else:
        _table("Host", on_host)
        for path, found in on_roots.items():
            _table(f"Root {show.clean(path)}", found)
        show.say(f"{show.number(problems, 'problem')}, {show.number(fallbacks, 'fallback')}")
    if problems:
        raise typer.Exit(PROBLEMS_FOUND)


def _table(title: str, findings: list[Finding]) -> None:
    rows = []
    for finding in findings:
        rows.append((finding.name, finding.state, finding.value))
        if finding.fix:
            rows.append(("", "", f"-> {finding.fix}"))
    show.table(title, ("what", "state", "found"), rows, wide=2)
