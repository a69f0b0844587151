"""`tokendepot explain`: which chunks of a prompt are where, and why the first missing one is missing."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from .. import _core
from . import namespaces, prompts, show
from .arguments import Json, Roots, once_each, print_json

ROWS_SHOWN = 50
MISSING = 1
EXIT_CODES = (
    "Exit codes: 0 all full chunks are there; 1 something is missing; 2 wrong usage, no permission, or a path that is not "
    "the root of a depot."
)
NEVER = "no journal speaks of it: never stored here, or evicted before the journals were last compacted"
Traces = dict[bytes, list[dict[str, Any]]]  # key -> its extents, live and gone, of all roots


@dataclass
class View:
    """One namespace as the prompt meets it."""

    namespace: dict[str, Any]
    chunk_tokens: int
    wants: list[_core.GroupWant]
    groups: list[int]
    keys: list[bytes]


def explain(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="A file of token ids, or of text; - = stdin.")],
    roots: Roots,
    namespace: Annotated[
        str,
        typer.Option("--namespace", metavar="PREFIX", show_default="the one that has most of it", help="First hex digits of its digest."),
    ] = "",
    tokenizer: prompts.Tokenizer = None,
    salt: prompts.Salt = "",
    lora: prompts.Lora = "",
    verify: Annotated[bool, typer.Option("--verify", help="Read what is there and check every digest.")] = False,
    limit: Annotated[int, typer.Option(min=0, help="Rows to show; 0 = all. JSON has all.")] = ROWS_SHOWN,
    as_json: Json = False,
) -> None:
    """Which chunks of a prompt are where, and why the first missing one is missing. Looks up as an engine does."""
    _core.log_warnings_only()
    paths = once_each(roots)
    asked = prompts.read(prompt, tokenizer, salt, lora, "PROMPT")
    inspected = [_core.inspect_root(path) for path in paths]
    _refuse_equal_ids(inspected)
    views, candidates, traces = _views(paths, inspected, asked, namespace)
    depot = _core.Depot.open(_read_only(inspected), catalog=True, writer=False)
    try:
        chosen = _choose(depot, candidates, traces)
        damaged = _verify(depot, chosen, traces) if verify else {}
        keys = b"".join(chosen.keys)
        groups = []
        for want, number in zip(chosen.wants, chosen.groups, strict=True):
            prefix = depot.longest_prefix(keys, [want])
            first, reasons = None, []
            if prefix < len(chosen.keys):
                stored = depot.stored(keys, want)
                first = next((i for i in range(len(stored)) if not stored[i]), prefix)
                reasons = [
                    *_fates(chosen.keys[first], number, traces, damaged),
                    *_owners(first, chosen, asked, paths),
                    *_elsewhere(first, chosen, views, traces),
                ]
            groups.append({"group": number, "prefix_chunks": prefix, "first_missing": first, "reasons": reasons})
        usable = depot.longest_prefix(keys, chosen.wants)
    finally:
        depot.close()
    places = [
        {**e, "chunk": i, "damaged": damaged.get((e["root"], e["segment"], e["offset"]), "")}
        for i, key in enumerate(chosen.keys)
        for e in traces.get(key, [])
        if e["fate"] == "live"
    ]
    report = {
        "roots": paths, "namespace": chosen.namespace["digest"], "chunk_tokens": chosen.chunk_tokens,
        "tokens": len(asked.tokens), "chunks": len(chosen.keys), "usable_chunks": usable,
        "usable_tokens": usable * chosen.chunk_tokens, "groups": groups, "extents": places,
    }  # fmt: skip
    if as_json:
        print_json(report)
    else:
        _say(report, limit)
    if any(group["first_missing"] is not None for group in groups):
        raise typer.Exit(MISSING)


def _refuse_equal_ids(inspected: list[dict[str, Any]]) -> None:
    """A copy gives the same ids to other segments: a look-up over both would not be that of any engine."""
    known: dict[str, str] = {}
    for root in inspected:
        other = known.setdefault(root["root_id"], root["path"])
        if other != root["path"]:
            raise typer.BadParameter(
                f"{other} and {root['path']} both have the id {root['root_id']}, expected different roots; one is a copy",
                param_hint="'ROOT'",
            )


def _read_only(inspected: list[dict[str, Any]]) -> str:
    # A root that is only read needs a capacity for the form's sake.
    roots = [{"path": root["path"], "capacity": "1MiB", "read_only": True} for root in inspected]
    return json.dumps({"roots": roots, "slab": "1MiB"})



def _views(
    paths: list[str], inspected: list[dict[str, Any]], asked: prompts.Prompt, prefix: str
) -> tuple[list[View], list[View], Traces]:
    """All namespaces whose keys of the prompt can be made, those of them that `prefix` means, and what journals say of the keys.

    A namespace that holds nothing any more is among them: journals may still know what became of it.
    """
    extents = [e for path in paths for e in _core.list_extents(path)]
    whole: dict[str, dict[str, Any]] = {}
    for root in inspected:
        for n in root["namespaces"]:
            if n["manifest"]:
                known = whole.setdefault(n["digest"], {**n, "extents": 0})
                known["extents"] += n["extents"]
    meant = _meant(whole, prefix, paths) if prefix else whole.keys()
    refusal = typer.BadParameter(
        f"nothing tells how long a chunk of a namespace in {', '.join(paths)} is: no manifest says it, and no extent is left",
        param_hint="'ROOT'",
    )
    keys: dict[str, tuple[int, list[bytes]]] = {}
    for digest, n in whole.items():
        try:
            chunk_tokens = prompts.chunk_tokens_of(n, namespaces.of_extents(extents, [n]))
        except typer.BadParameter as error:
            refusal = error if digest in meant else refusal
            continue
        if chunk_tokens:
            keys[digest] = chunk_tokens, asked.keys(digest, chunk_tokens)
    traces = _trace(paths, [key for _, mine in keys.values() for key in mine])
    views = []
    for digest, (chunk_tokens, mine) in keys.items():
        held = namespaces.of_extents(extents, [whole[digest]]) or [e for key in mine for e in traces.get(key, [])]
        if wants := _wants(whole[digest], held, chunk_tokens):
            groups = [group for group, _ in wants]
            views.append(View(whole[digest], chunk_tokens, [want for _, want in wants], groups, mine))
    candidates = [view for view in views if view.namespace["digest"] in meant]
    if not candidates:
        raise refusal
    if not any(view.keys for view in candidates):
        least = min(view.chunk_tokens for view in candidates)
        raise typer.BadParameter(
            f"{len(asked.tokens)} tokens are less than one chunk ({least} tokens): nothing of it is ever stored", param_hint="'PROMPT'"
        )
    return views, candidates, traces


def _meant(whole: dict[str, dict[str, Any]], prefix: str, paths: list[str]) -> list[str]:
    try:
        return [n["digest"] for n in namespaces.select({"path": ", ".join(paths), "namespaces": [*whole.values()]}, prefix)]
    except namespaces.NoSuchNamespace as error:
        raise typer.BadParameter(str(error), param_hint="'--namespace'") from None


def _wants(n: dict[str, Any], extents: list[dict[str, Any]], chunk_tokens: int) -> list[tuple[int, _core.GroupWant]]:
    """What an engine of this namespace asks for: as its manifest says, else what these extents of each group add up to."""
    stated = namespaces.manifest_of(n).get("groups")
    try:
        return [
            (i, _core.GroupWant(i, g["layout"], (0, g["layers"], 0, g["heads"]), g["tokens"], _window(g, chunk_tokens)))
            for i, g in enumerate(stated)
        ]
    except (TypeError, KeyError, ValueError, OverflowError, _core.DepotError):
        pass  # a manifest of somebody else's making
    wants = []
    for group in sorted({e["group"] for e in extents}):
        mine = [e for e in extents if e["group"] == group]
        kind, tokens = mine[0]["kind"], max(e["tokens"] for e in mine)
        parts = list(zip(*(e["part"] for e in mine), strict=True))
        part = (min(parts[0]), max(parts[1]), min(parts[2]), max(parts[3]))
        wants.append((group, _core.GroupWant(group, kind, part, tokens, 0)))
    return wants


def _window(group: dict[str, Any], chunk_tokens: int) -> int:
    return max(1, -(-(group["window"] - 1) // chunk_tokens)) if group["attention"] == "window" else 0


def _choose(depot: Any, views: list[View], traces: Traces) -> View:
    """The namespace that has most of the prompt; where none has its front, the one that has or had most of its chunks."""
    return max(
        views,
        key=lambda view: (
            depot.longest_prefix(b"".join(view.keys), view.wants) * view.chunk_tokens,
            sum(key in traces for key in view.keys),
            view.namespace["extents"],
        ),
    )


def _trace(paths: list[str], keys: list[bytes]) -> Traces:
    found: Traces = {}
    for path in paths:
        for e in _core.trace_extents(path, b"".join(keys)):
            found.setdefault(e["key"], []).append({**e, "root": path})
    return found


def _verify(depot: Any, chosen: View, traces: Traces) -> dict[tuple[str, str, int], str]:
    """What is damaged, which the depot then counts as missing, as an engine does that met it."""
    live = [e for key in chosen.keys for e in traces.get(key, []) if e["fate"] == "live"]
    damaged = {}
    with show.progress_of_bytes("verifying", sum(e["bytes"] for e in live)) as advance:
        for e in live:
            result = _core.verify_extents(e["root"], [e])[0]
            if result != "ok":
                damaged[e["root"], e["segment"], e["offset"]] = result
            advance(e["bytes"])
    sound = {
        (e["key"], e["group"], e["part"]) for e in live if (e["root"], e["segment"], e["offset"]) not in damaged
    }
    for e in live:
        if (e["key"], e["group"], e["part"]) not in sound:
            depot.forget(e["key"], e["group"])
    return damaged


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _fates(
    key: bytes, group: int, traces: Traces, damaged: dict[tuple[str, str, int], str]
) -> list[str]:
    """What became of the extents that this chunk and group had in each root."""
    past = [e for e in traces.get(key, []) if e["group"] == group]
    reasons = []
    for e in past:
        if why := damaged.get((e["root"], e["segment"], e["offset"])):
            reasons.append(f"damaged in {e['root']}: {why}")
        elif e["fate"] == "live":
            layers, heads = e["part"][:2], e["part"][2:]
            reasons.append(f"only a part of it is there: layers {layers[0]} to {layers[1] - 1}, heads {heads[0]} to {heads[1] - 1} in {e['root']}")
        elif e["fate"] == "evicted":
            reasons.append(f"evicted from {e['root']} at {_when(e['ended_at'])}")
        elif e["fate"] == "condemned":
            reasons.append(f"removed from {e['root']}, or found damaged there, at {_when(e['ended_at'])}")
        else:
            reasons.append(f"the file of its segment {e['segment']} is gone from {e['root']}, and no journal says why")
    if not past:
        reasons.append(NEVER)
    return reasons


def _owners(chunk: int, chosen: View, asked: prompts.Prompt, paths: list[str]) -> list[str]:
    """The same tokens without what was given of salt and adapter."""
    others = {}
    if asked.salt:
        others["the salt"] = asked.owned_by("", asked.lora)
    if asked.lora:
        others["the LoRA adapter"] = asked.owned_by(asked.salt, b"")
    if asked.salt and asked.lora:
        others["salt and LoRA adapter"] = asked.owned_by("", b"")
    reasons = []
    for what, other in others.items():
        key = other.keys(chosen.namespace["digest"], chosen.chunk_tokens)[chunk]
        live = [path for path in paths for e in _core.trace_extents(path, key) if e["fate"] == "live"]
        if live:
            reasons.append(f"it is there without {what}, in {live[0]}")
    return reasons


def _elsewhere(chunk: int, chosen: View, views: list[View], traces: Traces) -> list[str]:
    """Other namespaces that have the chunk with these tokens, and the fields of the manifests that differ."""
    reasons = []
    for view in views:
        # The chunk of the other namespace that holds the last token of this one.
        other = ((chunk + 1) * chosen.chunk_tokens - 1) // view.chunk_tokens
        if view is chosen or other >= len(view.keys):
            continue
        if not any(e["fate"] == "live" for e in traces.get(view.keys[other], [])):
            continue
        mine, theirs = chosen.namespace["digest"], view.namespace["digest"]
        fields = [
            f"{field} is {values[mine] or 'absent'} here and {values[theirs] or 'absent'} there"
            for field, values in namespaces.differences([chosen.namespace, view.namespace]).items()
        ]
        reasons.append(f"namespace {theirs[: show.SHORT_DIGEST]} has it: {'; '.join(fields)}")
    return reasons


def _say(r: dict[str, Any], limit: int) -> None:
    tail = r["tokens"] - r["chunks"] * r["chunk_tokens"]
    show.say(
        f"{r['tokens']:,} tokens: {show.number(r['chunks'], 'chunk')} of {r['chunk_tokens']} and {tail:,} that fill none, "
        f"in namespace {r['namespace'][: show.SHORT_DIGEST]}"
    )
    show.say(f"usable: the first {show.number(r['usable_chunks'], 'chunk')}, {r['usable_tokens']:,} tokens")
    show.say()
    names = {path: str(i) for i, path in enumerate(r["roots"])}
    if len(names) > 1:
        show.table("Roots", ("root", "path"), [(number, path) for path, number in names.items()], wide=1)
    shown = r["extents"][:limit] if limit else r["extents"]
    if shown:
        rows = [
            (
                str(e["chunk"]), str(e["group"]), names[e["root"]], e["segment"], f"{e['offset']:,}", show.size(e["bytes"]),
                "damaged" if e["damaged"] else show.age(e["stored_at"]),
            )
            for e in shown
        ]  # fmt: skip
        show.table("There", (">chunk", ">group", ">root", "segment", ">offset", ">bytes", ">stored"), rows, wide=3)
    if len(shown) < len(r["extents"]):
        show.say(f"{len(r['extents']) - len(shown):,} more; --limit 0 shows all")
    for group in r["groups"]:
        if group["first_missing"] is None:
            show.say(f"group {group['group']}: all there")
            continue
        show.say(f"group {group['group']}: {show.number(group['prefix_chunks'], 'chunk')} usable; chunk {group['first_missing']} is missing")
        for reason in group["reasons"]:
            show.say(f"  {show.clean(reason)}")
