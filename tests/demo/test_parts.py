"""The document, the verdict on the rows, and the model directory."""

import dataclasses
import io
import json
import mmap
import os
import subprocess
import time
from pathlib import Path

import pytest
from rich.console import Console

import document
import model
import panels
import report
import server

DEMO = Path(__file__).parents[2] / "scripts/demo"
GOOD = report.Row(
    context=1000, prompt_tokens=1072, cold_s=4.0, restart_cold_s=5.0, restart_warm_s=0.5, loaded_bytes=40_000_000,
    load_s=0.02, cached_tokens=1024, answers_equal=True, warm_answer=" a", cold_answer=" a",
)  # fmt: skip


def test_a_book_is_the_same_every_time_and_no_two_books_share_a_prefix():
    books = [document.day_book(number, 40) for number in range(8)]
    assert books == [document.day_book(number, 40) for number in range(8)]
    openings = {book[:30] for book in books}
    assert len(openings) == len(books)


def test_a_book_is_long_enough_for_its_context():
    for context in (300, 1000, 8000):
        assert len(document.day_book(0, context // 30).split()) >= context


def test_good_rows_have_no_complaint():
    assert report.complaints([GOOD]) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"answers_equal": False, "warm_answer": " b"}, "differs"),
        ({"loaded_bytes": 0}, "nothing was loaded"),
        ({"cached_tokens": 0}, "no cached token"),
        ({"restart_warm_s": 4.0}, "not faster"),
        ({"restart_cold_s": 0.4}, "not faster"),
    ],
)
def test_each_fault_of_a_row_is_a_complaint_that_names_the_context(change, complaint):
    found = report.complaints([GOOD, dataclasses.replace(GOOD, context=2000, **change)])
    assert len(found) == 1
    assert found[0].startswith("context 2000: ")
    assert complaint in found[0]


def test_no_rows_is_a_complaint():
    assert report.complaints([]) == ["no context was measured"]


def test_the_table_shows_every_figure():
    console = Console(width=120)
    with console.capture() as capture:
        console.print(report.table([GOOD, dataclasses.replace(GOOD, answers_equal=False)]))
    text = capture.get()
    for figure in ("1,072", "4.00 s", "5.00 s", "0.50 s", "10.0 x", "1,024 tok", "40.0 MB", "2.00 GB/s", "equal", "DIFFER"):
        assert figure in text


def test_a_half_written_model_is_never_taken_for_a_whole_one(tmp_path):
    target = tmp_path / "m"

    def breaks(directory):
        (directory / "config.json").write_text("{}")
        raise OSError("disk full")

    with pytest.raises(OSError):
        model._once(target, breaks)
    assert not target.exists()
    model._once(target, lambda directory: (directory / "weights").write_text("w"))
    assert [file.name for file in target.iterdir()] == ["weights"]
    model._once(target, breaks)


def test_tensor_names_follow_the_checkpoint_and_unknown_ones_are_refused():
    assert model._checkpoint_name("blk.17.ffn_norm.weight") == "model.layers.17.pre_feedforward_layernorm.weight"
    assert model._checkpoint_name("token_embd.weight") == "model.embed_tokens.weight"
    with pytest.raises(ValueError, match="rope.freqs"):
        model._checkpoint_name("vision.rope.freqs.weight")


def shown(panel, series, value, unit="none", query="q"):
    return panels.Value(panel, "Is it working?", series, value, unit, query)


def printed(values):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(panels.table(values))
    return console.export_text()


def test_a_query_without_data_is_a_complaint_and_a_panel_that_must_have_a_number_has_one():
    values = [shown(name, "a", 0.25, "percentunit") for name in panels.MUST_HAVE[1:]]
    values += [shown("Roots", "", float("nan"))]
    assert panels.complaints(values) == ['the panel "Roots" has no number']
    values += [shown("Roots", "r", 1.0), shown("Damage", "", None, query="tokendepot_x")]
    assert panels.complaints(values) == ['the panel "Damage" has no data for tokendepot_x']


def test_what_only_an_engine_counts_is_not_asked_of_lmcache():
    values = [shown(name, "a", 1.0) for name in panels.MUST_HAVE if name not in ("Hit rate", "Roots")]
    values += [shown("Hit rate", "", None, query="rate(tokendepot_hit_tokens_total[5m])")]
    values += [shown("Roots", "", None, query="tokendepot_root_up")]
    assert panels.complaints(values, prompts=False) == ['the panel "Roots" has no data for tokendepot_root_up']
    assert len(panels.complaints(values)) == 2


def test_panels_are_printed_as_they_would_say_it_and_zeros_give_way():
    text = printed([shown("Hit rate", "all", 0.25, "percentunit"), shown("Hit rate", "idle", 0.0, "percentunit")])
    assert "25 %" in text and "idle" not in text and text.count("Is it working?") == 1
    assert "2,000 tokens/s" in printed([shown("p", "", 2000.0, "suffix: tokens/s")])
    assert "2.1 GB" in printed([shown("p", "", 2.0**31, "bytes")])
    assert "1.5 kB/s" in printed([shown("p", "", 1500.0, "Bps")])
    assert "nothing yet" in printed([shown("p", "", float("nan"))])
    text = printed([shown("p", "there", 2.0), shown("p", "gone", None)])
    assert "there 2, gone no data" in text
    assert "never" in printed([shown("p", "", 0.0, "dateTimeFromNow")])
    assert "90 s ago" in printed([shown("p", "", 1000 * (time.time() - 90), "dateTimeFromNow")])


def test_a_query_may_have_another_unit_than_its_panel():
    (panel,) = (one for one in json.loads(panels.DASHBOARD.read_text())["panels"] if one["title"].startswith("Without a copy"))
    assert [panels.unit_of(panel, letter) for letter in "AB"] == ["bytes", "s"]


def test_every_panel_that_must_have_data_is_on_the_dashboard():
    titles = [panel["title"] for panel in json.loads(panels.DASHBOARD.read_text())["panels"]]
    assert set(panels.MUST_HAVE) <= set(titles)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--frobnicate"], "unknown argument '--frobnicate'"),
        (["--tiny", "--lmcache", "once"], "unknown argument 'once'"),
        (["--lmcache", "--contexts"], "--contexts wants a value"),
    ],
)
def test_an_option_that_is_not_understood_is_refused_before_anything_is_set_up(arguments, complaint, tmp_path):
    environment = {**os.environ, "TOKENDEPOT_VENV": str(tmp_path / "venv")}
    done = subprocess.run([DEMO, *arguments], capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert complaint in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("name", ["psm_td%d", "lmcache_l1_pool_%d"])
def test_shared_memory_that_a_killed_server_would_leave_is_found_while_it_is_mapped(name):
    file = Path("/dev/shm", name % os.getpid())
    file.write_bytes(b"x" * mmap.PAGESIZE)
    try:
        with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0):
            assert file in server.shared_memory_of(os.getpgrp())
        assert file not in server.shared_memory_of(os.getpgrp())
    finally:
        file.unlink()
