"""`tokendepot export` and `tokendepot import`: a namespace, or one prompt's prefix, as a file for another site."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from .. import _core
from . import namespaces, prompts, show
from .arguments import Json, Root, Roots, once_each, print_json, size, size_or_zero

STEP_BYTES = 64 << 20  # between two looks at progress and interrupts
EXIT_CODES_EXPORT = (
    "Exit codes: 0 all of it is in the file; 1 something was damaged or is not there, and is missing in it; 2 wrong usage, no "
    "permission, or a path that is not the root of a depot; 3 the file could not be written."
)
EXIT_CODES_IMPORT = (
    "Exit codes: 0 all of the file is in the root; 1 the file is damaged or not whole, and what was good went in; 2 wrong "
    "usage, no permission, no export file, or a path that is not the root of a depot; 3 no room for the rest, or it could not be "
    "written."
)
DAMAGED, NOT_DONE = 1, 3


def _refuse(why: str, option: str | None = None) -> typer.BadParameter:
    return typer.BadParameter(why, param_hint=option and f"'{option}'")


# --- export ---


def export(
    roots: Roots,
    namespace: Annotated[
        str, typer.Option("--namespace", metavar="PREFIX", help="First hex digits of one namespace's digest.")
    ],
    out: Annotated[str, typer.Option("--out", metavar="FILE", help="A file that is not there yet; - = stdout.")],
    prompt: Annotated[
        str | None, typer.Option(metavar="FILE", help="Only the chunks of this prompt: token ids or text; - = stdin.")
    ] = None,
    tokenizer: prompts.Tokenizer = None,
    salt: prompts.Salt = "",
    lora: prompts.Lora = "",
    as_json: Json = False,
) -> None:
    """Writes a namespace, or one prompt's prefix of it, into one file. Every extent is checked as it is read."""
    paths = once_each(roots)
    if prompt is None and (tokenizer or salt or lora):
        raise _refuse("--tokenizer, --salt and --lora go with --prompt only")
    chosen, sources = _namespace(paths, namespace)
    wanted = _candidates(sources, chosen)
    of_prompt: dict[str, int] = {}
    if prompt is not None:
        asked = prompts.read(prompt, tokenizer, salt, lora, "--prompt")
        wanted, keys = _of_prompt(wanted, chosen, asked)
        present = {copies[0][1]["key"] for copies in wanted}
        of_prompt = {"prompt_chunks": len(keys), "missing_chunks": sum(key not in present for key in keys)}
    total = sum(copies[0][1]["bytes"] for copies in wanted)
    failed: list[dict[str, Any]] = []
    written = file_bytes = 0
    began = time.monotonic()
    if wanted or not of_prompt:
        with _target(out) as fd:
            exporter = _core.Exporter.begin(fd, chosen["manifest"], len(wanted), total)
            with show.progress_of_bytes("exporting", total) as advance:
                written = _write(exporter, wanted, failed, advance)
            exporter.finish()
            file_bytes = exporter.file_bytes
    seconds = time.monotonic() - began
    summary = {
        "roots": paths, "namespace": chosen["digest"], "out": out, **of_prompt, "extents": len(wanted) - len(failed),
        "bytes": written, "file_bytes": file_bytes, "seconds": seconds, "left_out": failed,
    }  # fmt: skip
    _tell(summary, as_json, out == "-", _say_export)
    if failed or of_prompt.get("missing_chunks"):
        raise typer.Exit(DAMAGED)


def _namespace(paths: list[str], prefix: str) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    """The one namespace of these roots that is meant, with a manifest, and the roots that have it."""
    inspected = [_core.inspect_root(path) for path in paths]
    known = {"path": ", ".join(paths), "namespaces": [n for root in inspected for n in root["namespaces"]]}
    try:
        found = namespaces.select(known, prefix)
    except namespaces.NoSuchNamespace as error:
        raise _refuse(str(error), "--namespace") from None
    digests = sorted({n["digest"] for n in found if len(n["digest"]) == 64} or {n["digest"] for n in found})
    if len(digests) > 1:
        raise _refuse(
            f'"{prefix}" stands for {len(digests)} namespaces: {", ".join(d[: show.SHORT_DIGEST] for d in digests)}; give more digits',
            "--namespace",
        )
    whole = [n for n in found if n["manifest"]]
    if not whole:
        raise _refuse(f"the manifest of {digests[0]} is damaged or missing; tokendepot repair may restore it", "--namespace")
    short = digests[0][: namespaces.PREFIX_DIGITS]
    sources = [
        (path, root)
        for path, root in zip(paths, inspected, strict=True)
        if any(n["digest"].startswith(short) for n in root["namespaces"])
    ]
    return whole[0], sources


Copies = list[tuple[str, dict[str, Any]]]


def _candidates(sources: list[tuple[str, dict[str, Any]]], chosen: dict[str, Any]) -> list[Copies]:
    """Each extent once with all its copies, those of the first root first, the oldest extent first."""
    found: dict[tuple[Any, ...], Copies] = {}
    for path, _ in sources:
        for e in namespaces.of_extents(_core.list_extents(path), [chosen]):
            identity = (e["key"], e["group"], e["kind"], e["part"], e["tokens"])
            found.setdefault(identity, []).append((path, e))
    # The front of a prompt was stored before its end, and is of use without it.
    return sorted(found.values(), key=lambda copies: copies[0][1]["stored_at"])


def _of_prompt(
    wanted: list[Copies], chosen: dict[str, Any], prompt: prompts.Prompt
) -> tuple[list[Copies], list[bytes]]:
    """Those of the prompt, in its order, and the keys of all its chunks."""
    chunk_tokens = prompts.chunk_tokens_of(chosen, [copies[0][1] for copies in wanted])
    if not chunk_tokens:
        raise _refuse(f"nothing tells how long a chunk of namespace {chosen['digest'][: show.SHORT_DIGEST]} is", "--prompt")
    keys = prompt.keys(chosen["digest"], chunk_tokens)
    if not keys:
        raise _refuse(f"{len(prompt.tokens)} tokens are less than one chunk ({chunk_tokens} tokens), so it has no key", "--prompt")
    order = {key: i for i, key in enumerate(keys)}
    mine = [copies for copies in wanted if copies[0][1]["key"] in order]
    return sorted(mine, key=lambda copies: order[copies[0][1]["key"]]), keys


def _write(exporter: Any, wanted: list[Copies], failed: list[dict[str, Any]], advance: Any) -> int:
    written = 0
    for copies in wanted:
        for i, (path, extent) in enumerate(copies):
            result = exporter.add(path, [extent])[0]
            if result == "ok":
                written += extent["bytes"]
                break
            if i + 1 == len(copies):
                failed.append({**extent, "root": path, "reason": result})
        advance(copies[0][1]["bytes"])
    return written


@contextmanager
def _target(out: str) -> Iterator[int]:
    """A descriptor to write to. A file gets its name when it is whole, and none if it never is."""
    if out == "-":
        if sys.stdout.isatty():
            raise _refuse("an export file is not for a terminal; redirect stdout or name a file", "--out")
        yield sys.stdout.fileno()
        return
    if os.path.lexists(out):
        if not (os.path.exists(out) and stat.S_ISFIFO(os.stat(out).st_mode)):
            raise _refuse(f"{out!r} is there already; name a file that is not", "--out")
        with open(out, "wb", buffering=0) as pipe:
            yield pipe.fileno()
        return
    try:
        file = tempfile.NamedTemporaryFile(
            dir=os.path.dirname(os.path.abspath(out)), prefix=os.path.basename(out)[:64] + ".", suffix=".part", delete=False
        )
    except OSError as error:
        raise _refuse(f"{out!r} cannot be written: {error.strerror}", "--out") from None
    try:
        with file:
            yield file.fileno()
            os.fsync(file.fileno())
        os.replace(file.name, out)
    except BaseException:
        os.unlink(file.name)
        raise


def _tell(summary: dict[str, Any], as_json: bool, to_stderr: bool, say: Any) -> None:
    """Where stdout carries the file, stderr carries the summary."""
    if to_stderr:
        sys.stdout = sys.stderr
        show.out.file = sys.stderr
    if as_json:
        print_json(summary)
    else:
        say(summary)


def _rate(count: int, seconds: float) -> str:
    return f", {count / seconds / 1e9:.1f} GB/s" if count and seconds > show.PATIENCE_S else ""


def _say_export(s: dict[str, Any]) -> None:
    if missing := s.get("missing_chunks"):
        show.say(f"{missing:,} of the prompt's {show.number(s['prompt_chunks'], 'chunk')} are not there; tokendepot explain says why")
    if not s["file_bytes"]:
        show.say("no file is written: nothing would be in it")
        return
    where = "stdout" if s["out"] == "-" else show.clean(s["out"])
    show.say(
        f"{show.number(s['extents'], 'extent')}, {show.size(s['bytes'])} of namespace {s['namespace'][: show.SHORT_DIGEST]} "
        f"to {where} in {s['seconds']:.1f} s{_rate(s['bytes'], s['seconds'])}"
    )
    if s["left_out"]:
        rows = [(e["key"].hex()[: show.SHORT_DIGEST], e["segment"], str(e["offset"]), e["reason"]) for e in s["left_out"]]
        show.table("Left out", ("key", "segment", ">offset", "why"), rows, wide=3)


# --- import ---


def import_command(
    source: Annotated[str, typer.Argument(metavar="FILE", help="An export file; - = stdin.")],
    root: Root,
    capacity: Annotated[
        int, typer.Option(metavar="SIZE", parser=size, help="Of the root, as its engines have it: segment files never exceed it.")
    ],
    create: Annotated[bool, typer.Option("--create", help="ROOT may be missing or empty: it becomes a root.")] = False,
    free_space_reserve: Annotated[
        int, typer.Option(metavar="SIZE", parser=size_or_zero, help="Left free on the file system; may be 0.")
    ] = "256MiB",  # type: ignore[assignment]  # typer parses defaults, too
    as_json: Json = False,
) -> None:
    """Brings the extents of an export file into a root. What is there already is skipped; nothing is evicted."""
    _core.log_warnings_only()
    with _source(source) as (fd, total):
        began = time.monotonic()
        try:
            importer = _core.Importer.begin(fd, root, capacity, create, free_space_reserve)
        except _core.DepotError as error:
            if error.kind in ("invalid_argument", "unsupported") and root not in str(error):
                raise _refuse(f"{source!r}: {error}") from None
            raise
        done = importer.report()["file_bytes"]
        try:
            with show.progress_of_bytes("importing", total or importer.report()["planned_bytes"]) as advance:
                advance(done)
                more = True
                while more:
                    more = importer.go_on(STEP_BYTES)
                    before, done = done, importer.report()["file_bytes"]
                    advance(done - before)
        except _core.DepotError:
            if not as_json:  # what went in stays in
                _say_import({**importer.report(), "seconds": time.monotonic() - began, "root": root})
            raise
    summary = {"root": root, "source": source, "seconds": time.monotonic() - began, **importer.report()}
    summary["manifest"] = namespaces.manifest_of(summary)
    if as_json:
        print_json(summary)
    else:
        _say_import(summary)
    if summary["full"]:
        raise typer.Exit(NOT_DONE)
    if not summary["whole"]:
        raise typer.Exit(DAMAGED)


@contextmanager
def _source(source: str) -> Iterator[tuple[int, int]]:
    """Descriptor, and bytes where they can be known."""
    if source == "-":
        yield sys.stdin.fileno(), 0
        return
    try:
        file = open(source, "rb", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise _refuse(f"{source!r} cannot be read: {error.strerror}") from None
    with file:
        status = os.fstat(file.fileno())
        if stat.S_ISDIR(status.st_mode):
            raise _refuse(f"{source!r} is a directory, expected an export file")
        yield file.fileno(), status.st_size


def _say_import(s: dict[str, Any]) -> None:
    show.say(
        f"{show.number(s['imported'], 'extent')}, {show.size(s['imported_bytes'])} of namespace "
        f"{s['namespace'][: show.SHORT_DIGEST]} imported into {show.clean(s['root'])} in {s['seconds']:.1f} s"
        f"{_rate(s['imported_bytes'], s['seconds'])}"
    )
    if s["present"]:
        show.say(f"{show.number(s['present'], 'extent')} there already")
    if s["damaged"] or s["junk_bytes"]:
        show.say(f"{show.number(s['damaged'], 'extent')} damaged, {show.size(s['junk_bytes'])} of the file belong to none")
    if s["full"]:
        show.say(f"stopped: {show.clean(s['reason'])}")
    elif not s["whole"]:
        show.say(f"the file is not whole: {show.clean(s['reason'])}")
