"""The failure table of docs/operations.md, the alert rules, the dashboard and the metrics know of each other."""

from __future__ import annotations

import json
import re

import pytest
from test_docs import (
    OPERATIONS,
    TREE,
    metrics,
    metrics_of_events,
    metrics_of_roots,
    other_metrics,
    rows,
    section,
)

from tokendepot.engines.metrics import CAUSES, DROPS, EVICTIONS, REASONS

RULES = (TREE / "deploy/prometheus/tokendepot-alerts.yml").read_text(encoding="utf-8")
PANELS = json.loads((TREE / "deploy/grafana/tokendepot.json").read_text(encoding="utf-8"))["panels"]
TABLE = "When something is wrong"

# How much there is or goes on: these say nothing about failure. Every other metric has a row.
AMOUNTS = {
    "tokendepot_queried_tokens_total",
    "tokendepot_shared_loads_total",
    "tokendepot_saved_seconds_total",
    "tokendepot_carried_tokens_total",
    *(f"tokendepot_{what}_objects_total" for what in ("queried", "found")),
    "tokendepot_scrubbed_bytes_total",
    *(f"tokendepot_{way}_{what}_total" for way in ("load", "store") for what in ("extents", "bytes", "seconds")),
    *(f"tokendepot_root_moved_{what}_total" for what in ("bytes", "tokens")),
    *(f"tokendepot_root_{what}" for what in ("capacity_bytes", "used_bytes", "live_bytes", "extents")),
    *(f"tokendepot_root_{what}" for what in ("namespaces", "namespace_bytes", "namespace_extents")),
    "tokendepot_root_journal_records",
    *(f"tokendepot_events_{what}_total" for what in ("published", "batches", "replays")),
    "tokendepot_root_filesystem_size_bytes",
}


def all_metrics() -> set[str]:
    return {f"{name}_total" for name in metrics()} | other_metrics() | metrics_of_roots() | metrics_of_events()


def failure_rows() -> list[list[str]]:
    found = rows(section(OPERATIONS, TABLE))
    assert all(len(cells) == 4 for cells in found)
    return found


def named_in(text: str) -> set[str]:
    return set(re.findall(r"\btokendepot_\w+", text))


def alerts() -> dict[str, str]:
    """Alert -> text of its rule."""
    found = dict(re.findall(r"- alert: (\w+)\n(.*?)(?=\n      - alert:|\n  - name:|\Z)", RULES, flags=re.DOTALL))
    assert len(found) == RULES.count("- alert:") > 10
    return found


def test_every_metric_that_can_show_a_failure_has_a_row_and_no_row_names_another() -> None:
    named = named_in(" ".join(cells[1] for cells in failure_rows()))
    assert all_metrics() >= AMOUNTS
    assert all_metrics() - AMOUNTS - named == set(), "have no row"
    assert named - all_metrics() == set(), "do not exist"


@pytest.mark.parametrize(
    "metric, values",
    [
        ("tokendepot_failures_total", REASONS),
        ("tokendepot_dropped_stores_total", DROPS),
        ("tokendepot_missed_tokens_total", CAUSES),
        ("tokendepot_root_evicted_bytes_total", EVICTIONS),
    ],
)
def test_every_reason_and_cause_has_a_row(metric: str, values: tuple[str, ...]) -> None:
    explained = {word for cells in failure_rows() if metric in cells[1] for word in re.findall(r"`(\w+)`", cells[1])}
    assert set(values) <= explained


def test_each_alert_leads_to_a_row_that_names_its_metric() -> None:
    anchors = {anchor: cells for cells in failure_rows() for anchor in re.findall(r'<a id="([\w-]+)"></a>', cells[0])}
    led_to = set()
    for alert, rule in alerts().items():
        runbook = re.search(r"^          runbook: docs/operations\.md#([\w-]+)$", rule, flags=re.MULTILINE)
        assert runbook, f"{alert} names no row"
        assert runbook[1] in anchors, f"{alert} names the row {runbook[1]}"
        measured = {name.removesuffix("_bucket") for name in named_in(rule)}
        assert measured & named_in(anchors[runbook[1]][1]), f"{alert} is not about the metrics of its row"
        led_to.add(runbook[1])
    assert led_to == anchors.keys(), "anchors that no alert leads to"


def test_the_table_of_alerts_has_the_rules_their_metrics_and_their_rows() -> None:
    known = alerts()
    listed = {cells[0].strip("`"): cells for cells in rows(section(OPERATIONS, "Dashboard and alerts"))}
    assert listed.keys() == known.keys()
    for alert, cells in listed.items():
        row = re.search(r"runbook: docs/operations\.md(#[\w-]+)", known[alert])
        assert row and f"({row[1]})" in cells[2], alert
        assert named_in(cells[1]) <= {name.removesuffix("_bucket") for name in named_in(known[alert])}, alert


def test_what_a_row_names_is_on_the_dashboard() -> None:
    shown = named_in(" ".join(target["expr"] for panel in PANELS for target in panel.get("targets", [])))
    shown = {name.removesuffix("_bucket") for name in shown}
    assert named_in(" ".join(cells[1] for cells in failure_rows())) - shown == set()
