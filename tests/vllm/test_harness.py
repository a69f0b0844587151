"""The connector with the real scheduler of every vLLM release that can be had.

TOKENDEPOT_VLLM_VERSIONS names a directory that scripts/fetch-vllm-python filled: one sub-directory a release. Without
it only the installed vLLM is tested. Each release runs all cases of cases_*.py in a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CASES = [
    name
    for file in sorted(HERE.glob("cases_*.py"))
    for name in re.findall(r"^@case\ndef (\w+)", file.read_text(), re.MULTILINE)
]
MEMORY = Path("/dev/shm")
AT_ONCE = min(4, (os.cpu_count() or 1) + 1)  # the cases wait for about half of their time
LIMIT_S = 900


def releases() -> list[str]:
    """Names of the release directories, oldest first; the newest runs on a disk root too."""
    directory = os.environ.get("TOKENDEPOT_VLLM_VERSIONS")
    if not directory:
        return ["installed", "installed-disk"]
    found = [entry.name for entry in Path(directory).iterdir() if re.fullmatch(r"\d+\.\d+\.\d+", entry.name)]
    found.sort(key=lambda name: [int(part) for part in name.split(".")])
    assert found, f"{directory} holds no release"
    return [*found, f"{found[-1]}-disk"]


def run_release(release: str, model: str, scratch: Path) -> dict[str, dict]:
    version, _, disk = release.partition("-")
    work = scratch / release
    work.mkdir()
    roots = work if disk or not os.access(MEMORY, os.W_OK) else MEMORY / f"tokendepot-{os.getpid()}-{release}"
    roots.mkdir(exist_ok=True)
    environment = dict(os.environ, VLLM_TARGET_DEVICE="cpu")
    if version != "installed":
        # vLLM remembers what it found out about a model's class, which takes it longer than all cases together.
        environment["VLLM_CACHE_ROOT"] = str(
            Path(os.environ["TOKENDEPOT_VLLM_VERSIONS"], ".cache", version).absolute()
        )
        first = str(Path(os.environ["TOKENDEPOT_VLLM_VERSIONS"], version))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (environment.get("PYTHONPATH"), first)))
    log, results = work / "log", work / "results.jsonl"
    try:
        with open(log, "w") as out:
            subprocess.run(
                [sys.executable, str(HERE / "cases.py"), model, str(roots), str(results)],
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=LIMIT_S,
                check=False,
            )
        found = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    except subprocess.TimeoutExpired:
        found = []
    finally:
        if roots != work:
            shutil.rmtree(roots, ignore_errors=True)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
    reported = {result["case"]: result for result in found}
    return {
        case: reported.get(case, {"ok": False, "detail": f"was not reported; the log ends with\n{tail}"})
        for case in CASES
    }


@pytest.fixture(scope="session")
def outcome(tmp_path_factory):
    """release -> its results; all releases run from the start, a few at a time."""
    from tiny_model import write_configuration

    scratch = tmp_path_factory.mktemp("harness")
    model = write_configuration(scratch / "model")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        running: dict[str, Future] = {
            release: pool.submit(run_release, release, model, scratch) for release in releases()
        }
        yield lambda release: running[release].result()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("release", releases())
def test_release(release: str, case: str, outcome) -> None:
    result = outcome(release)[case]
    assert result["ok"], result["detail"]
    if result["skipped"]:
        pytest.skip(result["skipped"])
