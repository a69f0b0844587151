"""What depots count, at the address of LMCache's server: names as under vLLM, sums that only grow, never a failed scrape."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lmcache", reason="LMCache was not fetched: scripts/setup lmcache")

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from server import running, wait_for
from storage import Storage, key, memory, spec, value

from tokendepot.engines.lmcache import DepotConnector
from tokendepot.engines.lmcache.metrics import StorageCollector, storages
from tokendepot.engines.metrics import COUNTERS, GAUGE, LABELLED, OF_OBJECTS, OF_PROMPTS, ROOT_METRICS, readings

MIB = 1 << 20


def scraped() -> str:
    return generate_latest(REGISTRY).decode()


def counters(text: str) -> dict[tuple, float]:
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        if family.name.startswith("tokendepot_") and family.type in ("counter", "histogram")
        for sample in family.samples
    }


def test_lmcaches_server_shows_what_its_depot_does_where_it_shows_its_own_metrics(
    memory_root: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    with running(memory_root, environment, tmp_path / "first.log") as server:
        server.client(prompts=2)
        extents = wait_for(lambda: value(server.get("/metrics"), "tokendepot_store_extents_total"), least=4)
        text = server.get("/metrics")
        assert value(text, "tokendepot_load_extents_total") == 0
        moved = value(text, "tokendepot_root_moved_bytes_total", operation="store")
        assert moved == value(text, "tokendepot_store_bytes_total") > extents * 4096
        assert "lmcache_mp_l2_usage_bytes" in text
    with running(memory_root, environment, tmp_path / "second.log") as server:  # its own memory is gone
        server.client(prompts=2)
        text = server.get("/metrics")
        loaded = value(text, "tokendepot_load_extents_total")
        assert loaded >= extents and loaded == value(text, "tokendepot_load_latency_seconds_count")
        assert value(text, "tokendepot_store_extents_total") == 0
        assert value(text, "tokendepot_failures_total", operation="load", reason="corrupt") == 0


def test_two_storages_add_up_and_counters_never_go_back(memory_root: Path) -> None:
    with Storage(spec([f"{memory_root}?capacity=64MiB"])):
        pass  # so that there are counters
    seen = [counters(scraped())]
    stored = "tokendepot_store_extents_total"
    with Storage(spec([f"{memory_root}?capacity=64MiB"])) as one:
        with Storage(spec([f"{memory_root}?capacity=64MiB"])) as other:
            assert one.store([key(1), key(2)], [memory(MIB, 1), memory(MIB, 2)])
            assert other.store([key(3)], [memory(MIB, 3)])
            assert one.load([key(1), key(9)], [memory(MIB), memory(MIB)]) == [True, False]
            text, both = with_mapped_bytes(scraped, one, other)
            seen.append(counters(text))
            assert seen[-1][(stored,)] - seen[-2][(stored,)] == 3
            assert value(text, "tokendepot_mapped_bytes") == sum(both) > max(both)
        text, alone = with_mapped_bytes(scraped, one)
        seen.append(counters(text))
        assert value(text, "tokendepot_mapped_bytes") == sum(alone)
    for _ in range(2):
        with Storage(spec([f"{memory_root}?capacity=64MiB"])) as storage:
            assert storage.load([key(3)], [memory(MIB)]) == [True]
            seen.append(counters(scraped()))
    seen.append(counters(text := scraped()))
    assert value(text, "tokendepot_mapped_bytes") == 0
    for before, after in zip(seen, seen[1:], strict=False):
        assert before.keys() <= after.keys()
        assert [name for name, count in before.items() if after[name] < count] == []
    grown = {name: seen[-1][name] - seen[0].get(name, 0) for name in seen[-1]}
    assert grown[("tokendepot_load_extents_total",)] == grown[("tokendepot_load_latency_seconds_count",)] == 3
    lines = [line for line in text.splitlines() if line.startswith(("tokendepot_", "# TYPE tokendepot_"))]
    assert len({line.rpartition(" ")[0] for line in lines}) == len(lines) > 100, "no series and no type twice"


def with_mapped_bytes(take: Callable[[], Any], *storages: Storage) -> tuple[Any, list[int]]:
    """What `take` returns while nothing changes, and the bytes each storage has mapped: a depot makes its next segment by
    itself, later."""
    for _ in range(100):
        before = [readings(storage.statistics()) for storage in storages]
        taken = take()
        after = [readings(storage.statistics()) for storage in storages]
        if before == after:
            return taken, [int(one[f"{GAUGE}mapped_bytes"]) for one in after]
    raise AssertionError(f"the depots never come to rest: {before}, {after}")


def test_names_help_labels_and_buckets_are_those_under_vllm(memory_root: Path) -> None:
    pytest.importorskip("vllm")
    from tokendepot.engines.vllm.stats import DepotPromMetrics, EngineCounters

    registry = CollectorRegistry()
    types = {kind: partial(kind, registry=registry) for kind in (Counter, Gauge, Histogram)}
    of_vllm = DepotPromMetrics(SimpleNamespace(kv_transfer_config=None), types, ["model_name"], {0: ["m"]})
    collector = StorageCollector()
    with Storage(spec([f"{memory_root}?capacity=64MiB"])) as storage:
        assert storage.store([key(1)], [memory(MIB, 1)])
        collector.opened(storage.adapter._client._depot)
        (collected, statistics), _ = with_mapped_bytes(
            lambda: (list(collector.collect()), storage.statistics()), storage
        )
        of_vllm.observe(EngineCounters(rank=0).delta(statistics))
        ours = {family.name: family for family in collected}
    theirs = {family.name: family for family in registry.collect()}

    def series(family) -> dict[tuple, float]:
        return {
            (s.name, *sorted((name, text) for name, text in s.labels.items() if name != "model_name")): s.value
            for s in family.samples
            if not s.name.endswith("_created")
        }

    of_objects = {COUNTERS[key][0] for key in OF_OBJECTS}
    assert ours.keys() - theirs.keys() == of_objects
    for name in of_objects:
        del ours[name]
    assert len(ours) > 20
    for name, family in ours.items():
        assert (family.type, family.documentation) == (theirs[name].type, theirs[name].documentation)
        assert series(family).keys() == series(theirs[name]).keys(), name
        if name not in ("tokendepot_open_seconds", "tokendepot_demotion_lag_seconds"):  # of a scheduler; an age
            assert series(family) == pytest.approx(series(theirs[name])), name
    of_prompts = {
        name for table in (COUNTERS, LABELLED, ROOT_METRICS) for key, (name, *_) in table.items() if key in OF_PROMPTS
    }
    assert theirs.keys() - ours.keys() == of_prompts


def test_a_depot_that_cannot_be_asked_takes_no_other_metric_away(
    memory_root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def stats_json(self) -> str:
            raise RuntimeError("it is broken")

    broken = Broken()
    with Storage(spec([f"{memory_root}?capacity=64MiB"])):
        assert "tokendepot_store_extents_total" in scraped()
        storages.opened(broken)
        for _ in range(2):
            text = scraped()
            assert "python_info" in text and "tokendepot_" not in text
    assert [record.message for record in caplog.records if "not shown" in record.message] == [
        "tokendepot: metrics of the depot are not shown: RuntimeError: it is broken"
    ]
    storages.closed(broken)
    assert "tokendepot_store_extents_total" in scraped()


def test_a_refused_depot_counts_as_switched_off(memory_root: Path) -> None:
    memory_root.mkdir()
    (memory_root / "something").write_text("else")
    with Storage(spec([f"{memory_root}/inner?capacity=64MiB"])):
        before = value(scraped(), "tokendepot_switched_off_total")
    refused = DepotConnector(roots=[f"{memory_root}?capacity=64MiB"])
    assert value(scraped(), "tokendepot_switched_off_total") == before + 1
    refused.close()
    assert value(scraped(), "tokendepot_switched_off_total") == before + 1


def test_objects_that_are_looked_up_and_found_are_counted_also_without_a_depot(memory_root: Path) -> None:
    names = ("tokendepot_queried_objects_total", "tokendepot_found_objects_total")

    def grown(look_up: Callable[[], Any]) -> list[float]:
        before = [value(scraped(), name) for name in names]
        look_up()
        return [value(scraped(), name) - old for name, old in zip(names, before, strict=True)]

    with Storage(spec([f"{memory_root}?capacity=64MiB"])) as storage:
        assert storage.store([key(1), key(2)], [memory(MIB, 1), memory(MIB, 2)])
        assert grown(lambda: storage.found([key(1), key(2), key(9)])) == [3, 2]
        assert grown(lambda: storage.load([key(1)], [memory(MIB)])) == [0, 0]
    with Storage(spec(["/nonexistent/root?capacity=64MiB"])) as storage:
        assert grown(lambda: storage.found([key(1)])) == [1, 0]


def test_the_log_of_the_start_names_every_option_and_where_its_value_is_from(
    memory_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "tokendepot.lmcache"):
        DepotConnector(roots=[f"{memory_root}?capacity=64MiB"], load_timeout=7, on_error="fail").close()
    (line,) = [text for text in caplog.messages if "options given" in text]
    given, by_default = line.split("by default: ")
    assert "load_timeout=7" in given and "roots[0].capacity=67108864" in given and 'on_error="fail"' in given
    assert f"store_queue={1 << 40}" in by_default and "namespace={}" in by_default


def test_a_forked_child_shows_nothing_of_its_parents_depots(memory_root: Path) -> None:
    with Storage(spec([f"{memory_root}?capacity=64MiB"])) as storage:
        assert storage.store([key(1)], [memory(MIB, 1)])
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = int(value(scraped(), "tokendepot_store_extents_total"))
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
