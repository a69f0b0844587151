"""What the doctor says: one line each."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

OK, FALLBACK, PROBLEM = "ok", "fallback", "problem"


@dataclass(frozen=True)
class Finding:
    """`state`: ok; fallback (a depot works, by a slower or smaller way); problem (it does not work as wanted). `fix` is
    one sentence, empty where there is nothing to be done."""

    name: str
    value: str
    state: str = OK
    fix: str = ""


def reason(error: OSError) -> str:
    """`EPERM (Operation not permitted)`"""
    if error.errno is None:
        return str(error)
    return f"{errno.errorcode.get(error.errno, f'errno {error.errno}')} ({os.strerror(error.errno)})"
