"""The command line: `tokendepot stat`, ls, du, verify, scrub, evict, rm, pin, ttl, quota, export, import, doctor, metrics, ...

Exit codes: 0 all well; 1 something in a root is damaged; 2 wrong usage, no permission, or a path that is not the root
of a depot; 3 the operation could not be done (I/O, no space, busy) or was declined.
"""

from __future__ import annotations

import signal
import sys
from typing import Any

import typer

from .._core import DepotError
from .commands import app
from .show import clean

DAMAGED, USAGE, NOT_DONE = 1, 2, 3
# What click, which typer depends on or carries, raises for everything wrong on a command line; typer gives it no name.
USAGE_ERROR: Any = typer.BadParameter.__base__
CODE_OF_KIND = {"corrupt": DAMAGED, "invalid_argument": USAGE, "not_found": USAGE, "permission": USAGE, "unsupported": USAGE}


def main() -> None:
    """Runs one command and exits; every failure is one line on stderr, never a traceback."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `tokendepot ls | head` ends as other programs do
    try:
        code = app(prog_name="tokendepot", standalone_mode=False)
    except USAGE_ERROR as error:
        _leave(USAGE, _refusal(error))
    except typer.Abort as error:
        _leave(*((130, "interrupted") if isinstance(error.__cause__, KeyboardInterrupt) else (NOT_DONE, "declined")))
    except DepotError as error:
        _leave(CODE_OF_KIND.get(error.kind, NOT_DONE), str(error))
    except KeyboardInterrupt:
        _leave(130, "interrupted")
    except Exception as error:
        _leave(NOT_DONE, f"unexpected {type(error).__name__}: {error}")
    sys.exit(code if isinstance(code, int) else 0)


def _refusal(error: Any) -> str:
    """One sentence. Newer typer checks numbers with pydantic, which says what was expected but not what was given."""
    checked = getattr(error.__cause__, "errors", None)
    if checked is not None:
        first = checked()[0]
        said = first["msg"].removeprefix("Value error, ").partition(", unable")[0]
        expected = said.replace("Input should be", "expected")
        error.message = expected if repr(first["input"]) in expected else f"{first['input']!r}, {expected}"
    return " ".join(error.format_message().split()).removesuffix(".")


def _leave(code: int, message: str) -> None:
    print(f"tokendepot: {clean(message)}", file=sys.stderr)
    sys.exit(code)
