"""Runs that were cut off, by whom ever and wherever, and go on: what was measured stays, what was not is measured as if nothing had been."""

import json
import signal
import subprocess
import sys
import time

import pytest
from scripted_server import DONE, ScriptedServer, text_event


def start(url, file, *options):
    command = [sys.executable, "-c", "from tokendepot.cli import main; main()", "bench", "ttft", "--url", url]
    return subprocess.Popen(
        [*command, *options, "--out", str(file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a runner may have it ignored
    )  # fmt: skip


class TakesATenth(ScriptedServer):
    def script(self, body, number):
        return [(0.1, text_event("a") + self.end(body) + DONE)]


def wait_for(server, requests):
    until = time.monotonic() + 60
    while len(server.log()) < requests and time.monotonic() < until:
        time.sleep(0.02)


PROBES = 2  # requests that find out how the server counts, before anything is measured


@pytest.fixture
def cut_off(serve, tmp_path):
    """cut_off(server, after=N) -> (file, its content): a run that got a signal while request N (1 is the first) was answered.

    With contexts 50 and 60 and three repeats, requests 1 to 6 are turn 1.
    """

    def run(server, after, by=signal.SIGINT, code=130, options=()):
        running_server = serve(server) if isinstance(server, ScriptedServer) else server
        file = tmp_path / "cut-off.json"
        running = start(running_server.url, file, "--contexts", "50,60", *options)
        wait_for(running_server, PROBES + after)
        running.send_signal(by)
        output, _ = running.communicate(timeout=60)
        assert running.returncode == code, output
        assert "Traceback" not in output
        return file, json.loads(file.read_text())

    return run


def test_an_interrupted_run_shows_what_is_done_and_goes_on_with_the_rest(serve, bench, tmp_path):
    server = serve(TakesATenth())
    file = tmp_path / "r.json"
    running = start(server.url, file, "--contexts", "50,60,70", "--repeats", "6")
    until = time.monotonic() + 60
    while len(server.log()) < 14 and time.monotonic() < until:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 130, output
    assert "interrupted; --resume" in output and "Turn 1 (cold)" in output and "Traceback" not in output
    before = json.loads(file.read_text())
    done = [(r["turn"], r["context"], r["repeat"]) for r in before["requests"]]
    assert 6 <= len(done) < 36 and not before["complete"]

    code, output, result = bench("--url", server.url, "--resume", file)
    assert code == 0, output
    assert result["requests"][: len(done)] == before["requests"]
    everything = [(r["turn"], r["context"], r["repeat"]) for r in result["requests"]]
    assert len(everything) == len(set(everything)) == 36
    cold = [entry["prompt"] for entry in server.log() if len(entry["prompt"]) in (50, 60, 70)]
    assert len({json.dumps(prompt[:4]) for prompt in cold}) == len(cold)  # what was cut off is not sent again as if cold
    sent = len(server.log())
    assert bench("--resume", file)[0] == 0
    assert len(server.log()) == sent  # nothing was left to do


# --- another server ---


class Other(TakesATenth):
    version = "scripted"

    def answer(self, path, body):
        return (200, {"version": self.version}) if path == "/version" else super().answer(path, body)


def test_a_run_does_not_go_on_with_another_model(serve, bench, cut_off):
    file, before = cut_off(TakesATenth(), after=4)
    other = Other()
    other.model = "larger"
    server = serve(other)
    code, output, result = bench("--url", server.url, "--resume", file)
    assert code == 2 and "serves 'larger', but the run began with 'stub'" in " ".join(output.replace("│", " ").split())
    assert result == before and server.log() == []


def test_a_server_of_another_version_is_noted_and_warned_of(serve, bench, cut_off):
    file, _ = cut_off(TakesATenth(), after=4)
    other = Other()
    other.version = "newer"
    code, output, result = bench("--url", serve(other).url, "--resume", file)
    assert code == 0 and "WARNING: the server is not the same since resume 1" in output and "newer" in output
    (change,) = result["server_changes"]
    assert change == {"resume": 1, "version": [{"version": "scripted"}, {"version": "newer"}]}
