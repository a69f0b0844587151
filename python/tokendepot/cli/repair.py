"""`tokendepot repair`: what a root has lost of its own account of itself, found again on the medium."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .. import _core
from . import show
from .arguments import Json, Root, absolute, once_each, print_json

EXIT_CODES = (
    "Exit codes: 0 nothing to do, or all of it done; 1 something is to be done (without --apply), or cannot be restored; "
    "2 wrong usage, no permission, another format version, or nothing of a depot there; 3 it could not be done."
)
DAMAGED = 1


def repair(
    root: Root,
    apply: Annotated[bool, typer.Option("--apply/--dry-run", help="Do it; without, only say what would be done.")] = False,
    sources: Annotated[
        list[str] | None,
        typer.Option("--from", metavar="ROOT", parser=absolute, help="Other roots that may have lost manifests."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Writes lost journals anew from segments; restores a lost marker and, where their text is found, manifests."""
    done = 0
    with show.progress_of_bytes("looking through segments", _segment_bytes(root)) as advance:

        def told(now: int, _: int) -> None:
            nonlocal done
            advance(now - done)
            done = now

        report = _core.repair_root(root, once_each(sources or []), apply, told)
    if as_json:
        print_json({"root": root, "applied": apply, **report})
    else:
        _say(report, apply)
    if report["lost_manifests"] or not (apply or report["nothing_to_do"]):
        raise typer.Exit(DAMAGED)


def _segment_bytes(root: str) -> int:
    """For the bar; a root without a marker is not refused here."""
    try:
        return int(_core.inspect_root(root)["file_bytes"])
    except _core.DepotError:
        return 0


def _say(report: dict[str, Any], applied: bool) -> None:
    rows = []
    if report["marker"] != "sound":
        rows.append(("DEPOT", report["marker"], "written anew, with a new id"))
    for digest in report["manifests"]:
        rows.append((f"manifests/{digest}.json", "missing or damaged", "written anew"))
    for j in report["journals"]:
        what = f"{show.number(j['bad_records'], 'record')} cannot be read"
        rows.append((f"journals/{j['file']}", what, f"written anew with the other {j['good_records']:,}"))
    for s in report["segments"]:
        what = f"{show.number(s['extents'], 'extent')} ({show.size(s['bytes'])}) in no journal"
        rows.append((f"segments/{s['file']}", what, "journaled"))
    if rows:
        show.table("Done" if applied else "Would be done with --apply", ("file", "what", "then"), rows, wide=0)
    for digest in report["lost_manifests"]:
        show.say(f"manifest {digest[: show.SHORT_DIGEST]} is lost: name a root that has it with --from; extents are served without it")
    if report["damaged_extents"]:
        show.say(f"{show.number(report['damaged_extents'], 'extent')} in no journal have wrong digests and stay out")
    if report["left"]:
        show.table("Left alone", ("file", "why"), [(item["file"], item["why"]) for item in report["left"]], wide=(0, 1))
    if not rows:
        show.say("nothing to do")
