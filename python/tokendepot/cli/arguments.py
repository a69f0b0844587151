"""What several commands take and print alike."""

from __future__ import annotations

import json
import os
import re
from typing import Annotated, Any, NoReturn

import typer

from .. import _core

EXIT_CODES = (
    "Exit codes: 0 all well; 1 something in a root is damaged; 2 wrong usage, no permission, or a path that is not the root "
    "of a depot; 3 the operation could not be done, or was declined."
)


def absolute(path: str) -> str:
    _refuse_odd_bytes(path)
    if re.search(r"\?\w+=", path) and not os.path.exists(path):
        raise typer.BadParameter(f"{path!r} has keys of a root behind the ?, expected the directory alone")
    return os.path.abspath(path)


def root_and_options(text: str) -> tuple[str, dict[str, Any]]:
    """"/path", or "/path?capacity=SIZE" as in the configuration of an engine -> path, and all its keys where one is given."""
    _refuse_odd_bytes(text)
    path, question, keys = text.partition("?")
    if not question or os.path.isdir(text):
        return os.path.abspath(text), {}
    try:
        options = _core.parse_options(json.dumps({"roots": [f"{os.path.abspath(path)}?{keys}"]}))["roots"][0]
    except _core.DepotError as error:
        raise typer.BadParameter(str(error)) from None
    return options["path"], options


def _refuse_odd_bytes(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise typer.BadParameter("the path is not UTF-8") from None


def help_of(context: typer.Context) -> NoReturn:
    """What a command that has commands answers when it is given none."""
    typer.echo(context.get_help())
    raise typer.Exit(2)


def size(text: str) -> int:
    """Bytes, above 0, as the configuration's sizes are read."""
    try:
        return _core.parse_size(text)
    except _core.DepotError as error:
        raise typer.BadParameter(str(error)) from None


def size_or_zero(text: str) -> int:
    if text.strip() == "0":
        return 0
    try:
        return size(text)
    except typer.BadParameter as error:
        raise typer.BadParameter(f"{error}; 0 is allowed, too") from None


Root = Annotated[str, typer.Argument(metavar="ROOT", help="Directory of a root.", parser=absolute)]
Roots = Annotated[list[str], typer.Argument(metavar="ROOT", help="Directories of roots.", parser=absolute)]
Namespace = Annotated[str, typer.Option("--namespace", metavar="PREFIX", help="First hex digits of a namespace's digest.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def print_json(value: Any) -> None:
    def plain(item: Any) -> Any:
        if isinstance(item, bytes):
            return item.hex()
        raise TypeError(type(item).__name__)

    print(json.dumps(value, default=plain, indent=2))


def once_each(paths: list[str]) -> list[str]:
    """Paths without those that lead to a directory which an earlier one has led to, by whatever name."""
    return list({os.path.realpath(path): path for path in reversed(paths)}.values())[::-1]
