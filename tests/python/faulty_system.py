"""Processes whose C library answers as a bad file system or a wrong clock would: faulty_system.c, preloaded."""

import mmap
import os
import pathlib
import shutil
import struct
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
FIELDS = (
    "hold_opens",
    "hold_reads",
    "hold_writes",
    "write_delay_ms",
    "open_error",
    "read_error",
    "rename_error",
    "hide_newer_s",
    "network",
    "wall_offset_s",
    "opens",
    "hold_journals",
)


class Faults:
    """The page of memory that says what the preloaded library does; all fields of FIELDS, 0 = as the system has it."""

    def __init__(self, path):
        with open(path, "r+b") as file:
            self.__dict__["_page"] = mmap.mmap(file.fileno(), 8 * len(FIELDS))

    def __setattr__(self, name, value):
        struct.pack_into("q", self._page, 8 * FIELDS.index(name), value)

    def __getattr__(self, name):
        return struct.unpack_from("q", self._page, 8 * FIELDS.index(name))[0]


class FaultySystem:
    """Runs functions of test modules in processes of their own, whose files below `root` are subject to `faults`."""

    def __init__(self, directory):
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("no C compiler for the preloaded library")
        self._library = directory / "faulty_system.so"
        source = HERE / "faulty_system.c"
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", self._library, source, "-ldl"], check=True)
        self._control = directory / "control"
        self._control.write_bytes(bytes(8 * len(FIELDS)))
        self.faults = Faults(self._control)

    def run(self, function, root, *arguments, prefix=(), timeout=60):
        """Calls function(faults, root, *arguments), all strings, in a new process; it fails as its assertions do."""
        module = pathlib.Path(sys.modules[function.__module__].__file__)
        code = "import sys, importlib; from faulty_system import Faults; module, name, control = sys.argv[1:4]; "
        code += "getattr(importlib.import_module(module), name)(Faults(control), *sys.argv[4:])"
        environment = {
            **os.environ,
            "LD_PRELOAD": str(self._library),
            "FAULTY_SYSTEM_CONTROL": str(self._control),
            "FAULTY_SYSTEM_BELOW": str(root),
            "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)]),
        }
        done = subprocess.run(
            [*prefix, sys.executable, "-c", code, module.stem, function.__name__, self._control, root, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, f"{function.__name__} ended with {done.returncode}:\n{done.stderr}"
        return done.stdout
