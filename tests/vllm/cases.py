"""Runs the cases of one vLLM release in this process: cases.py MODEL SCRATCH RESULTS [NAME ...]

RESULTS gets one JSON object a line: {"case": ..., "ok": ..., "detail": ..., "skipped": ..., "seconds": ...}.
test_harness.py runs this for every release and turns each line into a test.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from pathlib import Path

from tokendepot.engines.vllm import versions

import cases_events  # noqa: F401  (importing a module registers its cases)
import cases_faults  # noqa: F401
import cases_identity  # noqa: F401
import cases_scheduling  # noqa: F401
import cases_text  # noqa: F401
from lab import CASES, Lab, Skipped, lines


def main() -> int:
    model, scratch, results, *names = sys.argv[1:]
    versions.log = logging.Logger(
        "tokendepot", logging.INFO
    )  # vLLM takes the handlers off its own loggers now and then
    versions.log.addHandler(lines)
    lab = Lab(model, Path(scratch))
    with open(results, "w", encoding="utf-8") as out:
        for name in names or CASES:
            started, detail, skipped = time.monotonic(), "", ""
            lab.begin()
            try:
                CASES[name](lab)
            except Skipped as reason:
                skipped = str(reason)
            except BaseException:  # whatever it was, it belongs into the report of this case
                detail = traceback.format_exc() + "\n".join(
                    f"{level} {line}" for level, line in lines.all[-20:]
                )
            lab.end()
            print(
                json.dumps(
                    {
                        "case": name,
                        "ok": not detail,
                        "detail": detail,
                        "skipped": skipped,
                        "seconds": round(time.monotonic() - started, 2),
                    }
                ),
                file=out,
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
