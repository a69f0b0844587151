"""Prometheus beside the demo: scrapes the server and the roots, and answers every query of the dashboard."""

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

from rich.table import Table

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
UNITS = {"s": " s", "bytes": " B", "Bps": " B/s", "ops": "/s", "percentunit": " %", "dtdurations": " s"}


def program() -> str | None:
    """Prometheus, installed or only unpacked by scripts/setup."""
    return shutil.which("prometheus") or shutil.which("prometheus", path=os.path.join(sys.prefix, "prometheus/usr/bin"))


@dataclass
class Value:
    panel: str
    section: str
    series: str
    value: float | None
    unit: str


class Watch:
    """Prometheus and `tokendepot metrics`, from their start until close()."""

    def __init__(self, directory: pathlib.Path, server_url: str, roots: list[str]) -> None:
        found = program()
        if found is None:
            raise ServerFault("--metrics needs Prometheus, which `scripts/setup monitoring` unpacks")
        self._processes: list[subprocess.Popen[bytes]] = []
        exporter, port = free_port(), free_port()
        self._url = f"http://127.0.0.1:{port}"
        scrapes = [("vllm", urllib.parse.urlsplit(server_url).netloc), ("roots", f"127.0.0.1:{exporter}")]
        settings = {
            "global": {"scrape_interval": f"{SCRAPE_S:g}s"},
            "scrape_configs": [{"job_name": job, "static_configs": [{"targets": [to]}]} for job, to in scrapes],
        }
        (directory / "prometheus.yml").write_text(json.dumps(settings))  # JSON is YAML
        run_cli = "from tokendepot.cli import main; main()"
        self._start(directory, [sys.executable, "-c", run_cli, "metrics", *roots, "--port", str(exporter)])
        self._start(
            directory,
            [found, f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/prometheus",
             f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"],
        )  # fmt: skip

    def _start(self, directory: pathlib.Path, command: list[str]) -> None:
        with open(directory / f"{pathlib.Path(command[0]).name}.log", "ab") as log:
            self._processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def wait_scraped(self) -> None:
        """Until both have been scraped; ServerFault when that takes too long."""
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            try:
                if [value for _, value in self._ask("up")] == [1.0, 1.0]:
                    return
            except (OSError, ValueError):
                pass  # it is not up yet
            time.sleep(0.25)
        raise ServerFault(f"Prometheus did not scrape server and roots within {WAIT_S:.0f} s")

    def values(self) -> list[Value]:
        """Of every panel; None where it has no number. ServerFault when Prometheus refuses a query."""
        time.sleep(3 * SCRAPE_S)  # until the last request has been scraped
        found, section = [], ""
        for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
            if panel["type"] == "row":
                section = panel["title"]
                continue
            about = (panel["title"], section)
            unit = panel["fieldConfig"]["defaults"]["unit"]
            values = []
            for target in panel["targets"]:
                for labels, value in self._ask(target["expr"]):
                    name = re.sub(r"\{\{(\w+)\}\}", lambda found, has=labels: has.get(found[1], ""), target["legendFormat"])
                    if math.isfinite(value):
                        values.append(Value(*about, name, value, unit))
            found += values or [Value(*about, "", None, unit)]
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


def complaints(values: list[Value]) -> list[str]:
    lacking = [name for name in MUST_HAVE if not any(v.panel == name and v.value is not None for v in values)]
    return [f'the panel "{name}" has no data' for name in lacking]


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
        shown = [value for value in those if value.value] or those[:1]
        out.add_row(panel, ", ".join(_said(value) for value in shown))
    return out


def _said(value: Value) -> str:
    if value.value is None:
        return "no data"
    number, unit = (value.value * 100, " %") if value.unit == "percentunit" else (value.value, UNITS.get(value.unit, ""))
    return f"{value.series} {number:,.4g}{unit}" if abs(number) < 1000 else f"{value.series} {number:,.0f}{unit}"
