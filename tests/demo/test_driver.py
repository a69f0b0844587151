"""The demo as a whole against a stub server: what it measures, and that it fails when it must."""

import argparse
import json
import os
import pathlib
import shlex
import sys
import time

import pytest

import driver

STUB = pathlib.Path(__file__).with_name("stub_server.py")


@pytest.fixture
def model(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


@pytest.fixture
def demo(model, tmp_path, monkeypatch, capsys):
    """Runs the demo with a fault of the stub; gives the exit code, the output and demo-out/."""

    def run(fault=""):
        monkeypatch.setenv("STUB_FAULT", fault)
        monkeypatch.setattr(driver.server, "has_gpu", lambda: False)
        monkeypatch.setattr(driver, "QUIET_S", 0.1)
        command = f"{shlex.quote(sys.executable)} {shlex.quote(str(STUB))}"
        out = tmp_path / "out"
        code = driver.main(
            ["--server", command, "--model", str(model), "--contexts", "300,500", "--out", str(out)]
        )
        return code, capsys.readouterr().out, out

    return run


def stub_processes():
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(STUB).encode() in command and int(entry.name) != os.getpid():
                found.append(entry.name)
    return found


def demo_directories():
    return {p for place in ("/dev/shm", "/var/tmp") for p in pathlib.Path(place).glob("tokendepot-demo-*")}


def test_a_good_run_exits_zero_and_writes_rows_and_plot(demo):
    code, output, out = demo()
    assert code == 0, output
    rows = json.loads((out / "ttft.json").read_text())["rows"]
    assert [row["context"] for row in rows] == [300, 500]
    for row in rows:
        assert row["answers_equal"] is True
        assert row["cached_tokens"] >= row["context"]
        assert row["loaded_bytes"] == row["cached_tokens"] * 1000
        assert row["restart_warm_s"] < row["cold_s"]
        assert row["prompt_tokens"] > row["context"]
    assert (out / "ttft.png").read_bytes().startswith(b"\x89PNG")
    assert "equal" in output and "1.00 GB/s" in output


def test_nothing_is_left_behind(demo):
    before = demo_directories()
    demo()
    assert demo_directories() == before
    assert stub_processes() == []


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("warm differs", "the warm answer ' wrong' differs from the cold one ' answered'"),
        ("loads nothing", "nothing was loaded from the depot"),
        ("warm is slow", "is not faster than cold"),
    ],
)
def test_a_bad_result_exits_non_zero_and_says_which(demo, fault, complaint):
    code, output, out = demo(fault)
    assert code == 1
    assert complaint in output
    assert any(complaint in line for line in json.loads((out / "ttft.json").read_text())["complaints"])


def test_a_server_that_ends_is_reported_with_the_end_of_its_log(demo):
    code, output, out = demo("ends at once")
    assert code == 1
    assert "exit code 1" in output and "stub: out of luck" in output
    assert "out of luck" in (out / "server-empty-depot.log").read_text()
    assert not (out / "ttft.json").exists()


def test_an_error_inside_the_stream_fails_the_demo(demo):
    code, output, _ = demo("breaks off")
    assert code == 1
    assert "engine is dead" in output
    assert stub_processes() == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--contexts", "1000,many"], "'1000,many'"),
        (["--contexts", "100"], "expected 300 or more"),
        (["--model", "/nowhere"], "/nowhere"),
    ],
)
def test_a_bad_option_is_refused_by_name(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        driver.main(arguments)
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err


def test_a_context_that_would_take_too_long_is_left_out():
    demo = driver.Demo.__new__(driver.Demo)
    demo.options = argparse.Namespace(since=time.time(), minutes=10)
    demo.start_s = 60.0
    assert demo.fits(8000, None)
    assert demo.fits(2000, (1000, 10.0))
    assert not demo.fits(16000, (1000, 10.0))
    demo.options.since -= 8 * 60
    assert not demo.fits(2000, (1000, 10.0))
