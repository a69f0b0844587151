"""`tokendepot top`: rates between two readings of an engine's metrics, roots as they are, and engines that restart."""

import http.server
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time

import pytest
from command_line import rest_of_terminal
from paged import MANIFEST, Cache, config, filled_root, keys_of, store

import tokendepot
from tokendepot import Depot, live
from tokendepot.cli.top import Screen

COMMAND = [sys.executable, "-c", "from tokendepot.cli import main; main()", "top"]
OTHER_SCREEN, OWN_SCREEN, ROOT_COLUMN = b"\x1b[?1049h", b"\x1b[?1049l", b"root"


def test_in_a_terminal_it_draws_anew_until_it_is_interrupted_and_gives_the_screen_back(memory_root):
    filled_root(memory_root, chunks=2)
    host, terminal = pty.openpty()
    child = subprocess.Popen([*COMMAND, str(memory_root), "--every", "0.2"], stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    drawn, end = b"", time.monotonic() + 60
    while drawn.count(ROOT_COLUMN) < 3 and time.monotonic() < end:
        if select.select([host], [], [], 1.0)[0]:
            drawn += os.read(host, 65536)
    assert drawn.count(ROOT_COLUMN) >= 3 and OTHER_SCREEN in drawn
    child.send_signal(signal.SIGINT)
    drawn += rest_of_terminal(host)
    assert child.wait(timeout=60) == 130
    assert drawn.rindex(OWN_SCREEN) > drawn.rindex(OTHER_SCREEN) and b"Traceback" not in drawn


class Engine:
    """A metrics endpoint that says what it is told to; None: it does not answer."""

    def __init__(self):
        self.answers = []
        engine = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                text = engine.answers.pop(0) if len(engine.answers) > 1 else engine.answers[0]
                self.send_response(200 if text is not None else 503)
                self.end_headers()
                self.wfile.write((text or "").encode())

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/metrics"

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def engine():
    one = Engine()
    yield one
    one.close()


def said(root="00000000", **counters):
    """Metrics of an engine as text."""
    values = dict.fromkeys(("queried_tokens", "hit_tokens", "load_bytes", "store_bytes", "saved_seconds"), 0) | counters
    lines = []
    for name, value in values.items():
        lines.append(f'# TYPE tokendepot_{name} counter\ntokendepot_{name}_total{{engine="0"}} {value}')
    lines.append(
        "# TYPE tokendepot_missed_tokens counter\n"
        f'tokendepot_missed_tokens_total{{cause="evicted"}} {values["load_bytes"]}'
    )
    lines.append(
        "# TYPE tokendepot_root_moved_bytes counter\n"
        f'tokendepot_root_moved_bytes_total{{root="{root}",operation="load"}} {values["load_bytes"]}'
    )
    lines.append(
        "# TYPE tokendepot_load_latency_seconds histogram\n"
        f'tokendepot_load_latency_seconds_bucket{{le="+Inf"}} {values["load_bytes"]}\n'
        f'tokendepot_load_latency_seconds_count {values["load_bytes"]}\n'
        f'tokendepot_load_latency_seconds_sum {values["load_bytes"] * 2}'
    )
    return "\n".join(lines) + "\n"


def run(*arguments):
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
    return done


def shown(*arguments):
    done = run(*arguments, "--once", "--json", "--every", 0.2)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_an_endpoint_does_not_count_is_not_known():
    name = ("tokendepot_load_bytes_total", ())
    now = live.compare(live.Reading(0.0, {name: 5.0}), live.Reading(2.0, {name: 25.0}))
    assert (now.rates["load_bytes"], now.rates["queried_tokens"]) == (10, None)


def test_rates_ratios_means_and_causes_are_of_the_time_between_two_readings(engine, memory_root):
    filled_root(memory_root, chunks=5)
    label = tokendepot.inspect_root(str(memory_root))["root_id"][:8]
    before = said(root=label, queried_tokens=1000, hit_tokens=1000, load_bytes=500)
    engine.answers = [before, said(root=label, queried_tokens=3000, hit_tokens=1500, load_bytes=900, saved_seconds=8)]
    now = shown(f"{memory_root}?capacity=16MiB", "--url", engine.url)
    assert now["hit_ratio"] == 0.25 and now["hit_ratio_ever"] == 0.5
    span = 2000 / now["rates"]["queried_tokens"]
    assert 0.2 <= span < 10
    assert now["rates"]["load_bytes"] == pytest.approx(400 / span) and now["rates"]["store_bytes"] == 0
    assert now["rates"]["saved_seconds"] == pytest.approx(8 / span)
    assert now["misses"] == {"evicted": pytest.approx(400 / span)}
    assert now["seconds"]["load_latency"] == 2 and now["seconds"]["store_latency"] is None
    (root,) = now["roots"]
    assert root["extents"] == 5 and root["capacity_bytes"] == 16 << 20 and root["writers"] == 0
    assert root["load_bytes_per_second"] == pytest.approx(400 / span)
    assert now["trouble"] == []


def test_an_engine_that_restarts_is_passed_over_and_seen_again(engine):
    screen = Screen(live, [], engine.url)
    engine.answers = [
        said(queried_tokens=5000, hit_tokens=10),
        None,
        said(queried_tokens=100, hit_tokens=50),
        said(queried_tokens=10, hit_tokens=0),
        said(queried_tokens=110, hit_tokens=50),
    ]
    screen.look(first=True)
    gone = screen.look()
    assert "503" in gone.trouble[0] or "cannot be read" in gone.trouble[0]
    assert gone.rates["queried_tokens"] is None
    assert screen.look().rates["queried_tokens"] is None  # nothing to compare with yet
    anew = screen.look()
    assert anew.rates["queried_tokens"] is None and anew.trouble == []  # counters went back
    again = screen.look()
    assert again.hit_ratio == 0.5 and again.rates["queried_tokens"] > 0


def test_a_live_depot_without_an_engine_s_metrics_and_a_table_for_people(root):
    depot = Depot.open(config(root))
    namespace = depot.register_namespace(MANIFEST)
    cache = Cache(64 * 4, seed=3)
    cache.lend_to(depot)
    assert store(depot, namespace, keys_of(namespace, 40))["items_ok"] == 40
    now = shown(root)
    assert now["roots"][0]["writers"] == 1 and now["roots"][0]["extents"] == 40
    assert now["rates"]["load_bytes"] is None and now["hit_ratio"] is None
    table = run(root, "--once").stdout
    assert "rates need --url" in table
    assert re.search(r"root +used +of +extents +writers", table) and re.search(r" 40 +1 ", table)
    assert max(len(line) for line in table.splitlines() if "is /" not in line) <= 80
    depot.close()


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        ([], 2, "neither ROOT nor --url is given"),
        (["/nowhere"], 2, "/nowhere is not the root of a depot"),
        (["--url", "localhost:8000"], 2, "--url is 'localhost:8000', expected http://HOST:PORT/metrics"),
        (["--url", "http://127.0.0.1:1/metrics"], 3, "http://127.0.0.1:1/metrics cannot be read"),
        (["--url", "URL", "--every", "0"], 2, "--every"),
        (["--url", "URL"], 3, "has no metrics of a depot"),
    ],
)
def test_bad_input_is_one_sentence(engine, arguments, code, complaint):
    engine.answers = ["# TYPE other counter\nother_total 1\n"]
    done = run(*(engine.url if text == "URL" else text for text in arguments), "--once")
    assert done.returncode == code, done.stderr
    assert complaint in " ".join(re.sub("[│╭╮╰╯─]", " ", done.stderr).split())
