"""The machine as the doctor sees it. Everything that is asked of the system goes through here."""

from __future__ import annotations

import ctypes
import errno
import glob
import importlib.metadata
import importlib.util
import mmap
import os
import platform
import re
import resource
import secrets
import subprocess
import time
from contextlib import suppress

from .. import _core

# The numbers of the generic table, which all architectures share from 403 on; Alpha alone has others.
IO_URING_SETUP, IO_URING_ENTER = 425, 426
IO_URING_PARAMS_BYTES = 120
RING_ENTRIES = 17  # as the engine asks for with `io_depth` 16: one more, for waking it up
DRIVER_PATIENCE_S = 20.0  # nvidia-smi takes seconds where the driver is not kept loaded


class Host:
    """Answers of this machine. A method that may fail raises OSError, whose errno says why. Changes nothing; the only file
    that it makes is the scratch file of `smallest_direct_transfer`."""

    def kernel(self) -> tuple[str, str]:
        """("Linux", release)"""
        return platform.system(), platform.release()

    def read_text(self, path: str) -> str | None:
        """The stripped text of a small file; None when it is not there or cannot be read."""
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                return file.read().strip()
        except OSError:
            return None

    def entries(self, directory: str) -> list[str]:
        """Sorted names; none when there is no such directory."""
        try:
            return sorted(os.listdir(directory))
        except OSError:
            return []

    def exists(self, path: str) -> bool:
        return os.path.exists(path)

    def try_io_uring(self) -> None:
        """Sets up a ring as the engine does and enters it with nothing to do; gives it back at once."""
        libc = ctypes.CDLL(None, use_errno=True)
        parameters = ctypes.create_string_buffer(IO_URING_PARAMS_BYTES)
        ring = libc.syscall(ctypes.c_long(IO_URING_SETUP), ctypes.c_uint(RING_ENTRIES), parameters)
        if ring < 0:
            raise _last_error("io_uring_setup")
        try:
            # A filter may let setup pass and refuse this.
            entered = libc.syscall(
                ctypes.c_long(IO_URING_ENTER), ctypes.c_int(ring), ctypes.c_uint(0), ctypes.c_uint(0), ctypes.c_uint(0),
                ctypes.c_void_p(None), ctypes.c_size_t(0),
            )  # fmt: skip
            if entered < 0:
                raise _last_error("io_uring_enter")
        finally:
            os.close(ring)

    def locked_memory(self) -> int | None:
        """Bytes that the process may lock; None = any number."""
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        return None if soft == resource.RLIM_INFINITY else soft

    def memory_limit(self) -> tuple[int, str] | None:
        """Bytes that the control groups of this process allow, and the file that says so; None = what the machine has."""
        return _core.memory_limit()

    def space(self, path: str) -> os.statvfs_result:
        return os.statvfs(path)

    def file_system(self, path: str) -> str:
        """Type of the file system that holds an existing path, as the mount table names it; "" when it does not."""
        real = os.path.realpath(path)
        best, found = -1, ""
        for line in (self.read_text("/proc/self/mountinfo") or "").splitlines():
            before, _, behind = line.partition(" - ")
            # Blanks, tabs, line ends and backslashes are written in octal.
            where = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), before.split()[4])
            inside = where == "/" or real == where or real.startswith(where + "/")
            if inside and len(where) >= best:  # the later of two mounts on one place covers the other
                best, found = len(where), behind.split()[0]
        return found

    def smallest_direct_transfer(self, directory: str, *, may_name: bool) -> int | None:
        """512 to 4096: the smallest transfer that O_DIRECT takes in `directory`, tried with a scratch file; None when it
        refuses all of them. The file has no name; where the file system cannot do that, it has one for a moment, unless
        `may_name` is False: then the error is raised."""
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT
        try:
            fd = os.open(directory, flags | os.O_TMPFILE, 0o600)
        except OSError:
            if not may_name:
                raise
            # Named as the depot names what it is making, so that a root's keeper removes what a kill leaves behind.
            path = os.path.join(directory, f".tmp-{secrets.token_hex(8)}")
            try:
                fd = os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            finally:
                with suppress(FileNotFoundError):  # a refused O_DIRECT may have left a file all the same
                    os.unlink(path)
        try:
            with mmap.mmap(-1, 1 << 14) as memory, memoryview(memory) as view:
                for size in (512, 1024, 2048, 4096):
                    with view[size : 2 * size] as piece:
                        try:
                            if os.pwritev(fd, [piece], size) == size and os.preadv(fd, [piece], size) == size:
                                return size
                        except OSError as error:
                            if error.errno != errno.EINVAL:  # which means: not aligned enough
                                raise
            return None
        finally:
            os.close(fd)

    def nvidia_smi(self) -> list[str] | None:
        """A line a GPU: name, memory, driver. None when there is no nvidia-smi; OSError with its words when it fails."""
        command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=DRIVER_PATIENCE_S)
        except (FileNotFoundError, PermissionError):
            return None
        except subprocess.TimeoutExpired:
            raise OSError(f"nvidia-smi has not answered in {DRIVER_PATIENCE_S:.0f} s") from None
        if "No devices were found" in done.stdout:
            return []
        if done.returncode != 0:
            words = (done.stdout + done.stderr).strip().splitlines() or ["no reason given"]
            raise OSError(f"nvidia-smi failed: {words[0]}")
        return [line.strip() for line in done.stdout.splitlines() if line.strip()]

    def cuda_devices(self) -> list[str] | None:
        """Names of the GPUs by libcuda; None when it cannot be loaded; OSError with its code when it fails."""
        try:
            cuda = ctypes.CDLL("libcuda.so.1")
        except OSError:
            return None
        code = cuda.cuInit(0)
        count = ctypes.c_int()
        if code == 0:
            code = cuda.cuDeviceGetCount(ctypes.byref(count))
        if code != 0:
            raise OSError(f"libcuda answers error {code}")
        names = []
        for index in range(count.value):
            device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
            if cuda.cuDeviceGet(ctypes.byref(device), index) == 0 and cuda.cuDeviceGetName(name, 256, device) == 0:
                names.append(name.value.decode("utf-8", "replace"))
        return names

    def cufile_version(self) -> str | None:
        """Of libcufile.so.0 as the loader finds it, or in a wheel, from where PyTorch loads it for an engine; "" when it does
        not tell; None when there is none."""
        library = None
        for name in ("libcufile.so.0", *self._in_wheels("libcufile.so.0")):
            with suppress(OSError):
                library = ctypes.CDLL(name)
                break
        if library is None:
            return None
        number = ctypes.c_int()
        try:
            # Returns a struct of two ints, which comes back in one register.
            library.cuFileGetVersion.restype = ctypes.c_uint64
            answered = library.cuFileGetVersion(ctypes.byref(number)) == 0
        except AttributeError:
            return ""
        return f"{number.value // 1000}.{number.value % 1000 // 10}" if answered else ""

    def _in_wheels(self, library: str) -> list[str]:
        """Where NVIDIA's wheels have a library: nvidia/<component>/lib."""
        spec = importlib.util.find_spec("nvidia")
        tops = list(spec.submodule_search_locations or ()) if spec else []
        return [path for top in tops for path in sorted(glob.glob(f"{glob.escape(top)}/*/lib/{library}"))]

    def package_version(self, name: str) -> str | None:
        """Of an installed distribution; None when there is none of that name."""
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    def has_module(self, name: str) -> bool:
        return importlib.util.find_spec(name) is not None

    def distributions_of(self, module: str) -> list[str]:
        """Names of the distributions that bring a module."""
        return importlib.metadata.packages_distributions().get(module, [])

    def now(self) -> float:
        """Seconds since 1970."""
        return time.time()


def _last_error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), call)
