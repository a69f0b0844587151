"""What `scripts/demo --metrics` asks of Prometheus: the dashboard's own queries, of a server and a root that are there."""

import io
import json
import pathlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rich.console import Console

import panels
from client import ServerFault

from tokendepot import Depot

METRICS = """# TYPE tokendepot_hit_tokens counter
tokendepot_hit_tokens_total{{model_name="m"}} {n}
# TYPE tokendepot_queried_tokens counter
tokendepot_queried_tokens_total{{model_name="m"}} {twice}
"""


@pytest.fixture
def server():
    """Address of metrics that grow with every scrape."""
    scrapes = [0]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            scrapes[0] += 1000
            self.send_response(200)
            self.end_headers()
            self.wfile.write(METRICS.format(n=scrapes[0], twice=2 * scrapes[0]).encode())

        def log_message(self, *_):
            pass

    one = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=one.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{one.server_port}"
    one.shutdown()
    one.server_close()


def test_every_panel_is_asked_and_what_the_server_and_the_root_say_is_shown(server, tmp_path):
    if panels.program() is None:
        pytest.skip("prometheus is not installed: scripts/setup monitoring")
    root = tmp_path / "root"
    Depot.open(json.dumps({"roots": [f"{root}?capacity=64MiB"], "free_space_reserve": 0})).close()
    watch = panels.Watch(tmp_path, {"vllm": server}, [f"{root}?capacity=64MiB"])
    try:
        watch.wait_scraped()
        values = watch.values()
    finally:
        watch.close()
    dashboard = json.loads(panels.DASHBOARD.read_text())["panels"]
    assert {value.panel for value in values} == {panel["title"] for panel in dashboard if panel["type"] != "row"}
    by_panel = {value.panel: value.value for value in values}
    assert by_panel["Hit rate"] == pytest.approx(0.5) and by_panel["Roots"] == 1
    assert by_panel["KV events published"] is not None and by_panel["Who hears of KV events"] is not None
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(panels.table(values))
    assert re.search(r"Last full scrub +│ \w{8} never", console.export_text())
    assert by_panel["Time to first token"] is None
    lacking = panels.complaints(values)
    assert any(line.startswith('the panel "Time to first token" has no data for histogram_quantile(') for line in lacking)
    assert not any(name in line for line in lacking for name in ("tokendepot_root_up", "tokendepot_root_used", "tokendepot_events_"))


def test_without_prometheus_it_says_what_to_run(monkeypatch, tmp_path):
    monkeypatch.setattr(panels, "program", lambda: None)
    with pytest.raises(ServerFault, match="scripts/setup monitoring"):
        panels.Watch(pathlib.Path(tmp_path), {"vllm": "http://127.0.0.1:1"}, [])
