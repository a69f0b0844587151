"""Small JSON files in a root, which somebody else may have written."""

from __future__ import annotations

import json
import os
import stat
from typing import Any

MOST_BYTES = 1 << 20  # as much as the engine reads of a manifest


def read_json(path: str | os.PathLike[str], *, own: bool = False, most_bytes: int = MOST_BYTES) -> Any:
    """Follows no link, waits for no pipe, and takes no more memory than such a file needs. With `own` the file must be of this
    user, and nobody else may be able to write to it. OSError, or ValueError for what is not such a file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is no file")
        if own and (status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
            raise ValueError(f"{path} may be somebody else's")
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"{path} is longer than {most_bytes} bytes")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
