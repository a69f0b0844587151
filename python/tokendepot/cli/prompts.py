"""Prompts on the command line: their token ids, and the keys that an engine would look them up by."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from .. import _core
from . import namespaces

MOST_TOKENS = 1 << 26  # as text about half a GiB
MAX_TOKEN = (1 << 32) - 1
LMCACHE = "lmcache"  # "engine" in the manifests that python/src/lmcache.cc makes

Tokenizer = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="tokenizer.json or its directory: PROMPT is text. Else it is token ids."),
]
Salt = Annotated[str, typer.Option(help="The cache_salt of the request.")]
Lora = Annotated[
    str,
    typer.Option(metavar="NAME=PATH", help="The request's LoRA adapter: its name, and its directory or content digest."),
]


@dataclass(frozen=True)
class Prompt:
    tokens: list[int]
    salt: str = ""
    lora: bytes = b""

    def keys(self, namespace: str, chunk_tokens: int) -> list[bytes]:
        """One key for each full chunk; `namespace` is the whole digest in hex."""
        chain = _core.KeyChain(bytes.fromhex(namespace), chunk_tokens, self.salt, self.lora)
        chain.append(self.tokens)
        keys = chain.keys()
        return [keys[i : i + _core.KEY_BYTES] for i in range(0, len(keys), _core.KEY_BYTES)]

    def owned_by(self, salt: str, lora: bytes) -> Prompt:
        return Prompt(self.tokens, salt, lora)


def read(source: str, tokenizer: str | None, salt: str, lora: str, option: str | None = None) -> Prompt:
    """The prompt in a file, or in stdin for "-"."""
    return Prompt(_tokens(_text(source, option), source, tokenizer, option), salt, _adapter(lora))


def _refuse(why: str, option: str | None = None) -> typer.BadParameter:
    return typer.BadParameter(why, param_hint=option and f"'{option}'")


def _text(source: str, option: str | None) -> str:
    limit = MOST_TOKENS * 8
    try:
        if source == "-":
            data = sys.stdin.buffer.read(limit + 1)
        else:
            with open(source, "rb") as file:
                data = file.read(limit + 1)
    except OSError as error:
        raise _refuse(f"{source!r} cannot be read: {error.strerror}", option) from None
    if len(data) > limit:
        raise _refuse(f"{source!r} has more than {limit} bytes", option)
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise _refuse(f"{source!r} is not UTF-8", option) from None


def _tokens(text: str, source: str, tokenizer: str | None, option: str | None) -> list[int]:
    tokens = _tokenized(text, tokenizer) if tokenizer is not None else _token_ids(text, source, option)
    if not tokens:
        raise _refuse(f"{source!r} holds no token", option)
    if len(tokens) > MOST_TOKENS:
        raise _refuse(f"{source!r} holds {len(tokens)} tokens, expected {MOST_TOKENS} at most", option)
    return tokens


def _tokenized(text: str, tokenizer: str) -> list[int]:
    try:
        import tokenizers
    except ImportError:
        raise _refuse("needs the package tokenizers: pip install tokenizers", "--tokenizer") from None
    file = os.path.join(tokenizer, "tokenizer.json") if os.path.isdir(tokenizer) else tokenizer
    try:
        return tokenizers.Tokenizer.from_file(file).encode(text).ids
    except Exception as error:  # the library raises Exception itself
        raise _refuse(f"{tokenizer!r} is no tokenizer.json or its directory ({error})", "--tokenizer") from None


def _token_ids(text: str, source: str, option: str | None) -> list[int]:
    """A JSON list, the answer of vLLM's /tokenize, or numbers with blanks or commas between them."""
    expected = f"{source!r} holds no token ids; expected a JSON list or numbers, or text with --tokenizer"
    if text.lstrip()[:1] in ("[", "{"):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            raise _refuse(expected, option) from None
        tokens = found.get("tokens") if isinstance(found, dict) else found
        if not isinstance(tokens, list) or not all(type(t) is int for t in tokens):
            raise _refuse(expected, option)
    else:
        words = re.split(r"[\s,]+", text.strip()) if text.strip() else []
        if not all(re.fullmatch(r"[0-9]{1,10}", word) for word in words):
            raise _refuse(expected, option)
        tokens = [int(word) for word in words]
    for token in tokens:
        if not 0 <= token <= MAX_TOKEN:
            raise _refuse(f"{source!r} holds the token id {token}, expected 0 to {MAX_TOKEN}", option)
    return tokens


def _adapter(lora: str) -> bytes:
    """Name and content digest as one byte string, as the vLLM connector makes it."""
    if not lora:
        return b""
    name, equals, where = lora.partition("=")
    if not name or not equals or not where:
        raise _refuse(f"{lora!r}: expected NAME=PATH or NAME=DIGEST", "--lora")
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", where):
        where = _digest_of_adapter(where)
    return f"{name}\0{where}".encode()


def _digest_of_adapter(path: str) -> str:
    if not os.path.exists(path):
        raise _refuse(f"{path!r} is not there, and is no digest of 40 or 64 hex digits", "--lora")
    try:
        from pathlib import Path

        from ..engines.vllm.identity import content_digest, snapshot_commit
        from ..engines.vllm.settings import RefusedError
    except ImportError as error:
        raise _refuse(f"a path needs the package {error.name}; give NAME=DIGEST without it", "--lora") from None
    try:
        return snapshot_commit(Path(path)) or content_digest(Path(path))
    except RefusedError as error:
        raise _refuse(str(error), "--lora") from None


def chunk_tokens_of(namespace: dict[str, Any], extents: list[dict[str, Any]]) -> int:
    """What the manifest says; else that of the longest extent, because an extent holds at most its chunk; else 0.

    Refuses a namespace of LMCache's server, whose extents are objects under LMCache's own chunk hashes.
    """
    manifest = namespaces.manifest_of(namespace)
    if manifest.get("engine") == LMCACHE:
        raise _refuse(
            f"namespace {namespace['digest'][: namespaces.PREFIX_DIGITS]} is of LMCache: the keys of its chunks cannot be made "
            "from a prompt, because LMCache makes them of hashes of its own"
        )
    stated = manifest.get("chunk_tokens")
    if type(stated) is int and 0 < stated <= 1 << 20:
        return stated
    return max((e["tokens"] for e in namespaces.of_extents(extents, [namespace])), default=0)
