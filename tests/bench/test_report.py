"""`tokendepot report`: its numbers are those of the files, nothing in it leaves the page, and what it cannot know it says."""

import html.parser
import json
import re

import pytest
from typer.testing import CliRunner

from tokendepot.bench.ttft import results
from tokendepot.bench.ttft.settings import Settings

# context -> turn -> TTFT of four conversations, seconds. Of the last turn, p50 10.5 and 0.525: 20 times.
BEFORE = {1000: {1: [1.0, 1.0, 1.2, 1.2], 2: [1.1, 1.1, 1.1, 1.1]}, 8000: {1: [8, 8, 8, 8], 2: [10, 10, 11, 11]}}
AFTER = {1000: {1: [1.0, 1.0, 1.2, 1.2], 2: [0.1, 0.1, 0.1, 0.1]}, 8000: {1: [8, 8, 8, 8], 2: [0.5, 0.5, 0.55, 0.6]}}
ANSWER_S, ANSWER_TOKENS = 0.25, 5


def result(times, hit=None, model="m", rate=None, run_id="a" * 16, **settings):
    """A whole result of bench ttft, as if measured one request after the other."""
    made = results.new(
        Settings(
            "http://127.0.0.1:8000", model, "completions", tuple(times), 2, 4, 1, rate, 32, 0, 600.0, 0.0, False, None, None
        ),
        "0.1.0",
    )
    made |= {"run_id": run_id, "complete": True, "started": "2026-11-27T05:00:00+0000", "ended": "2026-11-27T06:00:00+0000"}
    made["settings"] |= settings
    made["server"] = {"version": "0.33.0", "models": [model], "model": model}
    now = 0.0
    for turn in (1, 2):
        for context, turns in times.items():
            begun = now
            for repeat, ttft in enumerate(turns[turn]):
                cached = hit[context] if hit and turn == 2 else 0
                answer = {
                    "sent_s": now, "connect_s": 0.0, "first_byte_s": ttft, "ttft_s": ttft, "ttft_from_schedule_s": ttft,
                    "first_content_s": ttft, "token_s": [ttft, ttft + ANSWER_S], "end_s": ttft + ANSWER_S,
                    "end_from_schedule_s": ttft + ANSWER_S, "prompt_tokens": context, "cached_tokens": cached,
                    "output_tokens": ANSWER_TOKENS, "output_estimated": False, "finish_reason": "stop", "answer": "x",
                    "client_lag_s": 0.0,
                }  # fmt: skip
                place = {"context": context, "repeat": repeat, "turn": turn, "generation": 0, "prompt_sha256": ""}
                asked = {"planned_tokens": None, "common_prefix": None, "common_prefix_of": None, "scheduled_s": now}
                made["requests"].append({**place, **asked, **answer})
                now += ttft + ANSWER_S
            cell = {"context": context, "turn": turn, "wall_s": now - begun}
            made["cells"].append({**cell, "own_cache_tokens": None, "external_cache_tokens": None})
    results.judge(made, None)
    assert made["problems"] == []
    return made


HITS = {1000: 900, 8000: 7600}


@pytest.fixture
def report(tmp_path):
    """report(before, after, ..., *options) -> (exit code, what was printed, the page or None)."""
    count = 0

    def run(*runs, options=(), out=None):
        nonlocal count
        count += 1
        files = []
        for number, one in enumerate(runs):
            file = tmp_path / f"{count}-{number}.json"
            file.write_text(one if isinstance(one, str) else json.dumps(one))
            files.append(str(file))
        page = out or tmp_path / f"page-{count}.html"
        from tokendepot.cli.commands import app

        arguments = ["report", *files, "--out", str(page), *options]
        ended = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})
        if ended.exception is not None and not isinstance(ended.exception, SystemExit):
            raise ended.exception
        return ended.exit_code, ended.output, page.read_text() if page.exists() and out is None else None

    return run


class Page(html.parser.HTMLParser):
    """Rows of cells of each table, all text, and every attribute."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.attributes, self.tags, self.words = [], [], [], []
        self._cell = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = []
        elif tag == "br" and self._cell is not None:
            self._cell.append(" ")

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[-1][-1].append("".join(self._cell).strip())
            self._cell = None

    def handle_data(self, data):
        self.words.append(data)
        if self._cell is not None:
            self._cell.append(data)

    def table(self, heading):
        (found,) = (table for table in self.tables if heading in table[0])
        return found[1:]


def test_the_table_of_first_tokens_has_medians_and_percentiles_of_the_files(report):
    code, output, page = report(result(BEFORE), result(AFTER, HITS, run_id="b" * 16))
    assert code == 0, output
    assert Page(page).table("p50 before") == [
        ["1 (cold)", "1,000", "4 / 4", "1,100", "1,100", "1,200", "1,200", "1x"],
        ["1 (cold)", "8,000", "4 / 4", "8,000", "8,000", "8,000", "8,000", "1x"],
        ["2", "1,000", "4 / 4", "1,100", "100", "1,100", "100", "11x"],
        ["2", "8,000", "4 / 4", "10,500", "525", "11,000", "600", "20x"],
    ]


def test_hits_and_their_rate_are_those_of_the_files(report):
    _, _, page = report(result(BEFORE), result(AFTER, HITS, run_id="b" * 16))
    assert Page(page).table("hit ratio before")[2:] == [
        ["2", "1,000", "0.0%", "90.0%", "9,000"],  # 900 tokens in 0.1 s
        ["2", "8,000", "0.0%", "95.0%", "14,476"],  # 7,600 in 0.525 s
    ]


def test_gpu_seconds_and_costs_are_the_wall_time_of_the_same_requests(report):
    options = ["--gpus", "2", "--gpu-hour", "3.6"]
    _, _, page = report(result(BEFORE), result(AFTER, HITS, run_id="b" * 16), options=options)
    # Turn 2: 4 x 1.1 + 42 + 8 x 0.25 = 48.4 s and 0.4 + 2.15 + 2 = 4.55 s, times 2 GPUs. A GPU-second costs $0.001.
    # 4 x 1,000 + 4 x 8,000 + 8 x 5 = 36,040 tokens: 0.0968 / 0.03604 and 0.0091 / 0.03604 dollars.
    first, second, both = Page(page).table("saved")
    assert first[:2] == ["1", "8 / 8"] and first[4] == "0.0"
    assert second == ["2", "8 / 8", "96.8", "9.1", "87.7", "$2.69", "$0.25"]
    # Turn 1 takes 4.4 + 32 + 2 = 38.4 s in both runs.
    assert both == ["all", "16 / 16", "173.6", "85.9", "87.7", "$2.41", "$1.19"]
    assert "The server has 2 GPUs, at $3.60 each an hour" in page


def test_without_a_price_there_is_no_cost_and_with_a_schedule_no_gpu_time(report):
    _, _, page = report(result(BEFORE), result(AFTER, HITS, run_id="b" * 16))
    assert {row[5] for row in Page(page).table("saved")} == {"not reported"}
    _, _, page = report(result(BEFORE, rate=2.0), result(AFTER, HITS, rate=2.0, run_id="b" * 16), options=["--gpu-hour", "2"])
    assert {cell for row in Page(page).table("saved") for cell in row[2:]} == {"not reported"}


def test_what_a_file_does_not_say_is_not_reported_and_never_0(report):
    before, after = result(BEFORE), result(AFTER, HITS, run_id="b" * 16)
    for run in (before, after):
        for cell in run["summary"]:
            del cell["hit_ratio"], cell["cached_tokens"], cell["ttft_s"]["p99"]
        for record in run["requests"]:
            record["prompt_tokens"] = None
        del run["ended"], run["server"]["version"]
    code, output, page = report(before, after, options=["--gpu-hour", "2"])
    assert code == 0, output
    read = Page(page)
    assert {cell for row in read.table("hit ratio before") for cell in row[2:]} == {"not reported"}
    assert {cell for row in read.table("p50 before") for cell in row[5:7]} == {"not reported"}
    assert {cell for row in read.table("saved") for cell in row[5:]} == {"not reported"}
    assert {row[2] for row in read.table("drift")} == {"not reported"}


def test_failures_and_drift_show_in_the_stability_of_a_run(report):
    after = result(AFTER, HITS, run_id="b" * 16)
    slow = json.loads(json.dumps(after))
    for place in (0, 5):
        slow["requests"][place] = {**{k: slow["requests"][place][k] for k in ("context", "repeat", "turn")}, "error": "timeout"}
        slow["requests"][place]["message"] = "no answer in 600 s"
    results.judge(slow, None)
    code, output, page = report(result(BEFORE), slow)
    assert code == 1 and "2 of 16 requests failed" in output
    row = Page(page).table("drift")[1]
    assert row[3:5] == ["16", "2 timeout: 2"]
    # Cells with four answers: 0.1 each, and 0.5, 0.5 | 0.55, 0.6 over their median 0.525.
    _, _, page = report(result(BEFORE), result({1000: AFTER[1000], 8000: {1: [8] * 4, 2: [1, 1, 3, 3]}}, run_id="b" * 16))
    before, after = (row[5] for row in Page(page).table("drift"))
    # Early halves, over the cell's median: 1/1.1, 1, 1 and 1/2, twice each: their median is (1/1.1 + 1) / 2 = 0.9545.
    # Late halves: 1.2/1.1, 1, 1, 3/2: (1 + 1.2/1.1) / 2 = 1.0455. 1.0455 / 0.9545 = 1.0952.
    assert after == "+9.5%"
    # Before: 1/1.1, 1, 1, 10/10.5 and 1.2/1.1, 1, 1, 11/10.5: medians 0.9762 and 1.0238.
    assert before == "+4.9%"


def test_several_runs_with_the_depot_are_a_window_of_time(report):
    later = json.loads(json.dumps(AFTER))
    slower = {int(c): {int(t): [2 * s if t == "2" else s for s in v] for t, v in turns.items()} for c, turns in later.items()}
    runs = result(BEFORE), result(AFTER, HITS, run_id="b" * 16), result(slower, HITS, run_id="c" * 16)
    code, output, page = report(*runs)
    assert code == 0, output
    assert [row[0] for row in Page(page).table("drift")] == ["before", "after 1", "after 2"]
    assert "Between the 2 runs with the depot, medians of the last turn differ by up to 100.0% at one context." in page
    assert page.count("<svg") == 3


def test_the_engine_s_metrics_give_the_rates_of_loads(report, tmp_path):
    file = tmp_path / "metrics.txt"
    lines = []
    for name, labels, value in (
        ("queried_tokens", "", 40000), ("hit_tokens", "", 30000), ("load_extents", "", 100), ("load_bytes", "", 8e9),
        ("load_seconds", "", 4), ("saved_seconds", "", 12.5), ("carried_bytes", ',path="mapped",operation="load"', 8e9),
    ):  # fmt: skip
        lines += [f"# TYPE tokendepot_{name}_total counter"]
        lines += [f'tokendepot_{name}_total{{engine="{engine}"{labels}}} {value / 2}' for engine in (0, 1)]
    file.write_text("\n".join(lines) + "\n")
    _, _, page = report(result(BEFORE), result(AFTER, HITS, run_id="b" * 16), options=["--metrics", str(file)])
    (table,) = (t for t in Page(page).tables if t and t[0][0].startswith("tokens found in the depot"))
    assert [row[1] for row in table] == ["75.0%", "8.00 GB", "40.0 ms", "2.00 GB/s", "8.00 GB", "12.5"]
    code, output, page = report(result(BEFORE), result(AFTER, HITS, run_id="b" * 16))
    assert "Load rates of the depot itself: not reported" in page
    file.write_text("# TYPE other counter\nother_total 1\n")
    code, output, page = report(result(BEFORE), result(AFTER, run_id="b" * 16), options=["--metrics", str(file)])
    assert code == 2 and "has no counter of a depot" in output and page is None


# --- one file, and safe ---


def test_the_page_refers_to_nothing_outside_itself(report):
    _, _, page = report(result(BEFORE), result(AFTER, HITS, run_id="b" * 16), result(AFTER, run_id="c" * 16))
    read = Page(page)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(read.tags)
    for tag, name, value in read.attributes:
        if name in ("href", "src", "xlink:href", "action", "data", "srcset"):
            assert value.startswith("#"), (tag, name, value)
        assert "http" not in (value or ""), (tag, name, value)
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    assert "@import" not in page
    ids = [value for _, name, value in read.attributes if name == "id"]
    assert len(ids) == len(set(ids))


EVIL = "<script>alert(1)</script>\"'&{{ 7*7 }}$\\frac$"


def test_hostile_text_in_a_result_stays_text(report):
    before, after = result(BEFORE, model=EVIL), result(AFTER, HITS, model=EVIL, run_id=EVIL)
    for run in (before, after):
        run["server"]["version"] = run["started"] = run["ended"] = EVIL
        run["warnings"] = [EVIL]
        run["settings"]["note" + EVIL] = [EVIL]
    after["problems"] = [EVIL]
    after["requests"][0] = {"context": 1000, "repeat": 0, "turn": 1, "error": EVIL, "message": EVIL}
    code, output, page = report(before, after)
    assert code == 1
    read = Page(page)
    assert "script" not in read.tags and "49" not in "".join(re.findall(r"alert.{0,60}", page))
    text = "".join(read.words)
    assert text.count(EVIL) >= 10
    assert not any(EVIL in (value or "") for _, _, value in read.attributes)


# --- runs that cannot be compared, and bad input ---


@pytest.mark.parametrize(
    "after, words",
    [
        (result(AFTER, model="other", run_id="b" * 16), "the model differs: 'other' and 'm' in the base"),
        (result(AFTER, run_id="b" * 16, endpoint="chat"), "endpoint differs: chat and completions in the base"),
        (result(AFTER, run_id="b" * 16, concurrency=8), "concurrency differs: 8 and 1 in the base"),
        (result({500: AFTER[1000]}, run_id="b" * 16), "no context is in both"),
        (result(AFTER), "both are the same run"),
    ],
    ids=["model", "endpoint", "concurrency", "contexts", "same run"],
)
def test_runs_that_measured_something_else_are_refused(report, after, words):
    code, output, page = report(result(BEFORE), after)
    assert code == 2 and words in output and page is None


def test_a_doubtful_run_is_marked_on_the_page_and_in_the_exit_code(report):
    after = result(AFTER, HITS, run_id="b" * 16)
    after["complete"] = False
    del after["cells"][-1], after["summary"][-1]
    after["requests"] = after["requests"][:-4]
    code, output, page = report(result(BEFORE), after)
    assert code == 1 and "this run is not complete" in output
    assert "Not a valid comparison." in page and "8,000 tokens, turn 2: only in the base" in page
    assert Page(page).table("p50 before")[-1][3:] == ["10,500", "not reported", "11,000", "not reported", "not reported"]


def broken(change):
    made = result(AFTER, run_id="b" * 16)
    change(made)
    return made


@pytest.mark.parametrize(
    "after, words",
    [
        ("{", "expected a result of bench ttft"),
        ({"format": "tokendepot bench ttft", "format_version": 2}, "of version 2, expected 1"),
        (broken(lambda r: r.pop("requests")), "the field requests is missing"),
        (broken(lambda r: r["settings"].pop("turns")), "the field settings.turns is missing"),
        (broken(lambda r: r["summary"].clear()), "nothing was measured"),
        (broken(lambda r: r["summary"][1]["ttft_s"].update(median="fast")), "summary[1].ttft_s.median is of another type"),
        (broken(lambda r: r["summary"][0].update(hit_ratio=float("nan"))), "summary[0].hit_ratio is nan"),
        (broken(lambda r: r["requests"][3].pop("ttft_s")), "the field requests[3].ttft_s is missing"),
        (broken(lambda r: r["cells"].append(7)), "cells[4] is no object"),
    ],
)
def test_a_file_that_is_no_whole_result_is_refused_by_its_field(report, after, words):
    code, output, page = report(result(BEFORE), after)
    assert code == 2 and words in output and page is None


def test_a_page_is_never_written_over_and_a_place_that_cannot_be_written_is_named(report, tmp_path):
    there = tmp_path / "there.html"
    there.write_text("mine")
    runs = result(BEFORE), result(AFTER, run_id="b" * 16)
    code, output, _ = report(*runs, out=there)
    assert code == 2 and "which exists" in output and there.read_text() == "mine"
    code, output, _ = report(*runs, out=tmp_path / "no" / "page.html")
    assert code == 3 and "cannot be written (No such file or directory)" in output
    code, output, page = report(*runs, options=["--gpu-hour", "0"])
    assert code == 2 and "--gpu-hour is 0.0" in output and page is None


def test_the_numbers_are_there_for_programs_too(report):
    runs = result(BEFORE), result(AFTER, HITS, run_id="b" * 16)
    code, output, _ = report(*runs, options=["--json", "--gpu-hour", "3.6"])
    numbers = json.loads(output[output.index("{") :])
    assert numbers["cells"][-1]["faster"] == pytest.approx(20.0)
    times = numbers["cells"][-1]
    assert times["p50_seconds"][0] / times["p50_seconds"][1] == pytest.approx(times["faster"])
    assert times.keys() >= {"p99_seconds", "found_tokens_per_second"} and not times.keys() & {"p50", "p99", "found_per_s"}
    assert numbers["usage"][1]["saved_gpu_s"] == pytest.approx(43.85)
    assert numbers["metrics"] is None and numbers["refused"] == []
