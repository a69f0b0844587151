"""Prometheus beside the demo: scrapes servers, roots and the publisher of KV events; answers every query of the dashboard."""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass

from rich.filesize import decimal
from rich.table import Table
from tokendepot.engines import metrics

from client import ServerFault
from server import free_port

DASHBOARD = pathlib.Path(__file__).resolve().parents[2] / "deploy/grafana/tokendepot.json"
SCRAPE_S = 1.0
WAIT_S = 60.0
SERVICE_UNAVAILABLE = 503
# As Grafana would set them; $root and $model stand for all.
VARIABLES = {"$__rate_interval": "5m", "$__range": "1h", "$root": ".*", "$model": ".*"}
# Without these the demo has shown nothing.
MUST_HAVE = ("Roots", "Hit rate", "Tokens looked up and hit", "Bytes loaded and stored, by path", "Latency of an extent",
             "Tokens not computed", "Time to first token")  # fmt: skip
BYTES = {"bytes": "", "Bps": "/s"}
UNITS = {"s": " s", "ops": "/s"}
# Of metrics that LMCache's server does not have: only an engine sees prompts.
OF_PROMPTS = tuple(
    name
    for table in (metrics.COUNTERS, metrics.LABELLED, metrics.ROOT_METRICS)
    for key, (name, *_) in table.items()
    if key in metrics.OF_PROMPTS
)


def program() -> str | None:
    """Prometheus, installed or only unpacked by scripts/setup."""
    return shutil.which("prometheus") or shutil.which("prometheus", path=os.path.join(sys.prefix, "prometheus/usr/bin"))


@dataclass
class Value:
    panel: str
    section: str
    series: str
    value: float | None  # None: the query found no series; not a number: nothing of it happened yet
    unit: str
    query: str


class Watch:
    """Prometheus, `tokendepot metrics` and `tokendepot events`, from their start until close()."""

    def __init__(self, directory: pathlib.Path, servers: dict[str, str], roots: list[str]) -> None:
        """servers: job -> URL of what serves /metrics already."""
        found = program()
        if found is None:
            raise ServerFault("--metrics needs Prometheus, which `scripts/setup monitoring` unpacks")
        self._processes: list[subprocess.Popen[bytes]] = []
        exporter, publisher, port = free_port(), free_port(), free_port()
        self._url = f"http://127.0.0.1:{port}"
        scrapes = [(job, urllib.parse.urlsplit(url).netloc) for job, url in servers.items()]
        scrapes += [("roots", f"127.0.0.1:{exporter}"), ("events", f"127.0.0.1:{publisher}")]
        self._jobs = len(scrapes)
        settings = {
            "global": {"scrape_interval": f"{SCRAPE_S:g}s"},
            "scrape_configs": [{"job_name": job, "static_configs": [{"targets": [to]}]} for job, to in scrapes],
        }
        (directory / "prometheus.yml").write_text(json.dumps(settings))  # JSON is YAML
        tokendepot = [sys.executable, "-c", "from tokendepot.cli import main; main()"]
        self._start(directory, "metrics", [*tokendepot, "metrics", *roots, "--port", str(exporter)])
        self._start(
            directory,
            "events",
            [*tokendepot, "events", *(root.partition("?")[0] for root in roots), "--endpoint", "tcp://127.0.0.1:0",
             "--metrics", f"127.0.0.1:{publisher}"],
        )  # fmt: skip
        self._start(
            directory,
            "prometheus",
            [found, f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/prometheus",
             f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"],
        )  # fmt: skip

    def _start(self, directory: pathlib.Path, name: str, command: list[str]) -> None:
        with open(directory / f"{name}.log", "ab") as log:
            self._processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def wait_scraped(self) -> None:
        """Until all have been scraped; ServerFault when that takes too long."""
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            try:
                if [value for _, value in self._ask("up")] == [1.0] * self._jobs:
                    return
            except (OSError, ValueError):
                pass  # it is not up yet
            time.sleep(0.25)
        raise ServerFault(f"Prometheus did not scrape servers, roots and events within {WAIT_S:.0f} s")

    def values(self) -> list[Value]:
        """Of every query of every panel. ServerFault when Prometheus refuses one."""
        time.sleep(3 * SCRAPE_S)  # until the last request has been scraped
        found, section = [], ""
        for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
            if panel["type"] == "row":
                section = panel["title"]
                continue
            about = (panel["title"], section)
            for target in panel["targets"]:
                query, legend, unit = target["expr"], target["legendFormat"], unit_of(panel, target["refId"])
                for labels, value in self._ask(query) or [({}, None)]:
                    name = re.sub(r"\{\{(\w+)\}\}", lambda found, has=labels: has.get(found[1], ""), legend)
                    found.append(Value(*about, name, value, unit, query))
        return found

    def _ask(self, query: str) -> list[tuple[dict[str, str], float]]:
        for name, value in VARIABLES.items():
            query = query.replace(name, value)
        address = f"{self._url}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                result = json.load(answer)["data"]["result"]
        except urllib.error.HTTPError as error:
            if error.code == SERVICE_UNAVAILABLE:
                raise  # it is starting
            raise ServerFault(f"Prometheus refused {query}: {error.read().decode(errors='replace')}") from None
        return [(series["metric"], float(series["value"][1])) for series in result]


def unit_of(panel: dict, query: str) -> str:
    """Of a panel's query, by its letter."""
    for override in panel["fieldConfig"]["overrides"]:
        if override["matcher"] == {"id": "byFrameRefID", "options": query}:
            return next(found["value"] for found in override["properties"] if found["id"] == "unit")
    return panel["fieldConfig"]["defaults"]["unit"]


def complaints(values: list[Value], prompts: bool = True) -> list[str]:
    """What was not shown and should have been. prompts: whether the depot is an engine's, which sees prompts."""
    expected = [value for value in values if prompts or not any(name in value.query for name in OF_PROMPTS)]
    found = [f'the panel "{value.panel}" has no data for {value.query}' for value in expected if value.value is None]
    for name in MUST_HAVE:
        those = [value for value in expected if value.panel == name and value.value is not None]
        if those and not any(map(_is_number, those)):
            found.append(f'the panel "{name}" has no number')
    return found


def _is_number(value: Value) -> bool:
    return value.value is not None and math.isfinite(value.value)


def table(values: list[Value]) -> Table:
    """A panel a line; of many series those that are not 0."""
    out = Table(title="What the dashboard shows (deploy/grafana/tokendepot.json)", title_justify="left")
    for name in ("panel", "values"):
        out.add_column(name, overflow="fold")
    panels: dict[tuple[str, str], list[Value]] = {}
    for value in values:
        panels.setdefault((value.section, value.panel), []).append(value)
    section = ""
    for (its_section, panel), those in panels.items():
        if its_section != section:
            section = its_section
            out.add_section()
            out.add_row(f"[bold]{section}[/bold]", "")
        shown = [value for value in those if value.value and _is_number(value)] or those[:1]
        shown += [value for value in those if value.value is None and value not in shown]
        out.add_row(panel, ", ".join(_said(value) for value in shown))
    return out


def _said(value: Value) -> str:
    """As the panel would say it."""
    number, unit = value.value, value.unit
    if number is None:
        return f"{value.series} no data".lstrip()
    if not math.isfinite(number):
        return "nothing yet"
    if unit == "dateTimeFromNow":  # milliseconds since 1970
        return f"{value.series} {max(0.0, time.time() - number / 1000):,.0f} s ago" if number else f"{value.series} never"
    if unit in BYTES:
        return f"{value.series} {decimal(int(number))}{BYTES[unit]}"
    if unit == "percentunit":
        number, unit = number * 100, " %"
    else:
        unit = " " + unit.removeprefix("suffix: ") if unit.startswith("suffix: ") else UNITS.get(unit, "")
    return f"{value.series} {number:,.4g}{unit}" if abs(number) < 1000 else f"{value.series} {number:,.0f}{unit}"
