"""Runs that were cut off, by whom ever and wherever, and go on: what was measured stays, what was not is measured as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from scripted_server import CLOSE, DONE, ScriptedServer, text_event


def start(url, file, *options):
    command = [sys.executable, "-c", "from tokendepot.cli import main; main()", "bench", "ttft", "--url", url]
    return subprocess.Popen(
        [*command, *options, "--out", str(file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a runner may have it ignored
    )  # fmt: skip


class TakesATenth(ScriptedServer):
    def script(self, body, number):
        return [(0.1, text_event("a") + self.end(body) + DONE)]


class Lingers(TakesATenth):
    """With one answer so long that whoever wants to cut it off is in time."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def script(self, body, number):
        return super().script(body, number) if number != PROBES + self.at - 1 else [(5, text_event("a") + DONE)]


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


def generations(result):
    """(context, repeat) -> the generations of its turns."""
    found = {}
    for record in result["requests"]:
        found.setdefault((record["context"], record["repeat"]), []).append(record["generation"])
    return found


def assert_sound(result, server, replaced):
    """Complete without a failure; those that were `replaced` were sent from turn 1 on with contexts never sent before."""
    assert result["complete"] and result["problems"] == []
    assert all(cell["errors"] == {} and cell["requests"] == 3 for cell in result["summary"]) and len(result["summary"]) == 4
    again = {place for place, found in generations(result).items() if found == [1, 1]}
    assert again == replaced == {(entry["context"], entry["repeat"]) for entry in result["replaced"]}
    assert all(found == [0, 0] for place, found in generations(result).items() if place not in replaced)
    sent = [json.dumps(entry["prompt"]) for entry in server.log() if len(entry["prompt"]) >= 50]
    assert len(set(sent)) == len(sent)  # nothing that the server could know from a request that was cut off


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_what_is_interrupted_in_a_later_turn_begins_anew_and_is_no_failure_of_the_whole(serve, bench, cut_off, by):
    server = serve(Lingers(8))
    file, before = cut_off(server, after=8, by=by)
    assert [record["error"] for record in before["requests"] if "error" in record] == ["interrupted"]
    code, output, result = bench("--resume", file)
    assert code == 0 and "Cut off and begun anew: 1 conversation;" in output
    (entry,) = result["replaced"]
    assert (entry["requests"], entry["why"]) == (2, "interrupted")
    assert_sound(result, server, {(50, 1)})


def test_a_later_turn_in_which_the_client_was_killed_is_not_sent_again_to_a_server_that_knows_it(serve, bench, cut_off):
    server = serve(Lingers(8))
    file, before = cut_off(server, after=8, by=signal.SIGKILL, code=-signal.SIGKILL)
    assert {record["turn"] for record in before["requests"]} == {1}  # what came after was not saved
    code, _, result = bench("--resume", file)
    assert code == 0
    assert_sound(result, server, {(50, 0), (50, 1), (50, 2)})
    assert {entry["why"] for entry in result["replaced"]} == {"killed"}


class Dies(ScriptedServer):
    """Its process ends in the middle of an answer."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def script(self, body, number):
        if number == PROBES + self.at - 1:
            os._exit(1)
        return super().script(body, number)


@pytest.mark.parametrize(("at", "lost"), [(5, {(60, 1), (60, 2)}), (11, {(60, 1), (60, 2)}), (12, {(60, 2)})])
def test_conversations_that_a_dying_server_cut_off_begin_anew(serve, bench, at, lost):
    code, output, before = bench("--url", serve(Dies(at)).url, "--contexts", "50,60")
    assert code == 3 and "no server answers at" in output and "--resume" in output
    assert not before["complete"] and any("error" in record for record in before["requests"])
    server = serve(ScriptedServer())
    code, output, result = bench("--url", server.url, "--resume", bench.file)
    assert code == 0, output
    assert_sound(result, server, lost)
    assert ("the server had gone away before resume 1: later turns of 4 conversations" in output) is (at == 5)


class Fails(Lingers):
    def script(self, body, number):
        return [(0, CLOSE)] if number == PROBES + 1 else super().script(body, number)


def test_a_failure_of_a_server_that_stays_is_not_forgotten_by_going_on(serve, bench, cut_off):
    server = serve(Fails(6))
    file, _ = cut_off(server, after=6)
    code, output, result = bench("--resume", file)
    assert code == 1 and "requests failed" in output
    assert [record["error"] for record in result["requests"] if "error" in record] == ["truncated"]
    assert result["replaced"] == []


# --- another server ---


class Other(TakesATenth):
    version = "scripted"

    def answer(self, path, body):
        return (200, {"version": self.version}) if path == "/version" else super().answer(path, body)


def test_a_run_does_not_go_on_with_another_model(serve, bench, cut_off):
    file, before = cut_off(Lingers(4), after=4)
    other = Other()
    other.model = "larger"
    server = serve(other)
    code, output, result = bench("--url", server.url, "--resume", file)
    assert code == 2 and "serves 'larger', but the run began with 'stub'" in " ".join(output.replace("│", " ").split())
    assert result == before and server.log() == []


def test_a_server_of_another_version_is_noted_and_warned_of(serve, bench, cut_off):
    file, _ = cut_off(Lingers(4), after=4)
    other = Other()
    other.version = "newer"
    code, output, result = bench("--url", serve(other).url, "--resume", file)
    assert code == 0 and "WARNING: the server is not the same since resume 1" in output and "newer" in output
    (change,) = result["server_changes"]
    assert change == {"resume": 1, "version": [{"version": "scripted"}, {"version": "newer"}]}
