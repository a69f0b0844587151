"""The command line: `tokendepot stat`, ls, du, verify, scrub, evict, rm, pin, ttl, quota, export, import, doctor, metrics, ...

Exit codes: 0 all well; 1 something in a root is damaged; 2 wrong usage, no permission, or a path that is not the root
of a depot; 3 the operation could not be done (I/O, no space, busy) or was declined.
"""

from __future__ import annotations

import signal
import sys

from .._core import DepotError
from .commands import app
from .show import clean

DAMAGED, USAGE, NOT_DONE = 1, 2, 3
CODE_OF_KIND = {"corrupt": DAMAGED, "invalid_argument": USAGE, "not_found": USAGE, "permission": USAGE, "unsupported": USAGE}


def main() -> None:
    """Runs one command and exits; every failure is one line on stderr, never a traceback."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `tokendepot ls | head` ends as other programs do
    try:
        app()
    except DepotError as error:
        _leave(CODE_OF_KIND.get(error.kind, NOT_DONE), str(error))
    except KeyboardInterrupt:
        _leave(130, "interrupted")
    except Exception as error:
        _leave(NOT_DONE, f"unexpected {type(error).__name__}: {error}")


def _leave(code: int, message: str) -> None:
    print(f"tokendepot: {clean(message)}", file=sys.stderr)
    sys.exit(code)
