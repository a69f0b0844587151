"""The commands. Each takes the directories of roots, and with --json prints one JSON document instead of tables."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from .. import _core
from . import bench, damage, doctor, du, events, explain, export, metrics, namespaces, repair, replay, report, show, tending, top
from .arguments import EXIT_CODES, Json, Namespace, Root, Roots, help_of, print_json, size, size_or_zero

NOT_DONE = 3
ROWS_SHOWN = 50
BATCH_BYTES = 64 << 20  # of one verify call: short enough to show progress and to be interrupted

app = typer.Typer(
    help=f"Look into and tend the roots of a depot. Safe while engines run.\n\n{EXIT_CODES}",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# What a user wants to do -> panel of --help.
LOOK, TEND, MOVE, WATCH, MEASURE = "Look", "Tend", "Move between sites", "Watch", "Measure and plan"
app.add_typer(bench.app, name="bench", rich_help_panel=MEASURE)


@app.callback()
def tokendepot(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the versions of package and format, and end.")] = False,
) -> None:
    if show_version:
        version()
        raise typer.Exit
    if context.invoked_subcommand is None:
        help_of(context)


DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]


def _select(root: dict[str, Any], prefix: str) -> list[dict[str, Any]]:
    try:
        return namespaces.select(root, prefix)
    except namespaces.NoSuchNamespace as error:
        raise typer.BadParameter(str(error)) from None


def _extents(path: str, prefix: str) -> list[dict[str, Any]]:
    found = _core.list_extents(path)
    return namespaces.of_extents(found, _select(_core.inspect_root(path), prefix)) if prefix else found


# --- stat ---


@app.command(epilog=EXIT_CODES, rich_help_panel=LOOK)
def stat(roots: Roots, as_json: Json = False) -> None:
    """What is in roots: namespaces, segments, journals and their writers, and what is damaged."""
    inspected = [_core.inspect_root(path) for path in roots]
    for root in inspected:
        root["differences"] = namespaces.differences(root["namespaces"])
        root["damaged_files"] = damage.files(root)
        root["tending"] = _core.inspect_policies(root["path"])
        if root["tending"]["damage"]:
            root["damaged_files"].append({"file": "policies", "reason": root["tending"]["damage"]})
    if as_json:
        for root in inspected:
            for namespace in root["namespaces"]:
                namespace["manifest"] = namespaces.manifest_of(namespace)
            root["tending"]["rules"] = [tending.in_units(rule) for rule in root["tending"]["rules"]]
        print_json({"roots": inspected})
    else:
        for root in inspected:
            _show_root(root)
    if any(root["damaged_files"] for root in inspected):
        raise typer.Exit(1)


def _show_root(root: dict[str, Any]) -> None:
    created = time.strftime("%Y-%m-%d %H:%M", time.localtime(root["created"]))
    show.say(f"Root {show.clean(root['path'])}")
    show.say(f"  format {root['format_version']}, id {root['root_id']}, created {created}")
    show.say(f"  {root['transport'] or 'transport not known yet'} on {root['file_system']}, {show.size(root['available_bytes'])} free")
    show.say(
        f"  {show.size(root['live_bytes'])} in {show.number(root['extents'], 'extent')}; "
        f"{show.number(len(root['segments']), 'segment')} take {show.size(root['file_bytes'])}"
    )
    if root["segments"]:
        sealed = [s for s in root["segments"] if s["sealed"]]
        coldest = min((s["last_used"] for s in sealed), default=0.0)
        show.say(f"  {len(sealed)} sealed" + (f", the coldest used {show.age(coldest)}" if sealed else ""))
    tended = root["tending"]
    if tended["scrub_finished"]:
        found = show.number(tended["scrub_finished_bad"], "extent")
        show.say(f"  last scrubbed {show.age(tended['scrub_finished'])}: {found} condemned")
    show.say()
    if root["namespaces"]:
        rows = [
            (n["digest"][: show.SHORT_DIGEST], namespaces.model_of(n), f"{n['extents']:,}", show.size(n["bytes"]))
            for n in root["namespaces"]
        ]
        show.table("Namespaces", ("digest", "model", ">extents", ">bytes"), rows, wide=1)
    if tended["rules"]:
        show.table("Policies", tending.COLUMNS, tending.rows_of(tended["rules"]))
    if root["differences"]:
        rows = []
        for field, values in root["differences"].items():
            for i, (digest, value) in enumerate(values.items()):
                rows.append(("" if i else field, digest[: show.SHORT_DIGEST], "(absent)" if value is None else value))
        show.table("Manifest fields that differ", ("field", "namespace", "value"), rows, wide=2)
    if root["journals"]:
        rows = [(j["writer"], f"{j['records']:,}", damage.journal_state(j)) for j in root["journals"]]
        show.table("Journals", ("writer", ">records", "state"), rows)
    if root["damaged_files"]:
        show.table("Damaged", ("file", "what"), [(d["file"], d["reason"]) for d in root["damaged_files"]], wide=(0, 1))
    if root["foreign_files"]:
        show.table("Not the depot's, left alone", ("file",), [(name,) for name in root["foreign_files"]], wide=0)


# --- ls ---


@app.command("ls", epilog=EXIT_CODES, rich_help_panel=LOOK)
def list_command(
    root: Root,
    namespace: Namespace = "",
    limit: Annotated[
        int | None,
        typer.Option(min=0, show_default=f"{ROWS_SHOWN}, and all with --json", help="Extents to list; 0 = all."),
    ] = None,
    as_json: Json = False,
) -> None:
    """The extents of a root: one chunk of one writer each."""
    extents = _extents(root, namespace)
    if limit is None:
        limit = 0 if as_json else ROWS_SHOWN
    shown = extents[:limit] if limit else extents
    if as_json:
        print_json({"root": root, "total": len(extents), "extents": shown})
        return
    rows = []
    for e in shown:
        layer_begin, layer_end, head_begin, head_end = e["part"]
        rows.append(
            (
                e["key"].hex()[: show.SHORT_DIGEST],
                e["namespace"][: show.SHORT_DIGEST],
                str(e["group"]),
                f"{layer_begin}-{layer_end - 1}",
                f"{head_begin}-{head_end - 1}",
                str(e["tokens"]),
                show.size(e["bytes"]),
                show.age(e["stored_at"]),
            )
        )
    columns = ("key", "namespace", ">group", ">layers", ">heads", ">tokens", ">bytes", ">stored")
    show.table(f"{show.number(len(extents), 'extent')} in {show.clean(root)}", columns, rows)
    if len(shown) < len(extents):
        show.say(f"{len(extents) - len(shown):,} more; --limit 0 lists all")


# --- verify ---


def _batches(extents: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    batches: list[list[dict[str, Any]]] = []
    room = 0
    for extent in extents:
        if room < extent["bytes"]:
            batches.append([])
            room = BATCH_BYTES
        batches[-1].append(extent)
        room -= extent["bytes"]
    return batches


def _place(extent: dict[str, Any]) -> tuple[str, int]:
    return extent["segment"], extent["offset"]


def _check(root: str, extents: list[dict[str, Any]], doing: str, rate: int = 0) -> tuple[list[dict[str, Any]], int, float]:
    """Reads all, at `rate` bytes a second (0 = as fast as it goes). Returns the damaged ones with "reason", how many went
    meanwhile, and seconds."""
    failed: list[tuple[dict[str, Any], str]] = []
    began = time.monotonic()
    done = 0
    with show.progress_of_bytes(doing, sum(e["bytes"] for e in extents)) as advance:
        for batch in _batches(extents):
            results = _core.verify_extents(root, batch)
            failed += [(e, result) for e, result in zip(batch, results, strict=True) if result != "ok"]
            count = sum(e["bytes"] for e in batch)
            advance(count)
            done += count
            if rate:
                time.sleep(max(0.0, began + done / rate - time.monotonic()))
    seconds = time.monotonic() - began
    # An engine may have evicted what was just being read: only what is still there is damaged.
    still = {_place(e) for e in _core.list_extents(root)} if failed else set()
    damaged = [{**e, "reason": reason} for e, reason in failed if _place(e) in still]
    return damaged, len(failed) - len(damaged), seconds


def _say_checked(extents: list[dict[str, Any]], damaged: list[dict[str, Any]], gone: int, seconds: float) -> None:
    total = sum(e["bytes"] for e in extents)
    rate = f", {total / seconds / 1e9:.1f} GB/s" if total and seconds > show.PATIENCE_S else ""
    show.say(f"{show.number(len(extents), 'extent')}, {show.size(total)} read in {seconds:.1f} s{rate}")
    if gone:
        show.say(f"{show.number(gone, 'extent')} evicted meanwhile")
    if damaged:
        rows = [(e["key"].hex()[: show.SHORT_DIGEST], e["segment"], str(e["offset"]), e["reason"]) for e in damaged]
        show.table("Damaged extents", ("key", "segment", ">offset", "what"), rows, wide=3)


@app.command(epilog=EXIT_CODES, rich_help_panel=LOOK)
def verify(root: Root, namespace: Namespace = "", as_json: Json = False) -> None:
    """Reads every extent and checks its identity and digests; checks journals and manifests, too. Changes nothing."""
    extents = _extents(root, namespace)
    damaged, gone, seconds = _check(root, extents, "verifying")
    files = damage.files(_core.inspect_root(root))
    if as_json:
        total = sum(e["bytes"] for e in extents)
        summary = {"root": root, "extents": len(extents), "bytes": total, "seconds": seconds, "gone": gone}
        print_json({**summary, "damaged": damaged, "damaged_files": files})
    else:
        _say_checked(extents, damaged, gone, seconds)
        if files:
            show.table("Damaged files", ("file", "what"), [(f["file"], f["reason"]) for f in files], wide=(0, 1))
        if not damaged and not files:
            show.say("nothing is damaged")
    if damaged or files:
        raise typer.Exit(1)


@app.command(epilog=EXIT_CODES, rich_help_panel=TEND)
def scrub(
    root: Root,
    namespace: Namespace = "",
    rate: Annotated[
        int, typer.Option(metavar="SIZE", parser=size_or_zero, show_default="as fast as it goes", help="Bytes a second, e.g. 100MiB; 0 = no bound.")
    ] = "0",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Reads every extent as verify does, and condemns what is damaged, so that no engine tries it again."""
    extents = _extents(root, namespace)
    damaged, gone, seconds = _check(root, extents, "scrubbing", rate)
    # An extent that the kernel cannot read is not proved bad; loads leave it alone, too.
    bad = [e for e in damaged if not e["reason"].startswith(("io:", "permission:"))]
    condemned = 0 if dry_run or not bad else _core.remove_extents(root, bad, True)
    if as_json:
        total = sum(e["bytes"] for e in extents)
        summary = {"root": root, "dry_run": dry_run, "extents": len(extents), "bytes": total, "seconds": seconds, "gone": gone}
        print_json({**summary, "damaged": damaged, "condemned": condemned})
    else:
        _say_checked(extents, damaged, gone, seconds)
        verb = f"would condemn {len(bad):,}" if dry_run else f"condemned {condemned:,}"
        show.say(f"{verb} of {show.number(len(damaged), 'damaged extent')}" if damaged else "nothing is damaged")
    if damaged:
        raise typer.Exit(1)


# --- evict, rm ---


@app.command(epilog=EXIT_CODES, rich_help_panel=TEND)
def evict(
    root: Root,
    count: Annotated[int, typer.Option("--bytes", metavar="SIZE", parser=size, help="How much to free, e.g. 1GiB.")],
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Removes the coldest sealed segments that are not pinned, until SIZE was freed. Engines drop them at their next poll."""
    evicted = _core.evict_segments(root, count, dry_run)
    enough = evicted["bytes"] >= count
    if as_json:
        print_json({"root": root, "dry_run": dry_run, "asked": count, **evicted, "enough": enough})
    else:
        verb = "would evict" if dry_run else "evicted"
        show.say(f"{verb} {show.number(evicted['segments'], 'segment')}, {show.size(evicted['bytes'])}")
        if not enough:
            show.say(f"less than the {show.size(count)} asked for: open segments and pinned ones stay")
    if not enough:
        raise typer.Exit(NOT_DONE)


@app.command(epilog=EXIT_CODES, rich_help_panel=TEND)
def rm(
    root: Root,
    namespace: Annotated[str, typer.Option("--namespace", metavar="PREFIX", help="First hex digits of the digest.")],
    dry_run: DryRun = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Forgets all extents of the namespaces whose digest starts with PREFIX. Their space comes back by eviction."""
    found = _select(_core.inspect_root(root), namespace)
    extents = namespaces.of_extents(_core.list_extents(root), found)
    total = sum(e["bytes"] for e in extents)
    what = f"{show.number(len(extents), 'extent')} ({show.size(total)}) of {show.number(len(found), 'namespace')}"
    if not dry_run and not yes:
        if as_json or not sys.stdin.isatty():
            raise typer.BadParameter(f"removing {what} needs --yes here; --dry-run only shows it")
        for n in found:
            show.say(f"{n['digest'][: show.SHORT_DIGEST]}  {show.clean(namespaces.model_of(n))}")
        if not typer.confirm(f"Remove {what} from {show.clean(root)}?"):
            raise typer.Exit(NOT_DONE)
    removed = 0 if dry_run else _core.remove_extents(root, extents)
    if as_json:
        digests = [n["digest"] for n in found]
        summary = {"root": root, "dry_run": dry_run, "namespaces": digests, "extents": len(extents), "bytes": total}
        print_json({**summary, "removed": removed})
    elif dry_run:
        show.say(f"would remove {what}")
    else:
        show.say(f"removed {show.number(removed, 'extent')} of {show.number(len(found), 'namespace')}")


@app.command(epilog=EXIT_CODES, rich_help_panel=LOOK)
def version(as_json: Json = False) -> None:
    """The version of tokendepot and of the format that it reads and writes."""
    if as_json:
        print_json({"tokendepot": _core.version(), "format": _core.FORMAT_VERSION})
    else:
        show.say(f"tokendepot {_core.version()}, format {_core.FORMAT_VERSION}")


app.command(epilog=doctor.EXIT_CODES, rich_help_panel=LOOK)(doctor.doctor)
app.command(epilog=EXIT_CODES, rich_help_panel=LOOK)(du.du)
app.command(epilog=EXIT_CODES, rich_help_panel=WATCH)(events.events)
app.command(epilog=export.EXIT_CODES_EXPORT, rich_help_panel=MOVE)(export.export)
app.command("import", epilog=export.EXIT_CODES_IMPORT, rich_help_panel=MOVE)(export.import_command)
app.command(epilog=explain.EXIT_CODES, rich_help_panel=LOOK)(explain.explain)
app.command(epilog=repair.EXIT_CODES, rich_help_panel=TEND)(repair.repair)
app.command(epilog=EXIT_CODES, rich_help_panel=WATCH)(metrics.metrics)
app.command(epilog=EXIT_CODES, rich_help_panel=WATCH)(top.top)
app.command(epilog=tending.EXIT_CODES, rich_help_panel=TEND)(tending.pin)
app.command(epilog=tending.EXIT_CODES, rich_help_panel=TEND)(tending.unpin)
app.command(epilog=tending.EXIT_CODES, rich_help_panel=TEND)(tending.ttl)
app.command(epilog=tending.EXIT_CODES, rich_help_panel=TEND)(tending.quota)
app.command(epilog=EXIT_CODES, rich_help_panel=MEASURE)(replay.replay)
app.command(epilog=EXIT_CODES, rich_help_panel=MEASURE)(replay.plan)
app.command(epilog=report.EXIT_CODES, rich_help_panel=MEASURE)(report.report)
