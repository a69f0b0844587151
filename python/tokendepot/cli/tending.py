"""`tokendepot pin`, `unpin`, `ttl`, `quota`: the rules of a root, kept in the root itself."""

from __future__ import annotations

import re
import time
from datetime import datetime, timezone
from typing import Annotated, Any

import typer

from .. import _core
from . import namespaces, prompts, show
from .arguments import Json, Namespace, Root, print_json, size

NS = 1_000_000_000
UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
MOST_SECONDS = 100 * 366 * 86400
NOTHING_OF_IT = 1
EXIT_CODES = (
    "Exit codes: 0 all well; 1 the rules are damaged, or something that was named is not there; 2 wrong usage, no permission, "
    "or a path that is not the root of a depot; 3 it could not be done."
)

DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]


def duration(text: str) -> float:
    found = re.fullmatch(r"(\d{1,10}(?:\.\d{1,6})?) ?(s|min|h|d|w)", text.strip())
    seconds = float(found[1]) * UNITS[found[2]] if found else 0.0
    if not 0 < seconds <= MOST_SECONDS:
        raise typer.BadParameter(f'the time "{text}" is not understood; expected a number and s, min, h, d or w, such as 36h')
    return seconds


Keys = Annotated[list[str] | None, typer.Option("--key", metavar="HEX", help="A chunk's key; may be given several times.")]
Prompt = Annotated[
    str | None, typer.Option("--prompt", metavar="FILE", help="The chunks of this prompt: token ids or text; - = stdin.")
]
Remove = Annotated[bool, typer.Option("--remove", help="Take the rule back.")]


def _one_namespace(root: str, prefix: str) -> dict[str, Any]:
    try:
        found = namespaces.select(_core.inspect_root(root), prefix)
    except namespaces.NoSuchNamespace as error:
        raise typer.BadParameter(str(error)) from None
    if len(found) > 1:
        raise typer.BadParameter(f'--namespace "{prefix}" is the beginning of {len(found)} namespaces; give more digits')
    if len(found[0]["digest"]) != 64:
        raise typer.BadParameter(f'the manifest of namespace {found[0]["digest"]} is missing, so its digest is not known')
    return found[0]


def _chunk_keys(
    root: str, namespace: dict[str, Any], keys: list[str], prompt: str | None, asked: tuple[str | None, str, str]
) -> bytes:
    """Those of the options, or none where the whole namespace is meant. `asked`: --tokenizer, --salt, --lora."""
    if prompt is None and any(asked):
        raise typer.BadParameter("--tokenizer, --salt and --lora go with --prompt only")
    for key in keys:
        if not re.fullmatch(r"[0-9a-fA-F]{64}", key):
            raise typer.BadParameter(f'--key is "{key}"; allowed are 64 hex digits, as in ls --json')
    found = bytes.fromhex("".join(keys))
    if prompt is None:
        return found
    chunk_tokens = prompts.chunk_tokens_of(namespace, _core.list_extents(root))
    if chunk_tokens == 0:
        raise typer.BadParameter(f"nothing tells how long a chunk of namespace {namespace['digest'][:16]} is; give --key")
    of_prompt = prompts.read(prompt, *asked, "--prompt").keys(namespace["digest"], chunk_tokens)
    if not of_prompt:
        raise typer.BadParameter(f"--prompt {prompt} is shorter than a chunk of {chunk_tokens} tokens, so it has no key")
    return found + b"".join(of_prompt)


# --- pin, unpin ---


def pin(
    root: Root,
    namespace: Namespace = "",
    keys: Keys = None,
    prompt: Prompt = None,
    tokenizer: prompts.Tokenizer = None,
    salt: prompts.Salt = "",
    lora: prompts.Lora = "",
    lasts: Annotated[str, typer.Option("--for", metavar="TIME", help="How long it holds, e.g. 8h; else until unpin.")] = "",
    capacity: Annotated[
        str, typer.Option(metavar="SIZE", help="Capacity of the root, where no engine has noted it there yet.")
    ] = "",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Keeps extents from being evicted for space: a namespace, a prompt's chunks, or chunks by key. Without options: lists."""
    if not namespace:
        if keys or prompt is not None or tokenizer or salt or lora or lasts or capacity or dry_run:
            raise typer.BadParameter("--namespace is missing; it says whose chunks are to be pinned")
        _list(root, "pin", as_json)
        return
    until = int((time.time() + duration(lasts)) * NS) if lasts else 0
    of = _one_namespace(root, namespace)
    chunks = _chunk_keys(root, of, keys or [], prompt, (tokenizer, salt, lora))
    _core.set_policy(root, "pin", bytes.fromhex(of["digest"]), until, chunks, size(capacity) if capacity else 0, dry_run)
    absent = _absent(root, chunks)
    _say_set(root, "pin", of["digest"], until, len(chunks) // _core.KEY_BYTES, dry_run, as_json, absent)
    if absent:
        raise typer.Exit(NOTHING_OF_IT)


def _absent(root: str, chunks: bytes) -> int:
    """How many of these keys no extent of the root has."""
    if not chunks:
        return 0
    there = {e["key"] for e in _core.list_extents(root)}
    return sum(chunks[i : i + _core.KEY_BYTES] not in there for i in range(0, len(chunks), _core.KEY_BYTES))


def unpin(
    root: Root,
    namespace: Annotated[str, typer.Option("--namespace", metavar="PREFIX", help="First hex digits of the digest.")],
    keys: Keys = None,
    prompt: Prompt = None,
    tokenizer: prompts.Tokenizer = None,
    salt: prompts.Salt = "",
    lora: prompts.Lora = "",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Takes pins back: all of a namespace, or that of a prompt or of keys."""
    of = _one_namespace(root, namespace)
    chunks = _chunk_keys(root, of, keys or [], prompt, (tokenizer, salt, lora))
    dropped = _core.drop_policies(root, "pin", bytes.fromhex(of["digest"]), chunks or None, dry_run)
    _say_dropped(root, "pin", of["digest"], dropped, dry_run, as_json)


# --- ttl, quota ---


def ttl(
    root: Root,
    time_to_live: Annotated[str, typer.Argument(metavar="TIME", help="E.g. 36h or 30d. Without it: lists.")] = "",
    namespace: Namespace = "",
    remove: Remove = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Extents stored longer ago than TIME are not served and are removed: of the root, or of a namespace."""
    value = int(duration(time_to_live) * NS) if time_to_live else 0
    _set_or_drop(root, "ttl", value, namespace, remove, dry_run, as_json)


def quota(
    root: Root,
    bytes_allowed: Annotated[str, typer.Argument(metavar="SIZE", help="E.g. 40GiB. Without it: lists.")] = "",
    namespace: Namespace = "",
    remove: Remove = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Live extents of a namespace take SIZE at most: beyond it, its own coldest go first."""
    if (bytes_allowed or remove) and not namespace:
        raise typer.BadParameter("--namespace is missing; a quota is a namespace's")
    _set_or_drop(root, "quota", size(bytes_allowed) if bytes_allowed else 0, namespace, remove, dry_run, as_json)


def _set_or_drop(
    root: str, kind: str, value: int, prefix: str, remove: bool, dry_run: bool, as_json: bool
) -> None:
    if value and remove:
        raise typer.BadParameter("--remove takes no value; give one of the two")
    if not value and not remove:
        if prefix or dry_run:
            raise typer.BadParameter("the value is missing, or --remove")
        _list(root, kind, as_json)
        return
    digest = _one_namespace(root, prefix)["digest"] if prefix else ""
    if remove:
        dropped = _core.drop_policies(root, kind, bytes.fromhex(digest), None, dry_run)
        _say_dropped(root, kind, digest, dropped, dry_run, as_json)
    else:
        _core.set_policy(root, kind, bytes.fromhex(digest), value, dry_run=dry_run)
        _say_set(root, kind, digest, value, 0, dry_run, as_json)


# --- what is shown ---


def lasting(seconds: float) -> str:
    for unit in ("w", "d", "h", "min"):
        if seconds >= UNITS[unit] and seconds % UNITS[unit] == 0:
            return f"{int(seconds / UNITS[unit])} {unit}"
    return f"{seconds:g} s"


def value_of(rule: dict[str, Any]) -> str:
    if rule["kind"] == "quota":
        return show.size(rule["value"])
    if rule["kind"] == "ttl":
        return lasting(rule["value"] / NS)
    if not rule["value"]:
        return "until unpin"
    left = rule["value"] / NS - time.time()
    return f"{lasting(float(max(1, round(left))))} more" if left > 0 else "ended"


def in_units(rule: dict[str, Any]) -> dict[str, Any]:
    """The rule for programs: its value under a name that tells the unit."""
    value = rule["value"]
    named: dict[str, Any] = {"quota_bytes": value}
    if rule["kind"] == "ttl":
        named = {"ttl_seconds": value / NS}
    elif rule["kind"] == "pin":
        named = {"until": datetime.fromtimestamp(value / NS, timezone.utc).isoformat(timespec="seconds") if value else None}
    return {key: item for key, item in rule.items() if key != "value"} | named


def rows_of(rules: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """kind, namespace, what, value, bytes in use."""
    rows = []
    for rule in rules:
        what = show.number(rule["chunks"], "chunk") if rule["chunks"] else "all"
        use = show.size(rule["bytes"])
        if rule["kind"] == "quota":
            use += f" ({100 * rule['bytes'] / rule['value']:.0f} %)"
        rows.append((rule["kind"], rule["namespace"][: show.SHORT_DIGEST] or "(root)", what, value_of(rule), use))
    return rows


COLUMNS = ("policy", "namespace", ">of", ">value", ">in use")


def _list(root: str, kind: str, as_json: bool) -> None:
    _core.inspect_root(root)  # a path that is no root is told as by every command
    info = _core.inspect_policies(root)
    rules = [rule for rule in info["rules"] if rule["kind"] == kind]
    if as_json:
        extra = {"pinned_bytes": info["pinned_bytes"], "pin_limit_bytes": info["pin_limit"]} if kind == "pin" else {}
        print_json({"root": root, "rules": [in_units(rule) for rule in rules], **extra, "damage": info["damage"]})
    elif not info["damage"]:
        if rules:
            show.table(f"{kind} in {show.clean(root)}", COLUMNS, rows_of(rules))
        else:
            show.say(f"{kind} in {show.clean(root)}: none")
        if kind == "pin":
            limit = f" of {show.size(info['pin_limit'])} allowed" if info["pin_limit"] else ""
            show.say(f"pins hold segments of {show.size(info['pinned_bytes'])}{limit}")
    if info["damage"]:
        show.complain(info["damage"])
        raise typer.Exit(1)


def _say_set(
    root: str, kind: str, digest: str, value: int, chunks: int, dry_run: bool, as_json: bool, absent: int = 0
) -> None:
    rule = {"kind": kind, "namespace": digest, "value": value, "chunks": chunks}
    if as_json:
        extra = {"absent_chunks": absent} if kind == "pin" else {}
        print_json({"root": root, "dry_run": dry_run, **in_units(rule), **extra})
        return
    verb = "would set" if dry_run else "set"
    what = show.number(chunks, "chunk") + " of " if chunks else ""
    whose = f"namespace {digest[: show.SHORT_DIGEST]}" if digest else "the root"
    show.say(f"{verb} {kind} of {what}{whose}: {value_of(rule)}")
    if absent:
        show.say(f"{absent:,} of them {'is' if absent == 1 else 'are'} not there: held from when stored")


def _say_dropped(root: str, kind: str, digest: str, dropped: int, dry_run: bool, as_json: bool) -> None:
    if as_json:
        print_json({"root": root, "dry_run": dry_run, "kind": kind, "namespace": digest, "removed": dropped})
    elif dropped:
        show.say(f"{'would remove' if dry_run else 'removed'} {dropped} {kind}{'' if dropped == 1 else 's'}")
    else:
        show.say(f"there is no such {kind} to remove")
    if not dropped:
        raise typer.Exit(NOTHING_OF_IT)
