"""`tokendepot replay` and `tokendepot plan` as commands: answers, JSON, pictures, refusals in one sentence, Ctrl-C."""

import gzip
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

import tokendepot

TRACES = pathlib.Path(__file__).resolve().parents[1] / "traces"
CONVERSATION = str(TRACES / "conversation_trace.jsonl.gz")
SYNTHETIC = str(TRACES / "synthetic_trace.jsonl.gz")
COMMAND = [sys.executable, "-c", "from tokendepot.cli import main; main()"]
ENVIRONMENT = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}


def run(*arguments, code=0):
    result = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    return result


def run_json(*arguments):
    return json.loads(run(*arguments, "--json").stdout)


def refusal(*arguments):
    text = run(*arguments, code=2).stderr
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.jsonl"
    prompts = [[1, 2, 3], [1, 2, 4], [1, 2, 3], [5], [1, 2, 4]]
    lines = [
        {"timestamp": i * 1000, "input_length": 512 * len(ids), "output_length": 1, "hash_ids": ids}
        for i, ids in enumerate(prompts)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


# --- replay ----------------------------------------------------------------------------------------------------------


def test_replay_reports_the_known_answers():
    found = run_json("replay", SYNTHETIC, "--capacity", "30%", "--model", "llama-3.1-70b")
    assert (found["block_references"], found["unique_blocks"]) == (121_877, 43_924)
    caches = found["caches"]
    assert caches["LRU by block"]["hit_rate"] == pytest.approx(0.488, abs=0.0005)
    assert caches["no bound"]["hit_rate"] == pytest.approx(0.640, abs=0.0005)
    assert 0.3 < caches["depot (model)"]["hit_rate"] < 0.488
    assert caches["no bound"]["written_bytes"] == 43_924 * found["extent_bytes"]


def test_replay_says_what_it_found_in_80_columns(small):
    text = run("replay", small, "--block-bytes", "64KiB", "--capacity", "3MiB").stdout
    assert "mooncake: 5 requests in 4 s, 6,656 tokens" in text
    assert "13 blocks of 512 tokens, 5 different" in text
    assert re.search(r"no bound +61\.5% +61\.5% +100\.0%", text)
    table = text[text.index("Found") :]
    assert max(map(len, table.splitlines())) <= 80


def test_replay_really_stores_and_loads(small, memory_root):
    arguments = ("replay", small, "--block-bytes", "64KiB", "--capacity", "16MiB", "--root", str(memory_root))
    real = run_json(*arguments)["caches"]["depot (real)"]
    assert (real["hit_blocks"], real["failures"]) == (8, {})
    assert real["read_bytes"] == 8 * 69632
    assert real["written_bytes"] == 5 * 69632
    assert real["load_ms"]["p99"] > 0
    assert real["roots"][0]["transport"] == "mapped"
    assert not memory_root.exists()
    text = run(*arguments, "--keep", "--speed", "100").stdout
    assert "every loaded row was its block's own" in text
    assert run_json("stat", str(memory_root))["roots"][0]["extents"] == 5


def test_broken_lines_are_said_and_strict_stops_at_the_first(small):
    with open(small, "a") as file:
        file.write("nonsense\n")
    assert "1 broken line skipped:\n    trace '" in run("replay", small, "--capacity", "3GiB").stdout
    assert run_json("replay", small, "--capacity", "3GiB")["broken_lines"] == 1
    assert "line 6: expected a JSON object" in refusal("replay", small, "--strict")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--capacity", "-5GiB"), "a size greater than 0"),
        (("--capacity", "0%"), "expected a percentage above 0%"),
        (("--capacity", "x%"), "'x%': expected a percentage above 0%"),
        (("--capacity", "4MiB"), "expected at least 201338880, room for 3 segments"),
        (("--model", "llama-9"), "model 'llama-9': expected the path of a config.json or one of"),
        (("--dtype", "int3"), "KV dtype 'int3': expected one of bf16, fp16, fp32, fp8"),
        (("--layers", "33"), "33: expected at most the 32 of llama-3.1-8b"),
        (("--block-bytes", "1000"), "block of 1000 bytes: expected a multiple of 4096"),
        (("--time-unit", "h"), "'h': expected ms or s"),
        (("--chunk-tokens", "100"), "expected a multiple or a divisor of the trace's blocks of 512"),
        (("--speed", "1"), "expected a --root with it"),
        (("--keep",), "expected a --root with it"),
        (("--requests", "0"), "Invalid value for '--requests'"),
        (("--root", "a", "--root", "b"), "expected one for each of the 2 roots, got 1"),
        (("--root", "/proc/x", "--block-bytes", "64KiB", "--capacity", "16MiB"), "root '/proc/x': expected"),
    ],
)
def test_replay_refuses_in_one_sentence(small, arguments, words):
    assert words in refusal("replay", small, *arguments)


@pytest.mark.parametrize("command", ["replay", "plan"])
def test_what_is_no_trace_is_refused_in_one_sentence(command, tmp_path):
    assert "absent': cannot be read: No such file" in refusal(command, "absent")
    empty = tmp_path / "empty"
    empty.touch()
    assert "expected requests, found nothing" in refusal(command, str(empty))
    assert "found none; the first of" in refusal(command, __file__)


# --- plan ------------------------------------------------------------------------------------------------------------


def test_plan_answers_in_json_and_draws(small, tmp_path):
    picture = tmp_path / "out.png"
    arguments = ("--model", "llama-3.1-70b", "--tp", "8", "--gpu-hour", "2", "--memory", "0", "--nvme", "16GiB")
    found = run_json("plan", small, *arguments, "--plot", str(picture))
    assert [target["share"] for target in found["targets"]] == [0.9, 0.95, 0.99, 1.0]
    assert found["ideal_blocks"] == pytest.approx(8 / 13)
    assert found["block_bytes"] == 512 * 327_680
    assert found["dollars_before"] > found["targets"][-1]["dollars"] > 0
    assert any("$2 a GPU-hour" in assumption for assumption in found["assumptions"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_capacity_that_plan_prints_is_one_that_replay_takes(small, tmp_path):
    single = tmp_path / "single.jsonl"
    line = {"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": [1]}
    single.write_text(f"{json.dumps(line)}\n" * 2)
    for trace, is_the_least in ((str(single), True), (small, False)):
        text = run("plan", trace, "--memory", "0", "--nvme", "4GiB").stdout
        printed = re.findall(r"^ *(\d+)% .* ([\d.]+ .iB) \(\d+%\) *$", text, re.MULTILINE)
        assert [share for share, _ in printed] == ["90", "95", "99", "100"]
        for share, capacity in set(printed):
            caches = run_json("replay", trace, "--capacity", capacity)["caches"]
            ideal = caches["no bound"]["token_hit_rate"]
            assert caches["depot (model)"]["token_hit_rate"] >= int(share) / 100 * ideal
        assert ("at least 3 segments, each with room for a block:\nbelow 192.1 MiB there is none" in text) == is_the_least


def test_plan_says_what_it_assumed_in_80_columns(small):
    text = run("plan", small, "--prefill-rate", "9000", "--gpu-hour", "2", "--memory", "0,1GiB", "--nvme", "0,9GiB").stdout
    assert "A cache without a bound finds 61.5% of the tokens (61.5% of the blocks)" in text
    assert "prefill: 9000 tokens/s a GPU at 8,192 tokens, other lengths by their FLOP" in text
    tables = [line for line in text[text.index("Capacity") :].splitlines() if not line.startswith((" " * 2, "Without"))]
    assert max(map(len, tables)) <= 80
    assert "costs: none, because --gpu-hour was not stated" in run("plan", small).stdout


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--plot", "/absent/x.png"), "'/absent/x.png': expected a file in a directory that can be written"),
        (("--gpu-hour", "inf"), "inf: expected a finite number"),
        (("--window", "nan"), "nan"),
        (("--plot", "x.txt"), "expected a name that ends in one of png, svg, pdf"),
        (("--memory", "0,-1GiB"), "a size greater than 0"),
        (("--nvme", "many"), "many"),
        (("--tp", "3"), "tensor-parallel size 3: expected a divisor or a multiple of the 8 KV heads"),
        (("--window", "0"), "Invalid value for '--window'"),
        (("--utilisation", "2"), "Invalid value for '--utilisation'"),
    ],
)
def test_plan_refuses_in_one_sentence(small, arguments, words):
    assert words in refusal("plan", small, *arguments)


def test_without_the_extra_one_sentence_says_how_to_install_it(small, tmp_path):
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError(\"No module named 'numpy'\", name='numpy')\n")
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    for arguments in (("plan", small), ("replay", small, "--root", str(tmp_path / "root"), "--capacity", "1GiB")):
        result = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60, env=environment)
        text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())
        assert result.returncode == 2
        assert "the package numpy is missing; pip install 'tokendepot[bench]' installs it" in text
    models_only = [*COMMAND, "replay", small, "--capacity", "3GiB"]
    assert subprocess.run(models_only, capture_output=True, timeout=60, env=environment).returncode == 0


# --- interruption ----------------------------------------------------------------------------------------------------


def stored(root):
    return len(tokendepot.list_extents(str(root))) if (root / "DEPOT").exists() else 0


@pytest.mark.parametrize(
    "signals",
    [(signal.SIGINT,), (signal.SIGINT, signal.SIGINT), (signal.SIGTERM,), (signal.SIGTERM, signal.SIGINT), (signal.SIGHUP,)],
    ids=lambda signals: "-".join(number.name for number in signals),
)
def test_an_interrupted_replay_prints_what_is_done_and_leaves_nothing_behind(memory_root, signals):
    arguments = ["replay", SYNTHETIC, "--root", str(memory_root), "--block-bytes", "4KiB", "--capacity", "32MiB", "--json"]
    with gzip.open(SYNTHETIC) as trace:
        blocks_of_the_first_request = len(json.loads(trace.readline())["hash_ids"])
    process = subprocess.Popen(
        [*COMMAND, *arguments, "--speed", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    end = time.monotonic() + 60
    while stored(memory_root) <= blocks_of_the_first_request and time.monotonic() < end:
        time.sleep(0.05)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.3)  # the depot settles for a second before it is removed
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    found = json.loads(output)
    assert found["interrupted"] is True
    assert 0 < found["caches"]["depot (real)"]["requests"] < 3993
    assert not memory_root.exists()


def test_a_signal_while_a_replay_removes_its_depot_waits_until_that_is_done(small, memory_root):
    program = (
        "import os, shutil, signal; from unittest import mock; from tokendepot.cli import main\n"
        "real = shutil.rmtree\n"
        "def remove(path, **how): [os.kill(os.getpid(), n) for n in (signal.SIGTERM, signal.SIGINT)]; real(path, **how)\n"
        "with mock.patch('shutil.rmtree', remove): main()"
    )
    arguments = ["replay", small, "--block-bytes", "64KiB", "--capacity", "16MiB", "--root", str(memory_root), "--json"]
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    assert result.returncode == 130, result.stderr
    found = json.loads(result.stdout)
    assert found["interrupted"] is True
    assert found["caches"]["depot (real)"]["requests"] == 5
    assert not memory_root.exists()


def test_a_replay_that_is_interrupted_before_its_first_prompt_says_so(small, memory_root):
    program = (
        "import os, signal; from unittest import mock; from tokendepot.cli import main\n"
        "from tokendepot.bench.real_depot import RealDepot\n"
        "def play(*_): os.kill(os.getpid(), signal.SIGTERM)\n"
        "with mock.patch.object(RealDepot, 'play', play): main()"
    )
    arguments = ["replay", small, "--block-bytes", "64KiB", "--capacity", "16MiB", "--root", str(memory_root)]
    for how in ([], ["--json"]):
        command = [sys.executable, "-c", program, *arguments, *how]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
        assert result.returncode == 130, result.stderr
        assert "unexpected" not in result.stderr
        assert not memory_root.exists()
    assert json.loads(result.stdout)["caches"] == {}


def test_an_interrupted_plan_prints_what_is_done():
    process = subprocess.Popen(
        [*COMMAND, "plan", CONVERSATION, "--tp", "8", "--chunk-tokens", "256", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    for line in process.stderr:
        if line.startswith("planning"):
            break
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    found = json.loads(output)
    assert found["interrupted"] is True
    assert [target["share"] for target in found["targets"]] == [0.9, 0.95, 0.99, 1.0]
    assert found["tiers"] == []


def test_wrong_bytes_and_lost_jobs_have_exit_codes_of_their_own(small, memory_root):
    play = "tokendepot.bench.real_depot.RealDepot.play"
    for error, code in (("tokendepot.bench.real_depot.WrongBytesError('bad')", 1), ("TimeoutError('late')", 3)):
        program = (
            "import tokendepot.bench.real_depot; from unittest import mock; from tokendepot.cli import main\n"
            f"with mock.patch('{play}', side_effect={error}): main()"
        )
        arguments = ["replay", small, "--root", str(memory_root), "--block-bytes", "4KiB", "--capacity", "16MiB"]
        result = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60, env=ENVIRONMENT
        )
        assert result.returncode == code, result.stderr
        assert result.stderr.splitlines()[-1] in ("tokendepot: bad", "tokendepot: late")
        assert not memory_root.exists()
