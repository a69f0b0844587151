"""`tokendepot bench io` at toy sizes, on memory and on the disk: what it reports, what it leaves, how it ends."""

import csv
import json
import os
import pathlib
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

import pytest
from command_line import rest_of_terminal
from paged import filled_root

import tokendepot
from tokendepot._core import DepotError, Workload
from tokendepot.bench.io import measure, plan, report
from tokendepot.bench.io import run as io_run

MIB = 1 << 20
TOY = ("--volume", "8MiB", "--seconds", "0.1", "--rounds", "2", "--in-flight", "4", "--size", "256KiB")
COMMAND = [sys.executable, "-c", "from tokendepot.cli import main; main()", "bench", "io"]


def run(*arguments, code=0, **more):
    environment = {**os.environ, "COLUMNS": "80", "PYTHONWARNINGS": "error"}
    result = subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=300, **more
    )
    assert "Traceback" not in result.stderr
    assert result.returncode == code, result.stderr
    return result


def cells(*arguments, **more):
    return json.loads(run(*arguments, "--json", **more).stdout)["cells"]


def toy_plan(root, *, sizes, in_flight, operation="read", processes="1", volume="8MiB"):
    """To be measured from this process."""
    return plan.plan_of(
        [str(root)], device="host", operation=operation, sizes=sizes, in_flight=in_flight, request_extents=1,
        processes=processes, volume=volume, seconds=0.05, rounds=1, verify="off", keep_cache=False, engine="{}",
    )


@pytest.fixture(params=["memory", "disk"])
def place(request):
    """An empty directory on tmpfs and on a disk, which must be empty again at the end."""
    parent = "/dev/shm" if request.param == "memory" else "/var/tmp"
    with tempfile.TemporaryDirectory(prefix="tokendepot-test-", dir=parent) as directory:
        yield pathlib.Path(directory)
        assert os.listdir(directory) == []


@pytest.fixture
def disk():
    with tempfile.TemporaryDirectory(prefix="tokendepot-test-", dir="/var/tmp") as directory:
        kind = subprocess.run(["stat", "-f", "-c", "%T", directory], capture_output=True, text=True).stdout.strip()
        if kind in ("tmpfs", "ramfs"):
            pytest.skip("/var/tmp is a memory file system here")
        yield pathlib.Path(directory)
        assert os.listdir(directory) == []


# --- what it reports ---


def test_each_cell_has_rate_limit_ratio_latency_cost_and_path(place):
    found = cells(place, *TOY, "--op", "read,write,mixed,burst", "--request-extents", "2")
    assert [cell["operation"] for cell in found] == ["read", "write", "mixed", "burst"]
    for cell in found:
        assert cell["gb_per_s"] > 0 and cell["limit_gb_per_s"] > 0 and cell["ratio"] > 0
        assert cell["ops_per_s"] > 0 and cell["cpu_s_per_gb"] > 0
        assert cell["failed"] == 0 and cell["verified"]["wrong"] == 0 and cell["verified"]["extents"] > 0
        assert len(cell["rounds"]) == 2
        path = "mapped" if str(place).startswith("/dev/shm") else "direct"
        for way in ("loaded", "stored"):
            assert set(cell["bytes_by_path"][way]) <= {path}
        for counted in cell["latency"]:
            assert 0 < counted["p50_ms"] <= counted["p99_ms"] <= counted["p99.9_ms"] <= counted["max_ms"]
    burst = found[3]["burst"]
    assert 0 < burst["first_request_s"] <= burst["last_request_s"]


def test_tables_name_source_and_verification(place):
    out = run(place, *TOY, "--op", "read").stdout
    assert "Throughput" in out and "Latency, ms" in out
    assert "limit: " in out and "compared byte by byte (all of the extents), 0 wrong" in out
    assert re.search(r"nothing to deduplicate or compress; made at \d+ GB/s or more$", out, re.MULTILINE)


def test_processes_work_at_the_same_time_each_in_a_depot_of_its_own(place):
    (cell,) = cells(place, *TOY, "--op", "read", "--processes", "2")
    assert cell["processes"] == 2
    assert cell["verified"]["extents"] >= 2 * 32  # the volume of both


def test_processes_burst_together(place):
    (cell,) = cells(place, *TOY, "--op", "burst", "--processes", "2", "--in-flight", "2", "--request-extents", "2")
    burst = cell["burst"]
    assert burst["bursts"] >= 1 and 0 < burst["first_request_s"] <= burst["last_request_s"]
    assert cell["latency"][0]["count"] == 2 * 2 * burst["bursts"]  # requests, of both


def test_a_burst_of_several_processes_is_as_fast_as_its_slowest():
    cell = SimpleNamespace(operation="burst")
    runs = [{"bytes": 10, "seconds": 1.0, "bursts": [(0.2, 1.0)]}, {"bytes": 10, "seconds": 4.0, "bursts": [(0.1, 4.0)]}]
    assert measure._rate(cell, [runs], "bytes") == 5.0
    assert measure._bursts(runs) == [(0.1, 4.0)]
    cell.operation = "read"
    assert measure._rate(cell, [runs], "bytes") == 12.5


def test_results_go_to_a_table_for_programs_and_to_a_picture(place, tmp_path):
    run(place, *TOY, "--size", "64KiB+256KiB", "--op", "mixed", "--in-flight", "16", "--csv", tmp_path / "o.csv", "--plot", tmp_path / "o.png")
    with open(tmp_path / "o.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["latency_operation"], row["latency_bytes"]) for row in rows} == {
        (way, size) for way in ("read", "write") for size in ("65536", "262144")
    }
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_for_programs_has_bytes_by_path_and_cells_in_which_everything_failed(place, tmp_path):
    table = tmp_path / "o.csv"
    result = json.loads(run(place, *TOY, "--op", "read", "--csv", table, "--json").stdout)["cells"][0]
    with open(table, newline="") as file:
        (row,) = csv.DictReader(file)
    moved = {(way, path): count for way, paths in result["bytes_by_path"].items() for path, count in paths.items()}
    assert sum(moved.values()) > 0
    named = {(way, path): int(row[f"{way}_{path}_bytes"]) for way in ("loaded", "stored") for path in report.PATHS}
    assert {key: count for key, count in named.items() if count} == moved
    failed = {**result, "latency": [], "failed": 7, "bytes": 0, "gb_per_s": 0.0, "bytes_by_path": {"loaded": {}, "stored": {}}}
    report.write_csv(str(table), [failed, result])
    with open(table, newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["failed"], first["dropped"], first["loaded_direct_bytes"]) == ("7", "0", "0")
    assert {first[name] for name in ("gb_per_s", "ratio", "latency_count", "latency_p99_ms")} == {""}
    assert second == row


def test_each_root_of_a_command_is_measured_with_extents_of_the_models_shape(disk, tmp_path):
    table = tmp_path / "o.csv"
    with tempfile.TemporaryDirectory(prefix="tokendepot-test-", dir="/dev/shm") as memory:
        shape = ("--model", "llama-3.1-70b", "--tp", "8", "--volume", "20MiB", "--in-flight", "1")
        found = cells(memory, disk, *TOY, *shape, "--op", "read", "--csv", table)
        assert os.listdir(memory) == []
    assert [(cell["root"], cell["source"]) for cell in found] == [(memory, "memory"), (str(disk), "device")]
    layers, planes, heads, elements, of_two_bytes, tokens = 80, 2, 8 // 8, 128, 2, 256
    extent = layers * planes * heads * elements * of_two_bytes * tokens
    for cell in found:
        assert cell["extent_bytes"] == [extent]
        assert [counted["bytes"] for counted in cell["latency"]] == [extent]
        assert cell["bytes"] == extent * cell["latency"][0]["count"] > 0
        assert cell["verified"]["bytes"] == extent * cell["verified"]["extents"] >= 2 * extent  # the volume
        assert cell["failed"] == 0 and cell["verified"]["wrong"] == 0
    with open(table, newline="") as file:
        assert [(row["root"], row["latency_bytes"]) for row in csv.DictReader(file)] == [
            (memory, str(extent)), (str(disk), str(extent)),
        ]


def test_more_keys_of_the_configuration_reach_the_depot(disk):
    (cell,) = cells(disk, *TOY, "--op", "write")
    assert cell["bytes"] > 0 and cell["dropped"] == 0
    # Room for one store of the four in flight: only the depot can drop the others.
    result = run(disk, *TOY, "--op", "write", "--engine", '{"store_queue": "300KiB"}', "--json")
    (cell,) = json.loads(result.stdout)["cells"]
    assert cell["bytes"] > 0 and cell["dropped"] > 0 and "the depot dropped" in result.stderr
    result = run(disk, *TOY, "--op", "write", "--engine", '{"slab": "64KiB"}', code=2)
    assert "slab=65536 is smaller than one extent" in result.stderr.splitlines()[-1]


def test_sizes_come_from_a_models_shape():
    assert plan.sizes_of("", "llama-3.1-70b", "8,1", 256, "bf16") == [(10 * MIB,), (80 * MIB,)]


def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed():
    buckets = measure.Counter({10: 50, 20: 49, 30: 1})
    assert [measure.percentile(buckets, share) for share in (0.5, 0.51, 0.99, 0.999)] == [10, 20, 20, 30]


# --- honest data, media and clients ---


def payloads(root):
    for extent in tokendepot.list_extents(str(root)):
        with open(root / "segments" / f"{extent['segment']}.seg", "rb") as file:
            file.seek(extent["offset"] + plan.PAGE)
            yield file.read(extent["bytes"] - plan.PAGE)


def test_what_is_written_can_be_neither_deduplicated_nor_compressed(disk, tmp_path, monkeypatch, capsys):
    stream = tmp_path / "stream"
    blocks = {512: set(), 4096: set()}
    written = []

    class WatchedFleet(measure.Fleet):
        """Its processes' roots are read when they have ended, before the benchmark removes them."""

        def __exit__(self, *error):
            super().__exit__(*error)
            for root in disk.glob("tokendepot-bench-*/process-*/root"):
                written.append(0)
                for payload in payloads(root):
                    written[-1] += len(payload)
                    with open(stream, "ab") as file:
                        file.write(payload)
                    for size, seen in blocks.items():  # hashes, because the blocks themselves take too much memory
                        seen.update(hash(payload[at : at + size]) for at in range(0, len(payload), size))

    monkeypatch.setattr(measure, "Fleet", WatchedFleet)
    # What one process writes is compared with what the other does, too.
    asked = toy_plan(disk, operation="write", sizes=[(2 * MIB,)], in_flight="2", processes="2", volume="64MiB")
    assert io_run.run(asked, True, "", "") == 0
    (cell,) = json.loads(capsys.readouterr().out)["cells"]
    # Not that it was faster than the storage: it is timed for some milliseconds, which another program may take.
    assert cell["payload_gb_per_s"] > 0
    assert len(written) == 2 and min(written) >= 96 * MIB  # more than the 64 MiB of memory that each stores from
    for size, seen in blocks.items():
        assert len(seen) >= 0.999 * sum(written) / size
    compressed = subprocess.run(["zstd", "-1", "-c", stream], capture_output=True, check=True).stdout
    assert sum(written) / len(compressed) <= 1.01
    stream.unlink()


LARGER = ("--volume", "64MiB", "--size", "1MiB")


@pytest.mark.parametrize("keys", ["", "?transport=direct"])
def test_direct_reads_come_from_the_device_also_by_default(disk, keys):
    document = json.loads(run(f"{disk}{keys}", *TOY, *LARGER, "--op", "read", "--json").stdout)
    (cell,) = document["cells"]
    assert cell["source"] == "device" and cell["device_read_share"] >= 0.99
    assert cell["transport"].startswith("direct") and cell["bytes_by_path"]["loaded"].keys() == {"direct"}
    assert cell["verified"]["bytes"] >= 64 * MIB
    assert not [line for line in document["warnings"] if "page cache" in line or "memory file system" in line]


def test_buffered_reads_come_from_the_device_because_the_cache_is_dropped(disk):
    for _ in range(3):  # on a busy machine the kernel keeps pages that it was asked to drop, which the cell then says
        (cell,) = cells(f"{disk}?transport=buffered", *TOY, *LARGER, "--op", "read")
        if cell["source"] == "device":
            break
    assert cell["source"] == "device" and cell["device_read_share"] >= 0.99
    assert cell["bytes_by_path"]["loaded"].keys() == {"buffered"}


def test_reads_from_the_page_cache_are_labelled_and_warned_about(disk):
    result = run(f"{disk}?transport=buffered", *TOY, *LARGER, "--op", "read", "--keep-cache")
    assert "through the page cache" in result.stderr
    assert "fastest (cached)" in result.stdout and "fastest (device)" not in result.stdout


@pytest.mark.parametrize("keys", ["", "?transport=buffered"])
def test_reads_from_a_memory_file_system_are_labelled_and_warned_about(keys, tmp_path):
    table = tmp_path / "o.csv"
    with tempfile.TemporaryDirectory(prefix="tokendepot-test-", dir="/dev/shm") as directory:
        result = run(f"{directory}{keys}", *TOY, *LARGER, "--op", "read", "--csv", table)
    assert "is a memory file system (tmpfs)" in result.stderr
    assert "fastest (memory)" in result.stdout and "fastest (device)" not in result.stdout
    with open(table, newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["source"] == "memory" and row["transport"].startswith("buffered" if keys else "mapped")


def test_latency_is_told_by_size_class_with_unit_and_span(place):
    mixed = ("--size", "64KiB+2MiB+64MiB", "--volume", "140MiB", "--in-flight", "1,64", "--verify", "off")
    document = json.loads(run(place, *TOY, *mixed, "--seconds", "0.05", "--rounds", "1", "--op", "read", "--json").stdout)
    assert "queue" in document["about"]["latency_spans"] and document["about"]["latency_relative_error"] < 0.01
    assert [cell["in_flight"] for cell in document["cells"]] == [1, 64]
    for cell in document["cells"]:
        # Classes that were mixed up would tell of other bytes than were moved.
        assert sum(counted["count"] * counted["bytes"] for counted in cell["latency"]) == cell["bytes"]
        assert {counted["operation"] for counted in cell["latency"]} == {"read"}
    # 64 loads are sent before the first one ends, and the volume is two extents of each size.
    by_size = document["cells"][1]["latency"]
    assert [counted["bytes"] for counted in by_size] == [64 << 10, 2 * MIB, 64 * MIB]
    for counted in by_size:
        assert counted["count"] >= 2
        assert 0 < counted["p50_ms"] <= counted["p99_ms"] <= counted["p99.9_ms"] <= counted["max_ms"]


def test_the_client_is_the_limit_only_where_no_cpu_is_left(disk, monkeypatch, capsys):
    # One load at a time: the client waits for the disk. What else the machine does counts, too, and is nobody's to
    # foresee, so that the ticks of all CPUs are told here.
    asked = toy_plan(disk, sizes=[(MIB,)], in_flight="1")
    for busy, limit in ((50, False), (95, True)):
        ticks = iter([(0, 0), (busy, 100)])
        monkeypatch.setattr(measure, "_cpu_ticks", lambda ticks=ticks: next(ticks))
        assert io_run.run(asked, True, "", "") == 0
        output = capsys.readouterr()
        (cell,) = json.loads(output.out)["cells"]
        assert cell["cpus"] == len(os.sched_getaffinity(0)) and cell["client_thread_busy_share"] < 0.9
        assert cell["client_is_limit"] == limit and ("CPU is the limit" in output.err) == limit


def test_a_client_without_cpu_to_spare_says_so():
    with tempfile.TemporaryDirectory(prefix="tokendepot-test-", dir="/dev/shm") as directory:
        one = min(os.sched_getaffinity(0))
        result = run(directory, *TOY, "--op", "read", "--seconds", "1", preexec_fn=lambda: os.sched_setaffinity(0, {one}))
    assert "CPU is the limit" in result.stderr and "of 1 CPU" in result.stderr


def test_a_byte_that_flips_between_write_and_read_is_found(place):
    root = place / "own"
    config = {"roots": [{"path": str(root), "capacity": 32 * MIB, "segment": 4 * MIB}], "slab": "64MiB"}
    workload = Workload.open(
        json.dumps(config), kind="read", extent_bytes=[MIB], volume_bytes=8 * MIB, in_flight=2
    )
    workload.fill()
    extent = tokendepot.list_extents(str(root))[3]
    with open(root / "segments" / f"{extent['segment']}.seg", "r+b") as file:
        file.seek(extent["offset"] + extent["bytes"] - 1000)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    # Each run loads at least what is in flight, and goes on where the last one ended: four are a pass.
    found = next(run for run in (workload.run(0.05) for _ in range(4)) if run["failed"])
    assert found["failed"] == 1 and found["failure"] == "corrupt"
    assert workload.verify()["wrong"] == 1
    del workload
    shutil.rmtree(root)


@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
def test_fio_takes_turns_with_ours(disk):
    script = pathlib.Path(__file__).resolve().parents[2] / "bench/fio/compare.py"
    toy = ["--sizes", "256KiB", "--in-flight", "4", "--volume", "8MiB", "--rounds", "1", "--seconds", "0.05"]
    done = subprocess.run([sys.executable, script, *toy, disk], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    named = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert named == [f"fio_{way}_256KiB_4{pages}" for way in ("read", "write") for pages in ("", "_huge")]
    assert re.fullmatch(r"[012] of 2 cells below 0\.95 of fio, .*", done.stdout.splitlines()[-1])
    for least, code, behind in (("1e9", 1, 1), ("1e-9", 0, 0)):
        command = [sys.executable, script, *toy, "--op", "read", "--least", least, disk]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stderr
        assert done.stdout.splitlines()[-1].startswith(f"{behind} of 1 cells below {float(least):g} of fio")
    for least in ("x", "nan", "0", "-1"):
        done = subprocess.run([sys.executable, script, "--least", least, disk], capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert f"'{least}': expected a ratio above 0" in done.stderr


# --- how far it is ---

TWO_CELLS = ("--volume", "8MiB", "--seconds", "0.5", "--rounds", "5", "--in-flight", "1,2", "--size", "256KiB", "--op", "read")


def test_on_a_terminal_a_bar_tells_the_share_that_is_done_and_the_time_left(disk):
    host, terminal = pty.openpty()
    # Wide, because what does not fit a line is cut.
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    child = subprocess.Popen(
        [*COMMAND, str(disk), *TWO_CELLS, "--json"], stdin=terminal, stdout=subprocess.PIPE, stderr=terminal, env=environment
    )
    os.close(terminal)
    drawn = rest_of_terminal(host)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 0 and len(json.loads(out)["cells"]) == 2
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode())
    bars = re.findall(r"(\d) of 2: \S+ host read 256KiB x \d x 1 .{20} +(\d+)% (\d+:\d\d:\d\d|-:--:--)", text)
    shares = [int(share) for _, share, _ in bars]
    assert shares == sorted(shares)
    assert [number for number, _, _ in bars] == sorted(number for number, _, _ in bars)
    assert {number for number, _, _ in bars} == {"1", "2"}
    assert [left for _, share, left in bars if 0 < int(share) < 100 and left != "-:--:--"]


def test_elsewhere_a_line_tells_which_cell_begins(disk):
    lines = run(disk, *TWO_CELLS, "--json").stderr.splitlines()
    told = [f"{number} of 2: {disk} host read 256KiB x {number} x 1" for number in (1, 2)]
    assert lines[:2] == told
    assert all(line.startswith("warning: ") for line in lines[2:])  # of a busy machine; no bar


# --- how it ends ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_prints_what_is_done_and_leaves_nothing_behind(place, number):
    arguments = [str(place), "--volume", "8MiB", "--seconds", "2", "--rounds", "1", "--size", "256KiB", "--in-flight", "1,2,4,8"]
    process = subprocess.Popen([*COMMAND, *arguments, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("2 of 8"):
            break
    time.sleep(0.5)
    (own,) = os.listdir(place)
    assert own.startswith("tokendepot-bench-")
    process.send_signal(number)
    out, words = process.communicate(timeout=120)
    assert process.returncode == 130, words
    document = json.loads(out)
    assert document["interrupted"] is True
    assert 1 <= len(document["cells"]) <= 2 and not document["cells"][0]["interrupted"]
    assert "were measured" in words and "Traceback" not in words
    assert os.listdir(place) == []


def test_output_that_nobody_reads_ends_it_and_leaves_nothing_behind(place):
    arguments = [str(place), "--volume", "8MiB", "--seconds", "1", "--rounds", "1", "--size", "256KiB", "--in-flight", "1,2,4,8"]
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline()
    process.stderr.close()
    assert process.wait(60) != 0
    assert os.listdir(place) == []


def test_a_cell_that_cannot_be_measured_leaves_the_others_results(place, monkeypatch, capsys):
    asked = toy_plan(place, sizes=[(256 << 10,)], in_flight="1,2")
    real = io_run.measure.measure
    known = []

    def measure_once(*arguments):
        if known:
            raise DepotError("no space left")
        known.append(real(*arguments))
        return known[0]

    monkeypatch.setattr(io_run.measure, "measure", measure_once)
    with pytest.raises(DepotError, match="no space left"):
        io_run.run(asked, True, "", "")
    assert len(json.loads(capsys.readouterr().out)["cells"]) == 1
    assert os.listdir(place) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nonexistent"], '"/nonexistent" is not a directory'),
        (["/proc"], '"/proc"'),
        ([".", "--device", "gpu"], '"gpu"'),
        ([".", "--device", "host+host"], "--processes 2"),
        ([".", "--size", "1KiB"], '"1KiB"'),
        ([".", "--size", "5000"], '"5000"'),
        ([".", "--size", "1GiB"], '"1GiB"'),
        ([".", "--size", "big"], '"big"'),
        ([".", "--size", "64KiB,"], "empty items"),
        ([".", "--in-flight", "0"], "--in-flight"),
        ([".", "--in-flight", "many"], '"many"'),
        ([".", "--processes", "0"], "--processes"),
        ([".", "--op", "erase"], '"erase"'),
        ([".", "--op", "burst", "--size", "64KiB+1MiB"], "burst takes one size"),
        ([".", "--op", "read", "--size", "1MiB", "--volume", "64KiB"], "nothing to read"),
        ([".", "--volume", "900TiB"], "free"),
        ([".", "--volume", "some"], '"some"'),
        ([".", "--verify", "maybe"], '"maybe"'),
        ([".", "--engine", "[]"], "--engine"),
        ([".", "--engine", '{"io_dept": 3}'], "io_dept"),
        ([".", "--model", "no-such-model"], "no-such-model"),
        ([".", "--csv", "/nonexistent/out.csv"], "/nonexistent/out.csv"),
        ([".", "--plot", "out.xyz"], "out.xyz"),
        ([".?transport=fast"], "fast"),
        ([".?capacity=1MiB"], "capacity"),
        ([".?read_only=true"], "read_only"),
        ([".?transport=gds&require_gds=true"], "says require_gds=true; expected GPUs in --device, not host"),
        ([".?transport=gds&require_gds=true", "--device", "cuda:0+host", "--processes", "2"], "not host"),
        ([".", "."], "named twice"),
    ],
)
def test_bad_input_is_one_sentence_and_touches_nothing(tmp_path, arguments, words):
    result = run(*arguments, code=2, cwd=tmp_path)
    assert words in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_cannot_be_written_is_refused(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    assert "cannot be written" in run(tmp_path, code=2).stderr


def test_a_device_that_is_not_there_is_one_sentence(place):
    result = run(place, *TOY, "--device", "cuda:200", code=2)
    assert "cuda:200" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("inside", ["", "segments"])
def test_the_root_of_a_depot_is_never_touched(memory_root, inside):
    filled_root(memory_root, chunks=4)
    before = sorted((path, path.stat().st_mtime_ns) for path in memory_root.rglob("*"))
    result = run(memory_root / inside, *TOY, code=2)
    assert "the root of a depot" in result.stderr
    assert sorted((path, path.stat().st_mtime_ns) for path in memory_root.rglob("*")) == before
