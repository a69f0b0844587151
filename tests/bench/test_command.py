"""The command as a whole: results that describe themselves, resumed runs, comparisons and why they are refused, bad input."""

import asyncio
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from scripted_server import DONE, ScriptedServer, text_event, usage_event

from tokendepot.bench.ttft import compare, results

SMALL = ("--contexts", "50,200")


class Slow(ScriptedServer):
    """Time by length; a warm one knows what it has seen before the last restart (here: never restarts)."""

    def __init__(self, warm=False, own_hits=0):
        super().__init__()
        self.warm, self.own_hits, self.own, self.reset = warm, own_hits, 0, 0

    def answer(self, path, body):
        if path == "/reset_prefix_cache":
            self.reset += 1
            return 200, {}
        if path == "/metrics" and self.own_hits is not None:
            return 200, f'vllm:prefix_cache_hits_total{{engine="0"}} {self.own}\n'
        return super().answer(path, body)

    def script(self, body, number):
        count = len(self.tokens(body))
        again = any(entry["prompt"][:50] == body["prompt"][:50] for entry in self.log[:-1])
        self.own += (self.own_hits or 0) if again else 0
        return [(0.001 if again and self.warm else count * 1e-4, text_event("a") + self.end(body)), (count * 1.2e-4, DONE)]


@pytest.fixture
def measured(serve, bench):
    """measured(server, *options) -> the result file of a run against it, which no busy machine makes a bad base."""

    def run(server, *options):
        code, output, _ = bench("--url", serve(server).url, *(options or SMALL))
        assert code == 0, output
        change(bench.file, lambda result: result["client"].update(saturated=False))
        return bench.file

    return run


def change(file, fault):
    result = json.loads(file.read_text())
    fault(result)
    file.write_text(json.dumps(result))


# --- results ---


def test_a_result_describes_itself(serve, bench):
    server = serve(ScriptedServer())
    code, output, result = bench("--url", server.url + "/v1/", *SMALL, "--json")
    assert code == 0
    printed = json.loads(output[output.index("{") :])
    assert printed == result
    assert result["format"] == "tokendepot bench ttft" and result["tokendepot"] and len(result["run_id"]) == 16
    assert result["server"] == {"version": {"version": "scripted"}, "models": [{"id": "stub"}], "model": "stub"}
    assert result["settings"]["contexts"] == [50, 200] and result["clock"]["implementation"]
    assert result["complete"] and result["problems"] == []
    assert [(cell["turn"], cell["context"]) for cell in result["summary"]] == [(1, 50), (1, 200), (2, 50), (2, 200)]


def test_contexts_above_the_server_s_limit_are_skipped_and_said(serve, bench):
    server = ScriptedServer()
    server.limit = 300
    code, output, result = bench("--url", serve(server).url, "--contexts", "50,299,1000")
    assert code == 0
    assert "skipped 1,000 tokens" in output and "the server's limit is 300" in output
    assert [entry["context"] for entry in result["skipped"]] == [299, 1000]  # with answers and questions


class Overflows(ScriptedServer):
    """Tells its limit only in answers."""

    def status(self, body, number):
        return (422, "text/plain") if len(self.tokens(body)) > 100 else super().status(body, number)

    def script(self, body, number):
        if len(self.tokens(body)) <= 100:
            return super().script(body, number)
        return [(0, b"`inputs` tokens + `max_new_tokens` must be <= 100")]


def test_contexts_that_the_server_finds_too_long_are_skipped_said_and_no_failure(serve, bench):
    server = serve(Overflows())
    code, output, result = bench("--url", server.url, "--contexts", "50,200", "--turns", "1")
    assert code == 0, output
    assert "skipped 200 tokens: in turn 1 the server says that it is too long" in output and "Failed requests" not in output
    assert [entry["context"] for entry in result["skipped"]] == [200]
    assert [(cell["context"], cell["errors"]) for cell in result["summary"]] == [(50, {})]
    assert [cell["context"] for cell in result["cells"]] == [50]
    assert len([entry for entry in server.log() if len(entry["prompt"]) == 200]) == 1
    sent = len(server.log())
    assert bench("--resume", bench.file)[0] == 0 and len(server.log()) == sent


def test_a_later_turn_that_is_too_long_leaves_what_was_measured_before(serve, bench):
    code, output, result = bench("--url", serve(Overflows()).url, "--contexts", "50,99")
    assert code == 0, output
    assert "skipped 99 tokens: in turn 2 the server says that it is too long" in output
    assert [(cell["context"], cell["turn"], cell["complete"]) for cell in result["summary"]] == [(50, 1, 3), (99, 1, 3), (50, 2, 3)]


def test_a_run_of_which_all_contexts_are_too_long_measured_nothing(serve, bench):
    code, output, _ = bench("--url", serve(Overflows()).url, "--contexts", "200,300")
    assert code == 1 and "PROBLEM: nothing was measured" in output


def test_percentiles_are_values_that_were_measured():
    values = [float(i) for i in range(1, 101)]
    assert [results.percentile(values, share) for share in (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)] == [1, 10, 50, 90, 99, 100]
    assert results.percentile([7.0], 0.99) == 7.0


def test_progress_is_told_when_a_run_takes_its_time(serve, bench, monkeypatch):
    monkeypatch.setattr("tokendepot.cli.show.PATIENCE_S", 0.0)
    monkeypatch.setattr("tokendepot.cli.show.LINE_EVERY_S", 0.0)
    _, output, _ = bench("--url", serve(ScriptedServer()).url, "--contexts", "50", "--turns", "1")
    assert [f"asking: {done} of 150 tokens" in output for done in (50, 100, 150)] == [True] * 3


# --- going on ---


def start(url, file, *options):
    command = [sys.executable, "-c", "from tokendepot.cli import main; main()", "bench", "ttft", "--url", url]
    return subprocess.Popen(
        [*command, *options, "--out", str(file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


class RefusesLargeBodies(ScriptedServer):
    """As Go's net/http does: answers without reading the body, closes its half, and the rest a moment later."""

    takes_ids = False  # so that /tokenize, too, gets whole contexts

    async def _connection(self, reader, writer):
        read = reader.readuntil

        async def read_head(end):
            head = await read(end)
            size = re.search(rb"(?i)content-length: *(\d+)", head)
            if size is None or int(size[1]) < 200_000:
                return head
            writer.transport.pause_reading()
            writer.write(b"HTTP/1.1 413 -\r\nContent-Length: 9\r\nConnection: close\r\n\r\ntoo large")
            writer.write_eof()
            await asyncio.sleep(0.3)
            raise ConnectionError

        reader.readuntil = read_head
        await super()._connection(reader, writer)


def test_a_server_that_closes_while_a_request_is_sent_does_not_end_the_run(serve, tmp_path):
    file = tmp_path / "r.json"
    running = start(serve(RefusesLargeBodies()).url, file, "--contexts", "50,130000", "--turns", "1", "--repeats", "1")
    output, _ = running.communicate(timeout=120)
    assert running.returncode == 1 and "http_413" in output and "too large" in output, output
    assert [record.get("error") for record in json.loads(file.read_text())["requests"]] == [None, "http_413"]


def test_a_run_whose_words_nobody_reads_ends_as_interrupted_and_keeps_its_result(serve, tmp_path):
    server = ScriptedServer()
    server.limit = 200
    read, write = os.pipe()
    os.close(read)
    file = tmp_path / "r.json"
    command = [sys.executable, "-c", "from tokendepot.cli import main; main()", "bench", "ttft", "--url", serve(server).url]
    ended = subprocess.run([*command, "--contexts", "50,1000", "--out", str(file)], stderr=write, timeout=60, check=False)
    os.close(write)
    assert ended.returncode == 130
    assert json.loads(file.read_text())["skipped"][0]["context"] == 1000


def test_a_run_goes_on_with_its_own_settings_only(measured, bench):
    file = measured(ScriptedServer())
    code, output, _ = bench("--resume", file, "--repeats", "5")
    assert code == 2 and "--repeats is 5" in output and "begun with 3" in output


def test_a_command_between_the_turns_is_run_once_each_and_its_failure_ends_the_run(serve, bench, tmp_path):
    server = serve(ScriptedServer())
    note = tmp_path / "note"
    code, _, result = bench("--url", server.url, *SMALL, "--turns", "3", "--between", f"echo restarted >> {note}")
    assert code == 0 and note.read_text() == 2 * "restarted\n"
    code, output, result = bench("--url", server.url, *SMALL, "--between", "exit 7")
    assert code == 3 and "--between ended with exit code 7" in output
    assert {record["turn"] for record in result["requests"]} == {1}


def test_what_a_command_between_the_turns_prints_is_not_in_the_result_s_document(serve, tmp_path):
    command = [sys.executable, "-m", "tokendepot", "bench", "ttft", "--url", serve(ScriptedServer()).url, "--contexts", "50"]
    command += ["--between", "echo restarted", "--json", "--out", str(tmp_path / "r.json")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["complete"] and "\nrestarted\n" in ended.stderr


# --- comparing ---


def test_a_comparison_has_the_table_of_both_and_draws_it(measured, serve, bench, tmp_path):
    base = measured(Slow())
    plot = tmp_path / "plot.png"
    code, output, result = bench("--url", serve(Slow(warm=True)).url, *SMALL, "--compare", base, "--plot", plot)
    refused = [reason for reason in result["comparison"]["refused"] if "saturated" not in reason]
    assert refused == [] and code in (0, 1)
    assert (code == 0) is result["comparison"]["valid"]
    for column in ("tokens", "ON t1", "ON t2", "OFF t1", "OFF t2", "difference"):
        assert column in output
    rows = result["comparison"]["rows"]
    assert [row["tokens"] for row in rows] == [50, 200]
    assert rows[1]["difference"] == pytest.approx(rows[1]["on"][1]["median"] / rows[1]["off"][1]["median"] - 1)
    assert f"{rows[1]['difference']:+.1%}" in output
    assert plot.read_bytes().startswith(b"\x89PNG")


def refusals_of(on, off):
    return [reason for reason in compare.refusals(on, off) if "saturated" not in reason]


def test_two_good_runs_have_no_refusal_and_each_fault_is_one(measured):
    base = json.loads(measured(ScriptedServer()).read_text())
    good = json.loads(measured(ScriptedServer()).read_text())
    assert refusals_of(good, base) == []
    faults = {
        "the same run": lambda r: r.update(run_id=base["run_id"]),
        "repeats differs: 5 and 3": lambda r: r["settings"].update(repeats=5),
        "concurrency differs": lambda r: r["settings"].update(concurrency=2),
        "cold_gpu differs: True and False": lambda r: r["settings"].update(cold_gpu=True),
        "only this run ran a command between": lambda r: r["settings"].update(between="restart"),
        "the model differs": lambda r: r["server"].update(model="other"),
        "is not complete": lambda r: r.update(complete=False),
        "turn 1 was not cold": lambda r: r.update(problems=["turn 1 was not cold"]),
        "1 of 3 requests failed": lambda r: r["summary"][2].update(errors={"reset": 1}),
        "2 samples, expected 3": lambda r: r["summary"][2].update(complete=2),
        "2 samples and 3 in the base": lambda r: r["summary"][2].update(complete=2),
        "only in the base": lambda r: r["summary"].pop(),
        "counts unknown, this run has no usage": lambda r: r["summary"][1].update(prompt_tokens=None),
        "tokens sent as text, and token ids in the base": lambda r: r["tokens"].update(sent_as="text"),
        "tokens counted by the server's usage, and the server's /tokenize": lambda r: r["tokens"].update(counted_by="the server's usage"),
        "prompts of 51 tokens and 50": lambda r: r["summary"][0].update(prompt_tokens=51),
    }
    for words, fault in faults.items():
        bad = json.loads(json.dumps(good))
        fault(bad)
        assert any(words in reason for reason in compare.refusals(bad, base)), words
    late = json.loads(json.dumps(good))
    late["client"]["saturated"] = True
    assert "the base: client saturated" in compare.refusals(good, late)
    for one in (good, base):  # made to measure by the same tokenizer, which is all that is known
        for cell in one["summary"]:
            cell["prompt_tokens"] = None
    assert refusals_of(good, base) == []


def test_a_base_that_measured_something_else_is_refused_before_anything_is_asked(measured, serve, bench):
    base = measured(ScriptedServer())
    server = serve(ScriptedServer())
    code, output, _ = bench("--url", server.url, *SMALL, "--cold-gpu", "--compare", base)
    assert code == 2 and "cold_gpu differs: True and False in the base" in " ".join(output.replace("│", " ").split())
    assert server.log() == []


@pytest.mark.parametrize(
    ("fault", "options", "words"),
    [
        (lambda r: r.update(complete=False), SMALL, "the base is not complete"),
        (lambda r: r["client"].update(saturated=True), SMALL, "the base: client saturated"),
        (lambda r: r.update(problems=["turn 1 was not cold"]), SMALL, "the base: turn 1 was not cold"),
        (lambda r: r["summary"][2].update(errors={"reset": 1}), SMALL, "the base, 50 tokens, turn 2: 1 of 3 requests failed"),
        (lambda r: r["summary"][2].update(complete=2), SMALL, "the base, 50 tokens, turn 2: 2 samples, expected 3 or more"),
        (lambda r: r["settings"].update(repeats=2), (*SMALL, "--repeats", "2"), "--repeats is 2, expected 3 or more"),
        (lambda r: None, ("--contexts", "50"), "the base has 200 tokens, expected in --contexts"),
        (lambda r: None, ("--contexts", "50,200,300"), "--contexts has 300 tokens, which the base has not"),
    ],
)
def test_a_base_with_which_the_run_could_not_be_compared_is_refused_before_anything_is_asked(
    measured, serve, bench, fault, options, words
):
    base = measured(ScriptedServer())
    change(base, fault)
    server = serve(ScriptedServer())
    code, output, _ = bench("--url", server.url, *options, "--compare", base)
    assert code == 2 and words in " ".join(output.replace("│", " ").split())
    assert server.log() == []


def test_a_context_that_the_base_s_server_had_no_room_for_may_be_asked_for_again(serve, bench):
    limited = ScriptedServer()
    limited.limit = 300
    url = serve(limited).url
    bench("--url", url, "--contexts", "50,1000")
    base = bench.file
    change(base, lambda result: result["client"].update(saturated=False))
    _, _, result = bench("--url", url, "--contexts", "50,1000", "--compare", base)
    assert refusals_of(result, json.loads(base.read_text())) == []


def test_a_refused_comparison_says_so_in_its_exit_code_too(measured, bench):
    base = measured(ScriptedServer(), *SMALL, "--repeats", "2")
    done = measured(ScriptedServer(), *SMALL, "--repeats", "2")
    code, output, result = bench("--resume", done, "--compare", base)
    assert code == 1 and "NOT A VALID COMPARISON: this run, 50 tokens, turn 1: 2 samples, expected 3 or more" in output
    assert result["comparison"]["valid"] is False


@pytest.mark.parametrize(
    ("own_hits", "refusal"),
    [(48, "tokens were in the server's own prefix cache"), (0, None), (None, "counts no hits of its own prefix cache")],
)
def test_a_hit_of_the_server_s_own_cache_is_not_taken_for_the_depot_s(measured, serve, bench, own_hits, refusal):
    base = measured(Slow(own_hits=0), *SMALL, "--cold-gpu")
    server = serve(Slow(warm=True, own_hits=own_hits))
    _, output, result = bench("--url", server.url, *SMALL, "--compare", base, "--cold-gpu")
    assert "own prefix cache was emptied" in output
    found = [reason for reason in result["comparison"]["refused"] if "--cold-gpu" in reason]
    assert (found == []) if refusal is None else all(refusal in reason for reason in found) and found


class Streams(ScriptedServer):
    """16 tokens, of which the first comes alone unless all of them are held back."""

    def __init__(self, buffers=False):
        super().__init__()
        self.buffers = buffers

    def script(self, body, number):
        rest = 15 * text_event("a") + self.end(body) + usage_event(len(self.tokens(body)), 16) + DONE
        return [(0.05, text_event("a") + rest)] if self.buffers else [(0.001, text_event("a")), (0.05, rest)]


def test_a_stream_that_something_buffers_has_no_time_per_token_and_no_valid_comparison(measured, serve, bench):
    base = measured(Streams())
    assert "at once" not in " ".join(json.loads(base.read_text())["warnings"])
    code, output, result = bench("--url", serve(Streams(buffers=True)).url, *SMALL, "--compare", base)
    assert code == 1
    assert "WARNING: all tokens arrived at once in 12 of 12 answers" in output
    assert "this run, 200 tokens, turn 2: all tokens arrived at once in 3 of 3 answers" in output
    assert [cell["time_per_output_token_s"] for cell in result["summary"]] == [None] * 4
    assert [cell["time_between_events_s"] for cell in result["summary"]] == [None] * 4
    assert not any("the base" in reason and "at once" in reason for reason in result["comparison"]["refused"])


# --- bad input ---


class TwoModels(ScriptedServer):
    def answer(self, path, body):
        if path == "/v1/models":
            return 200, {"data": [{"id": "a"}, {"id": "b"}]}
        return super().answer(path, body)


class NoModels(ScriptedServer):
    def answer(self, path, body):
        return (200, {"hello": "world"}) if path == "/v1/models" else super().answer(path, body)


class RefusesKeys(ScriptedServer):
    def answer(self, path, body):
        return 401, {}


class NoCompletions(ScriptedServer):
    def status(self, body, number):
        return 404, "application/json"


@pytest.mark.parametrize(
    ("server", "options", "words"),
    [
        (ScriptedServer, ("--model", "other"), ["--model is 'other'", "serves 'stub'"]),
        (TwoModels, (), ["serves 'a', 'b'", "--model"]),
        (NoModels, (), ["/v1/models", "expected the list of models"]),
        (RefusesKeys, (), ["status 401", "OPENAI_API_KEY"]),
        (NoCompletions, (), ["/v1/completions", "http_404"]),
    ],
)
def test_a_server_that_cannot_be_used_is_named_in_one_sentence(serve, bench, server, options, words):
    code, output, _ = bench("--url", serve(server()).url, *options)
    assert code == 2
    flat = " ".join(output.replace("│", " ").split())
    assert all(word in flat for word in words), flat


def test_a_wrong_path_is_named(serve, bench):
    code, output, _ = bench("--url", serve(ScriptedServer()).url + "/nowhere")
    assert code == 2 and "/nowhere/v1/models: status 404" in " ".join(output.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--url", "http://127.0.0.1:9"), "no server answers at http://127.0.0.1:9"),
        (("--url", "127.0.0.1:8000"), "--url is '127.0.0.1:8000', expected http://"),
        (("--url", "http://[::1"), "--url is 'http://[::1', expected http://"),
        (("--url", "http://127.0.0.1:port"), "--url is 'http://127.0.0.1:port', expected http://"),
        ((), "--url is missing"),
        (("--contexts", "1000,many"), "--contexts is '1000,many'"),
        (("--contexts", "1000,50"), "expected ascending"),
        (("--turns", "0"), "--turns is 0, expected 1 or more"),
        (("--rate", "0"), "--rate is 0.0"),
        (("--endpoint", "embeddings"), "--endpoint is 'embeddings'"),
        (("--max-error-rate", "2"), "--max-error-rate is 2.0"),
        (("--timeout", "0"), "--timeout is 0.0"),
        (("--timeout", "nan"), "--timeout is nan"),
        (("--rate", "nan"), "--rate is nan"),
        (("--rate", "inf"), "--rate is inf"),
        (("--plot", "x.xyz"), "--plot is 'x.xyz', expected a name that ends in one of png"),
        (("--compare", "/nowhere.json"), "--compare is '/nowhere.json', which cannot be read"),
        (("--resume", "/nowhere.json"), "--resume is '/nowhere.json', which cannot be read"),
        (("--plot", "/nowhere/x.png"), "--plot is '/nowhere/x.png'"),
        (("--tokenizer", "/nowhere"), "--tokenizer is '/nowhere'"),
    ],
)
def test_a_bad_option_is_refused_by_name(serve, bench, options, words):
    if options and options[0] not in ("--url",):
        options = ("--url", serve(ScriptedServer()).url, *options)
    if "--tokenizer" in options:
        pytest.importorskip("tokenizers")
    code, output, _ = bench(*options)
    flat = " ".join(output.replace("│", " ").split())
    assert code == 2 and words in flat, flat
    assert "Traceback" not in output


def test_a_file_that_is_no_result_is_refused(serve, bench, tmp_path):
    url = serve(ScriptedServer()).url
    named = '{"format": "tokendepot bench ttft", "format_version": %d}'
    for option, content, words in (
        ("--compare", "{}", "expected a result"),
        ("--compare", "no json", "expected a result"),
        ("--compare", named % 9, "of version 9"),
        ("--compare", named % 1, "expected the whole result of a run"),
        ("--resume", named % 1, "settings are not those of a run"),
    ):
        file = tmp_path / "x.json"
        file.write_text(content)
        code, output, _ = bench("--url", url, option, file)
        assert code == 2 and words in " ".join(output.replace("│", " ").split())


def test_a_result_is_never_written_over(measured, bench):
    file = measured(ScriptedServer())
    before = file.read_bytes()
    code, output, _ = bench("--url", "http://127.0.0.1:9", out=file)
    assert code == 2 and "which exists" in output
    assert file.read_bytes() == before


def test_a_full_disk_leaves_the_result_of_the_last_cell(tmp_path, monkeypatch):
    file = tmp_path / "r.json"
    results.save({"cells": 1}, file)

    def full(self, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(results.NotWritten, match="No space left on device"):
        results.save({"cells": 2}, file)
    assert json.loads(file.read_text()) == {"cells": 1} and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("written", [0, 1, 2, 5, 9])  # before the first cell, in it, after it, in turn 2, at the very end
def test_a_disk_that_fills_up_ends_the_run_with_what_was_measured_and_it_goes_on(serve, bench, monkeypatch, written):
    server = serve(ScriptedServer())
    real, count = pathlib.Path.write_text, 0

    def fills_up(self, text):
        nonlocal count
        count += 1
        if count > written:
            raise OSError(28, "No space left on device")
        return real(self, text)

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.write_text", fills_up)
        code, output, result = bench("--url", server.url, *SMALL)
    assert "No space left on device" in output and "Traceback" not in output
    if written == 0:
        assert code == 2 and "--out" in output and result is None
        return
    assert code == 3 and f"--resume {bench.file}" in output
    assert ("Turn 1 (cold)" in output) is (written > 1)
    assert not result["complete"]
    code, output, result = bench("--resume", bench.file)
    assert code == 0 and result["complete"], output
    sent = [json.dumps(entry["prompt"]) for entry in server.log() if len(entry["prompt"]) >= 50]
    assert len(set(sent)) == len(sent)


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_plot_that_cannot_be_written_takes_nothing_of_the_result(serve, bench, monkeypatch, tmp_path, options):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tokendepot.bench.ttft.plot.draw", full)
    plot = tmp_path / "x.png"
    code, output, result = bench("--url", serve(ScriptedServer()).url, *SMALL, "--plot", plot, *options)
    assert code == 3 and f"--plot is {str(plot)!r}, which cannot be written (No space left on device)" in output
    assert result["complete"] and (options or ("Turn 2" in output and f"Wrote {bench.file}\n" in output))


def test_a_directory_in_the_plot_s_place_is_told_before_anything_is_asked(serve, bench, tmp_path):
    server = serve(ScriptedServer())
    (tmp_path / "dir.png").mkdir()
    code, output, _ = bench("--url", server.url, *SMALL, "--plot", tmp_path / "dir.png")
    assert code == 2 and "which is a directory" in " ".join(output.replace("│", " ").split())
    assert server.log() == []


# --- what is imported ---


def python(code):
    environment = {**os.environ, "COLUMNS": "160"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)


def test_other_commands_import_nothing_of_the_benchmarks():
    wanted = "[m for m in ('matplotlib', 'httpx', 'h11', 'asyncio') if m in sys.modules]"
    assert python(f"import sys; from tokendepot.cli.commands import app; print({wanted})").stdout == "[]\n"


@pytest.mark.parametrize("package", ["httpx", "h11", "matplotlib", "prometheus_client"])
def test_a_missing_package_is_one_sentence_how_to_install_it(package):
    code = f"import sys; sys.modules['{package}'] = None; sys.argv[1:] = 'bench ttft --url http://x --plot x.png'.split()"
    ended = python(code + "; from tokendepot.cli import main; main()")
    assert ended.returncode == 2
    assert f"package {package}" in ended.stderr and "pip install 'tokendepot[bench]'" in ended.stderr
    assert "Traceback" not in ended.stderr
