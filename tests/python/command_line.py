"""The command line as a process of its own, and damage to the files that it reads."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys

import pytest


def run(*arguments, **more):
    command = [sys.executable, "-c", "from tokendepot.cli import main; main()", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "80", "PYTHONWARNINGS": "error"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, **more)
    assert "Traceback" not in result.stderr
    if "--json" not in arguments:
        too_long = [line for line in result.stdout.splitlines() if len(line) > 80 and "/tokendepot-test" not in line]
        assert too_long == []
    return result


def run_json(*arguments, code=0):
    result = run(*arguments, "--json")
    assert result.returncode == code, result.stderr
    return json.loads(result.stdout)


def rest_of_terminal(host):
    """What is drawn until the last other end of the pseudo-terminal is closed; closes it."""
    drawn = b""
    with open(host, "rb", buffering=0) as terminal:
        try:
            while piece := terminal.read(65536):
                drawn += piece
        except OSError:  # the last end is closed
            pass
    return drawn


def flip_byte(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x40]))


class Called:
    def __init__(self, returncode, stdout, stderr):
        self.returncode, self.stdout, self.stderr = returncode, stdout, stderr


def call(*arguments):
    """The same in this process, which saves a start of Python: for what neither reads stdin nor writes bytes."""
    from tokendepot.cli import main

    out, err = io.StringIO(), io.StringIO()
    before, pipe = sys.argv, signal.getsignal(signal.SIGPIPE)
    sys.argv = ["tokendepot", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
            main()
            raise SystemExit(0)
    finally:
        sys.argv = before
        signal.signal(signal.SIGPIPE, pipe)
    return Called(end.value.code or 0, out.getvalue(), err.getvalue())


def call_json(*arguments, code=0):
    result = call(*arguments, "--json")
    assert result.returncode == code, (result.stdout, result.stderr)
    return json.loads(result.stdout)


def call_as_nobody(*arguments):
    """Exit code and stderr of a command without the rights of root. Skips where that cannot be had."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    reader, writer = os.pipe()
    child = os.fork()  # not exec: the interpreter may lie where only root can read
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            result = call(*arguments)
            os.write(writer, json.dumps([result.returncode, result.stderr]).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as answer:
        code, stderr = json.load(answer)
    os.waitpid(child, 0)
    return code, stderr
