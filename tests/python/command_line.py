"""The command line as a process of its own, and damage to the files that it reads."""

import json
import os
import subprocess
import sys


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


def flip_byte(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x40]))
