import contextlib
import json
import pathlib
import sys

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import scripted_server


@pytest.fixture
def serve():
    """serve(a ScriptedServer) -> it runs; .url and .log()."""
    with contextlib.ExitStack() as stack:
        yield lambda server: stack.enter_context(scripted_server.running(server))


@pytest.fixture
def bench(tmp_path):
    """bench("--url", ...) -> (exit code, everything printed, the result file's content or None)."""
    from tokendepot.cli.commands import app

    count = 0

    def run(*arguments, out=None):
        nonlocal count
        count += 1
        file = out or tmp_path / f"result-{count}.json"
        options = [] if "--resume" in arguments else ["--out", str(file)]
        if "--resume" in arguments:
            file = pathlib.Path(arguments[arguments.index("--resume") + 1])
        ended = CliRunner().invoke(app, ["bench", "ttft", *map(str, arguments), *options], env={"COLUMNS": "160"})
        if ended.exception is not None and not isinstance(ended.exception, SystemExit):
            raise ended.exception
        result = json.loads(file.read_text()) if file.exists() else None
        run.file = file
        return ended.exit_code, ended.output, result

    return run
