"""One client process of a cell: obeys one JSON line after the other on stdin and answers each on stdout."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from ..._core import DepotError, Workload


def main() -> None:
    workload: Workload | None = None
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not look like an answer
    for line in sys.stdin:
        order = json.loads(line)
        arguments = order["arguments"]
        answer: dict[str, Any]
        try:
            if order["call"] == "open":
                workload = Workload.open(arguments.pop("config"), **arguments)
                answer = {"result": workload.about()}
            else:
                answer = {"result": getattr(workload, order["call"])(**arguments)}
        except DepotError as error:
            answer = {"error": str(error), "kind": error.kind}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # whoever sent it does not wait for an answer
        sys.exit(130)
