"""`tokendepot metrics` on roots that a real engine filled: what it serves, what a scrape may cost, how it ends."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from paged import MANIFEST, Cache, config, filled_root, keys_of, store
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import tokendepot
from tokendepot import Depot, exporter

COMMAND = [sys.executable, "-c", "from tokendepot.cli import main; main()", "metrics"]


def run(*arguments):
    result = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in result.stderr
    return result


@contextlib.contextmanager
def serving(*arguments):
    """The process and the address that it printed."""
    process = subprocess.Popen([*COMMAND, *map(str, arguments), "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if found := re.search(r"http://\S+", line):
                yield process, found[0]
                break
        else:
            raise AssertionError("it ended before it served")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def parsed(text):
    """(name, labels) -> value; a family or a series that is there twice fails."""
    for kind in ("HELP", "TYPE"):
        named = re.findall(rf"^# {kind} (\S+)", text, flags=re.MULTILINE)
        assert len(named) == len(set(named)) > 0
    series = {}
    for family in text_string_to_metric_families(text):
        assert family.type == "gauge" and family.documentation
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in series
            series[key] = sample.value
    assert 0 < len(series) <= exporter.SERIES_MAX
    return series


def once(*roots):
    result = run(*roots, "--once")
    assert result.returncode == 0, result.stderr
    return parsed(result.stdout)


def values(series, **labels):
    """Metric without its prefix -> value, of the series that have exactly these labels."""
    wanted = tuple(sorted(labels.items()))
    return {name.removeprefix("tokendepot_root_"): value for (name, has), value in series.items() if has == wanted}


def scrape(collector):
    registry = CollectorRegistry()
    registry.register(collector)
    return parsed(generate_latest(registry).decode())


@pytest.fixture
def complaints():
    return []


@pytest.fixture
def two_roots(memory_root, monkeypatch):
    """Read anew by each scrape."""
    monkeypatch.setattr(exporter, "CACHE_S", 0.0)
    monkeypatch.setattr(exporter, "REST", 0)
    roots = [memory_root, memory_root.with_name("other")]
    for root in roots:
        filled_root(root, chunks=3)
    return roots


def label_of(root):
    return tokendepot.inspect_root(str(root))["root_id"][:8]


# --- what it says ---


def test_a_root_says_what_stat_says(root):
    filled_root(root, chunks=40)
    info = tokendepot.inspect_root(str(root))
    series = once(f"{root}?capacity=16MiB")
    label = label_of(root)
    assert {name for name, _ in series} == set(exporter.METRICS)
    plain = values(series, root=label)
    assert plain["up"] == 1
    assert plain["capacity_bytes"] == 16 << 20
    assert plain["used_bytes"] == info["file_bytes"]
    assert plain["live_bytes"] == info["live_bytes"] > 0
    assert plain["extents"] == 40
    assert plain["journal_records"] == sum(j["records"] for j in info["journals"])
    assert plain["journal_bytes"] == sum(file.stat().st_size for file in (root / "journals").iterdir())
    assert plain["last_used_timestamp_seconds"] == max(s["last_used"] for s in info["segments"])
    assert (plain["damaged_files"], plain["journal_bad_records"], plain["namespaces"]) == (0, 0, 1)
    sealed = [s for s in info["segments"] if s["sealed"]]
    assert values(series, root=label, state="sealed") == {"segments": len(sealed)}
    assert values(series, root=label, state="open") == {"segments": len(info["segments"]) - len(sealed)}
    assert plain["dead_bytes"] == sum(s["file_bytes"] - s["live_bytes"] for s in sealed) > 0
    digest = info["namespaces"][0]["digest"][:12]
    of_namespace = {"namespace_bytes": info["live_bytes"], "namespace_extents": 40}
    assert values(series, root=label, namespace=digest) == of_namespace
    assert values(series, root=label, namespace="other") == {"namespace_bytes": 0, "namespace_extents": 0}


def test_capacity_is_not_made_up(memory_root):
    filled_root(memory_root)
    assert "capacity_bytes" not in values(once(memory_root), root=label_of(memory_root))


def test_a_writer_counts_while_it_runs(memory_root):
    depot = Depot.open(config(memory_root))
    label = label_of(memory_root)
    assert values(once(memory_root), root=label, state="in_use") == {"journals": 1}
    depot.close()
    series = once(memory_root)
    assert values(series, root=label, state="in_use") == {"journals": 0}
    assert values(series, root=label, state="idle") == {"journals": 1}


def test_damage_counts(memory_root):
    filled_root(memory_root)
    manifest = next((memory_root / "manifests").iterdir())
    manifest.write_bytes(manifest.read_bytes()[:-1])
    assert values(once(memory_root), root=label_of(memory_root))["damaged_files"] == 1
    (memory_root / "policies").write_bytes(b"no rules")
    assert values(once(memory_root), root=label_of(memory_root))["damaged_files"] == 2


def test_salts_paths_and_models_are_in_no_label(memory_root):
    depot = Depot.open(config(memory_root))
    namespace = depot.register_namespace(MANIFEST)
    cache = Cache(64, seed=1)
    cache.lend_to(depot)
    store(depot, namespace, keys_of(namespace, 1))
    before = run(memory_root, "--once").stdout
    for i in range(50):
        assert store(depot, namespace, keys_of(namespace, 1, salt=f"tenant-{i}"), job=i + 2)["items_ok"] == 1
    after = run(memory_root, "--once").stdout
    depot.close()
    assert parsed(before).keys() == parsed(after).keys()
    assert values(parsed(after), root=label_of(memory_root))["extents"] == 51
    for word in ("tenant", "test/model", str(memory_root), memory_root.name + "?"):
        assert word not in after


@pytest.mark.parametrize("roots, named", [(1, 8), (7, 1), (8, 0)])
def test_many_namespaces_do_not_make_many_series(memory_root, roots, named):
    paths = [memory_root.with_name(f"root-{i}") for i in range(roots)]
    for path in paths:
        depot = Depot.open(config(path))
        cache = Cache(64, seed=1)
        cache.lend_to(depot)
        for i in range(12):
            namespace = depot.register_namespace(json.dumps({"model": f"model-{i}"}))
            assert store(depot, namespace, keys_of(namespace, i + 1), job=i + 1)["items_ok"] == i + 1
        depot.close()
    series = once(*(f"{path}?capacity=16MiB" for path in paths))
    label = label_of(paths[0])
    shown = {
        dict(labels)["namespace"]: value
        for (name, labels), value in series.items()
        if name == "tokendepot_root_namespace_extents" and dict(labels)["root"] == label
    }
    largest = sorted((value for namespace, value in shown.items() if namespace != "other"), reverse=True)
    assert largest == list(range(12, 12 - named, -1))
    assert shown["other"] == sum(range(1, 13)) - sum(largest)


# --- roots that go, hang, come back ---


def test_a_root_that_vanishes_is_down_until_it_is_back(two_roots, complaints):
    first, second = two_roots
    labels = [label_of(root) for root in two_roots]
    collector = exporter.RootsCollector([(str(root), None) for root in two_roots], complaints.append)
    first.rename(first.with_name("away"))
    for _ in range(2):
        series = scrape(collector)
        assert values(series, root=labels[0]) == {"up": 0}
        assert values(series, root=labels[1])["up"] == 1
    assert len(complaints) == 1 and labels[0] in complaints[0]
    first.with_name("away").rename(first)
    assert values(scrape(collector), root=labels[0])["up"] == 1


def test_another_root_in_its_place_is_not_taken_for_it(two_roots, complaints):
    first, second = two_roots
    label, other = label_of(first), label_of(second)
    collector = exporter.RootsCollector([(str(first), None)], complaints.append)
    shutil.rmtree(first)
    second.rename(first)
    series = scrape(collector)
    assert values(series, root=label) == {"up": 0}
    assert values(series, root=other) == {}
    assert other in complaints[0]


def test_a_root_that_hangs_holds_up_no_scrape(two_roots, complaints, monkeypatch):
    labels = [label_of(root) for root in two_roots]
    collector = exporter.RootsCollector([(str(root), None) for root in two_roots], complaints.append)
    go_on = threading.Event()
    inspect = tokendepot.inspect_root

    def hanging(path):
        if path == str(two_roots[0]):
            go_on.wait(30)
        return inspect(path)

    monkeypatch.setattr(exporter._core, "inspect_root", hanging)
    monkeypatch.setattr(exporter, "PATIENCE_S", 0.2)
    try:
        series = scrape(collector)
        assert values(series, root=labels[0])["up"] == 1, "what was read before is still true"
        monkeypatch.setattr(exporter, "HUNG_S", 0.0)
        series = scrape(collector)
        assert values(series, root=labels[0]) == {"up": 0}
        assert values(series, root=labels[1])["up"] == 1
    finally:
        go_on.set()
    monkeypatch.setattr(exporter, "PATIENCE_S", 20.0)
    assert values(scrape(collector), root=labels[0])["up"] == 1


def test_scrapes_at_once_read_a_root_once(memory_root, complaints, monkeypatch):
    filled_root(memory_root)
    calls = []
    inspect = tokendepot.inspect_root
    monkeypatch.setattr(exporter._core, "inspect_root", lambda path: calls.append(path) or inspect(path))
    monkeypatch.setattr(exporter, "CACHE_S", 3600.0)
    collector = exporter.RootsCollector([(str(memory_root), None)], complaints.append)
    with ThreadPoolExecutor(8) as pool:
        scrapes = list(pool.map(lambda _: scrape(collector), range(40)))
    assert len(calls) == 1
    assert all(one == scrapes[0] for one in scrapes)


# --- serving ---


def test_it_serves_until_sigterm_and_seven_others_say_that_the_port_is_taken(memory_root):
    filled_root(memory_root)
    with serving(memory_root) as (process, url):
        with urllib.request.urlopen(url, timeout=20) as answer:
            assert values(parsed(answer.read().decode()), root=label_of(memory_root))["extents"] == 8
        port = re.search(r":(\d+)/", url)[1]
        with ThreadPoolExecutor(7) as pool:
            others = list(pool.map(lambda _: run(memory_root, "--port", port), range(7)))
        for other in others:
            assert other.returncode == 3
            assert other.stdout == ""
            assert re.fullmatch(rf"tokendepot: .*port {port}: .*--port.*\n", other.stderr)
        with urllib.request.urlopen(url, timeout=20) as answer:
            assert values(parsed(answer.read().decode()), root=label_of(memory_root))["extents"] == 8
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0


def test_the_same_is_told_as_json(memory_root):
    filled_root(memory_root)
    told = json.loads(run(memory_root, "--once", "--json").stdout)
    assert told["roots"] == [{"root": label_of(memory_root), "path": str(memory_root)}]
    as_text = [f"{name}{sorted(dict(labels).items())}" for name, labels in parsed(run(memory_root, "--once").stdout)]
    assert sorted(f"{m['name']}{sorted(m['labels'].items())}" for m in told["metrics"]) == sorted(as_text)
    assert {m["name"]: m["value"] for m in told["metrics"]}["tokendepot_root_extents"] == 8
    command = [sys.executable, "-m", "tokendepot", "metrics", str(memory_root), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        lines = ""
        while not lines.endswith("\n}\n"):
            line = process.stdout.readline()
            assert line, lines
            lines += line
        with urllib.request.urlopen(json.loads(lines)["url"], timeout=20) as answer:
            assert "tokendepot_root_up" in answer.read().decode()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0


def test_bad_arguments_are_refused_and_change_nothing(memory_root):
    filled_root(memory_root)
    copy = memory_root.with_name("copy")
    shutil.copytree(memory_root, copy)
    before = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in memory_root.rglob("*"))
    for arguments, words in (
        ([], "ROOT"),
        ([memory_root.parent], "not the root of a depot"),
        ([memory_root.with_name("none")], "not the root of a depot"),
        ([memory_root, copy], "id"),
        ([memory_root] * 9, "9 roots"),
        ([f"{memory_root}?capacity=8G"], "capacity"),
        ([f"{memory_root}?capcity=8GiB"], "capcity"),
        ([memory_root, "--port", "65536"], "65535"),
        ([memory_root, "--prot", "1"], "--prot"),
    ):
        result = run(*arguments, "--once")
        assert result.returncode == 2, arguments
        assert words in re.sub(r"[\s│]+", " ", result.stderr), result.stderr
        assert result.stdout == ""
    assert sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in memory_root.rglob("*")) == before


def test_a_missing_package_is_named(memory_root):
    script = "import sys; sys.modules['prometheus_client'] = None; from tokendepot.cli import main; main()"
    command = [sys.executable, "-c", script, "metrics", str(memory_root)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, timeout=60)
    assert result.returncode == 2
    assert "pip install 'tokendepot[metrics]'" in result.stderr and "Traceback" not in result.stderr
