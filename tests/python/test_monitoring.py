"""The dashboard and the alert rules in deploy/: they name what exists, and the real Prometheus answers every query."""

import contextlib
import json
import math
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest
from paged import MANIFEST, Cache, config, keys_of, store
from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from tokendepot import Depot, exporter, publisher_metrics
from tokendepot.engines import metrics

TREE = pathlib.Path(__file__).resolve().parents[2]
DASHBOARD_FILE = TREE / "deploy/grafana/tokendepot.json"
DASHBOARD = json.loads(DASHBOARD_FILE.read_text(encoding="utf-8"))
RULES = TREE / "deploy/prometheus/tokendepot-alerts.yml"
RULES_TEST = TREE / "deploy/prometheus/tokendepot-alerts-test.yml"
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
WAIT_S = 30.0

# Of vLLM's own metrics. A Prometheus that asks for OpenMetrics gets them as vllm_... from newer prometheus_client, so
# queries must match both.
VLLM_COUNTERS = ("vllm:prefix_cache_hits",)
VLLM_HISTOGRAMS = (
    "vllm:time_to_first_token_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_prefill_kv_computed_tokens",
)
MODELS = {"with:colon": "text/plain", "with_underscore": "application/openmetrics-text; version=1.0.0"}


def connector_counters():
    """Name -> series, as (operation, reason or path) or ()."""
    counters = {name: ([], [()]) for name, _ in metrics.COUNTERS.values()}
    for word, (name, _, labels) in metrics.LABELLED.items():
        counters[name] = ([*labels], [values for _, values in metrics.labelled_keys(word)])
    choices = {"operation": metrics.OPERATIONS, "cause": metrics.EVICTIONS}
    for name, _, labels in metrics.ROOT_METRICS.values():
        series = [("00000001", choice) for choice in choices[labels[0]]] if labels else [("00000001",)]
        counters[name] = (["root", *labels], series)
    return counters


def connector_histograms():
    return [name for name, _ in metrics.HISTOGRAMS.values()]


def connector_gauges():
    """Name -> series, as (root,) or ()."""
    plain = {name: ([], [()]) for name, _ in metrics.GAUGES.values()}
    return plain | {name: (["root"], [("00000001",)]) for name, _ in metrics.ROOT_GAUGES.values()}


def program(name):
    """Of Debian's package, installed or only unpacked by scripts/setup."""
    found = shutil.which(name) or shutil.which(name, path=os.path.join(sys.prefix, "prometheus/usr/bin"))
    if found is None:
        pytest.skip(f"{name} is not installed: scripts/setup test")
    return found


def get(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


class BusyEngine:
    """What a vLLM with the connector exports, growing with each scrape."""

    def __init__(self, model):
        self.model = model
        self.scrapes = 0

    def collect(self):
        self.scrapes += 1
        n = self.scrapes
        for name, (labels, series) in connector_counters().items():
            family = CounterMetricFamily(name, name, labels=["model_name", "engine", *labels])
            for values in series:
                family.add_metric([self.model, "0", *values], n)
            yield family
        for name in VLLM_COUNTERS:
            family = CounterMetricFamily(name, name, labels=["model_name", "engine"])
            family.add_metric([self.model, "0"], n)
            yield family
        for name, (labels, series) in connector_gauges().items():
            family = GaugeMetricFamily(name, name, labels=["model_name", "engine", *labels])
            for values in series:
                family.add_metric([self.model, "0", *values], n)
            yield family
        for name in (*VLLM_HISTOGRAMS, *connector_histograms()):
            family = HistogramMetricFamily(name, name, labels=["model_name", "engine"])
            family.add_metric([self.model, "0"], buckets=[("0.1", n), ("+Inf", 2 * n)], sum_value=3 * n)
            yield family


@pytest.fixture(scope="module")
def prometheus():
    """Address of a Prometheus that scrapes a busy engine, and the exporter on a root that an engine has open."""
    with contextlib.ExitStack() as stack:
        directory = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tokendepot-test-", dir="/dev/shm")))
        root = directory / "root"
        depot = Depot.open(config(root))
        stack.callback(depot.close)
        namespace = depot.register_namespace(MANIFEST)
        cache = Cache(64 * 4, seed=3)
        cache.lend_to(depot)
        assert store(depot, namespace, keys_of(namespace, 40))["items_ok"] == 40

        engine_ports = [_serve(stack, model, names) for model, names in MODELS.items()]
        exporter_port = _command(stack, "metrics", "--port", "0", f"{root}?capacity=16MiB")
        events_port = _command(
            stack, "events", "--endpoint", "tcp://127.0.0.1:0", "--metrics", "127.0.0.1:0", str(root)
        )

        def job(name, *ports):
            return {"job_name": name, "static_configs": [{"targets": [f"127.0.0.1:{port}" for port in ports]}]}

        settings = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(RULES)],
            "scrape_configs": [job("vllm", *engine_ports), job("roots", exporter_port), job("events", events_port)],
        }
        (directory / "prometheus.yml").write_text(json.dumps(settings))  # JSON is YAML
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            program("prometheus"), f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data",
            f"--web.listen-address=127.0.0.1:{port}", "--log.level=error",
        ]  # fmt: skip
        _started(stack, command, env={**os.environ, "GOMAXPROCS": "1"})
        yield f"http://127.0.0.1:{port}"


def _serve(stack, model, accept):
    """Port of an engine that answers as if `accept` had been asked for."""
    registry = CollectorRegistry()
    registry.register(BusyEngine(model))
    application = make_wsgi_app(registry)

    class Quiet(WSGIRequestHandler):
        def log_message(self, *_):
            pass

    server = make_server(
        "127.0.0.1", 0, lambda environ, start: application({**environ, "HTTP_ACCEPT": accept}, start), handler_class=Quiet
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    stack.callback(server.server_close)
    stack.callback(server.shutdown)
    return server.server_port


def _command(stack, *arguments):
    """Port on which a command of ours serves metrics."""
    command = [sys.executable, "-c", "from tokendepot.cli import main; main()", *arguments]
    shown = _started(stack, command, stdout=subprocess.PIPE, text=True)
    return next(found[1] for line in shown.stdout if (found := re.search(r":(\d+)/metrics", line)))


def _started(stack, command, **more):
    process = subprocess.Popen(command, **more)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def answer(url, query):
    return get(f"{url}/api/v1/query?{urllib.parse.urlencode({'query': query})}")["data"]["result"]


def queries_of(panel):
    """As Grafana would send them, for each of the models."""
    for target in panel["targets"]:
        query = target["expr"].replace("$__rate_interval", "1m").replace("$__range", "1h").replace("$root", ".*")
        yield from {query.replace("$model", model) for model in MODELS}


# --- what the files say ---


def test_every_panel_has_a_title_a_unit_and_queries():
    assert len(PANELS) >= 20
    titles = [panel["title"] for panel in PANELS]
    assert len(titles) == len(set(titles)) and all(titles)
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    for panel in PANELS:
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
        assert all(target["expr"] and target["legendFormat"] for target in panel["targets"]), panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_panels_do_not_overlap_and_fit_the_width():
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells


def test_variables_that_queries_use_are_defined():
    defined = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", " ".join(target["expr"] for panel in PANELS for target in panel["targets"])))
    assert used - {"__rate_interval", "__range"} == defined - {"datasource"}


@pytest.mark.parametrize("file", [DASHBOARD_FILE, RULES, RULES_TEST], ids=lambda file: file.name)
def test_metrics_that_are_named_exist(file):
    text = file.read_text(encoding="utf-8")
    known = set(exporter.METRICS) | {f"{name}_total" for name in connector_counters()}
    known |= {f"{name}_total" for name in VLLM_COUNTERS}
    known |= set(connector_gauges())
    known |= {f"{publisher_metrics.PREFIX}{name}_total" for name in publisher_metrics.COUNTERS}
    known |= {publisher_metrics.PREFIX + name for name in publisher_metrics.GAUGES}
    known |= {f"{name}_{part}" for name in (*VLLM_HISTOGRAMS, *connector_histograms()) for part in ("bucket", "sum", "count")}
    named = set(re.findall(r"\b(?:tokendepot_|vllm\[:_\])\w+", text))
    named = {name.replace("[:_]", ":") for name in named}
    assert "vllm:" not in text
    assert len(named) > 5 and named <= known


def test_what_lmcaches_server_exports_needs_no_vllm():
    script = "import sys, tokendepot.engines.lmcache; print(*{'vllm', 'torch', 'lmcache'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_each_alert_is_tested_and_is_in_the_table_of_the_documents():
    alerts = set(re.findall(r"- alert: (\w+)", RULES.read_text(encoding="utf-8")))
    assert len(alerts) > 5
    tested = set(re.findall(r"alertname: (\w+)", RULES_TEST.read_text(encoding="utf-8")))
    documented = re.findall(r"^\| `(Tokendepot\w+)` \|", (TREE / "docs/operations.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert tested == alerts
    assert sorted(documented) == sorted(alerts)


# --- what Prometheus says ---


def test_promtool_accepts_the_rules_and_their_tests():
    for arguments in (["check", "rules", RULES.name], ["test", "rules", RULES_TEST.name]):
        done = subprocess.run([program("promtool"), *arguments], cwd=RULES.parent, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_query_of_the_dashboard_returns_data(prometheus):
    waiting = {(panel["title"], query) for panel in PANELS for query in queries_of(panel)}
    assert len(waiting) > 50
    end = time.monotonic() + WAIT_S
    while waiting and time.monotonic() < end:
        time.sleep(0.5)
        with contextlib.suppress(OSError):  # it is not up yet
            waiting = {one for one in waiting if not _has_numbers(answer(prometheus, one[1]))}
    assert waiting == set()


def _has_numbers(result):
    return bool(result) and all(math.isfinite(float(series["value"][1])) for series in result)


def test_prometheus_evaluates_every_rule(prometheus):
    end = time.monotonic() + WAIT_S
    rules = []
    while time.monotonic() < end and (not rules or any(rule["health"] == "unknown" for rule in rules)):
        time.sleep(0.2)
        with contextlib.suppress(OSError):
            rules = [rule for group in get(f"{prometheus}/api/v1/rules")["data"]["groups"] for rule in group["rules"]]
    assert rules and [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"] == []
