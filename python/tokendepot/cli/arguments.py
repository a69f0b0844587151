"""What several commands take and print alike."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any

import typer

from .. import _core

EXIT_CODES = (
    "Exit codes: 0 all well; 1 something in a root is damaged; 2 wrong usage, no permission, or a path that is not the root "
    "of a depot; 3 the operation could not be done, or was declined."
)


def absolute(path: str) -> str:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise typer.BadParameter("the path is not UTF-8") from None
    return os.path.abspath(path)


def size(text: str) -> int:
    """Bytes, above 0, as the configuration's sizes are read."""
    try:
        return _core.parse_size(text)
    except _core.DepotError as error:
        raise typer.BadParameter(str(error)) from None


def size_or_zero(text: str) -> int:
    return 0 if text.strip() == "0" else size(text)


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
