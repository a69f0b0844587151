"""Whatever fails, the text stays right, the engine alive and the fault visible."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokendepot import _core
from tokendepot.engines.vllm import scheduler, self_test, versions
from tokendepot.engines.vllm.settings import RefusedError
from tokendepot.engines.vllm.worker import WorkerHalf

import harness
import torch
from fake_cache import DEFAULT_FAMILY
from harness import Engine
from lab import (
    LENGTH,
    PROMPTS,
    Lab,
    ask,
    case,
    damage,
    engine_lines,
    flip_byte,
    keys_of,
    lines,
    make_read_only,
    same,
    segment_path,
    small_file_system,
    store_prompts,
)


@case
def corrupt_extents_are_recomputed_and_healed(lab: Lab) -> None:
    for hybrid in (False, True):
        root = lab.root / str(hybrid)
        store_prompts(lab, hybrid=hybrid, root=str(root))
        damage(root)
        engine = lab.engine(hybrid=hybrid, root=str(root), policy="fail")
        same(engine.run(PROMPTS, LENGTH), lab.expected(hybrid))
        assert engine.failures() > 0 and engine.loaded() == 0
        assert 1 <= engine.stats["failed_requests"] <= len(PROMPTS)
        assert lines.having("kv_load_failure_policy", "WARNING")
        assert lines.having("not loaded (corrupt)", "WARNING")
        before = engine.failures()
        same(engine.run(PROMPTS, LENGTH), lab.expected(hybrid))
        assert engine.failures() == before and engine.loaded() > 0, "what was computed again is stored again"
        assert not engine.half._loads


@case
def a_bad_key_is_tried_at_most_twice(lab: Lab) -> None:
    store_prompts(lab)
    engine = lab.engine()
    bad = keys_of(engine, PROMPTS[0])[1]
    damage(lab.root, lambda extent: extent["key"] in (bad, bad.hex()))
    same(engine.run(PROMPTS[:2], LENGTH), lab.expected()[:2])
    assert 1 <= engine.failures() <= 2
    same(engine.run(PROMPTS, LENGTH), lab.expected())
    assert engine.failures() <= 2
    assert ask(engine, PROMPTS[0]) == 128, "stored anew, so promised again"


@case
def a_request_whose_load_failed_computes_also_where_it_does_not_fit_twice(lab: Lab) -> None:
    long = [[(29 * number) % 240 + 3 for number in range(400)]]
    expected = lab.expected(prompts=long)
    engine = lab.engine()
    engine.run(long, 1)
    lab.stop(engine)
    engine = lab.engine(blocks=30, extra={"load_timeout": 1e-9})
    engine.half._forget = lambda *_: None  # as if somebody had stored it anew meanwhile
    same(engine.run(long, LENGTH), expected)
    assert engine.external == 1 and engine.failures() > 0


@case
def truncated_segments_are_misses(lab: Lab) -> None:
    for name, kept in (("none", 0.0), ("half", 0.5)):
        root = lab.root / name
        store_prompts(lab, root=str(root))
        first = {}
        for extent in sorted(_core.list_extents(str(root)), key=lambda extent: extent["offset"]):
            first.setdefault(segment_path(root, extent), extent)
        for path, extent in first.items():
            os.truncate(path, int((extent["offset"] + extent["bytes"]) * kept))
        engine = lab.engine(root=str(root))
        same(engine.run(PROMPTS, LENGTH), lab.expected())
        if kept == 0.0:
            _nothing_loads_and_it_is_said(engine, "absent")
        else:  # what is known to lie behind the end of its file is not even promised
            assert engine.loaded() == 0 and engine.failures() == 0, engine.stats
        same(engine.run(PROMPTS, LENGTH), lab.expected())
        assert engine.loaded() > 0, "what was computed again is stored again"


@case
def four_kinds_of_damage_end_for_requests_that_share_them(lab: Lab) -> None:
    """Trial D5: every extent in a segment of its own, four of them damaged, two requests that want them at once."""
    words = [3 + (7 * n * n + n) % 240 for n in range(600)]
    prompts, capacity = [words, words[:450] + words[:100]], "64MiB&segment=24KiB"
    writer = lab.engine(capacity=capacity)
    for _ in range(3):
        same(writer.run(prompts, LENGTH), lab.expected(prompts=prompts))
        if ask(writer, words) == 576:
            break
    keys = keys_of(writer, words)
    lab.stop(writer)
    place = {extent["key"]: segment_path(lab.root, extent) for extent in _core.list_extents(str(lab.root))}
    paths = [place[keys[chunk]] for chunk in (3, 4, 5, 6)]
    assert len(set(paths)) == 4, "each in a segment of its own"
    paths[0].unlink()
    os.truncate(paths[1], 12 << 10)
    os.truncate(paths[2], 0)
    paths[3].unlink()
    paths[3].mkdir()  # nobody reads this either; root would read a file of mode 000
    engine = lab.engine(capacity=capacity)
    assert ask(engine, words) == 192, "an unlinked segment is seen when the depot is opened"
    same(engine.run(prompts, LENGTH), lab.expected(prompts=prompts))
    assert engine.failures() <= 2 * 4, engine.stats
    for _ in range(3):
        same(engine.run(prompts, LENGTH), lab.expected(prompts=prompts))
        if ask(engine, words) == 576:
            break
    assert engine.failures() <= 2 * 4, engine.stats
    failed, loaded = engine.failures(), engine.loaded()
    assert ask(engine, words) == 576, "what was computed again is stored again"
    same(engine.run(prompts, LENGTH), lab.expected(prompts=prompts))
    assert engine.failures() == failed and engine.loaded() > loaded


@case
def a_chunk_without_one_of_its_groups_is_no_hit(lab: Lab) -> None:
    """Trial D7: the last window of a hit is forgotten, damaged after its look-up, or was never stored."""
    words = [3 + (5 * n * n + n) % 240 for n in range(230)]

    def hit(engine: Engine) -> int:
        return engine.half._depot.longest_prefix(b"".join(keys_of(engine, words)), engine.half._wants)

    for name in ("before", "between", "never"):
        root = str(lab.root / name)
        engine = lab.engine(hybrid=True, root=root)
        if name == "never":
            engine.ranks[0].connector._worker_half._storing_groups = {0}
        for _ in range(3):
            same(engine.run([words], LENGTH), lab.expected(True, [words]))
            if name == "never" or hit(engine) == 3:
                break
        last = keys_of(engine, words)[2]
        lab.stop(engine)
        engine = lab.engine(hybrid=True, root=root)
        if name == "before":
            engine.half._depot.forget(last, 1)
        assert hit(engine) == {"before": 2, "between": 3, "never": 0}[name], name
        if name == "between":
            engine.between = _DamageOnce(root, last)
        same(engine.run([words], LENGTH), lab.expected(True, [words]))
        assert (engine.failures() > 0) == (name == "between"), (name, engine.stats)


class _DamageOnce:
    """Damages the second group of a chunk when the first load is on its way to the workers."""

    def __init__(self, root: str, key: bytes) -> None:
        self.root, self.key, self.done = root, key, False

    def __call__(self, so) -> None:
        orders = so.kv_connector_metadata
        if not self.done and (orders.loads or orders.holds):
            self.done = True
            damage(self.root, lambda extent: extent["group"] == 1 and extent["key"] == self.key)


@case
def a_root_that_vanishes_leaves_the_engine_running(lab: Lab) -> None:
    store_prompts(lab)
    engine = lab.engine()
    # Its name goes at once: a depot that is open may make a file in a directory that is just being emptied.
    gone = lab.root.rename(lab.root.with_name(f"{lab.root.name}-gone"))
    shutil.rmtree(gone, ignore_errors=True)
    same(engine.run(PROMPTS, LENGTH), lab.expected())
    same(engine.run(PROMPTS[::-1], LENGTH), lab.expected()[::-1])
    # A file that is open is still read after its name has gone; of a mapped root none is open yet.
    failed = engine.failures()
    assert engine.stats.get("hit_tokens", 0) > 0 and engine.loaded() + failed > 0, engine.stats
    assert failed == engine.stats.get("failures:load:absent", 0)
    assert "bytes_by:load:mapped" not in engine.stats
    assert bool(lines.having("not loaded (absent)", "WARNING")) == (failed > 0)


def _nothing_loads_and_it_is_said(engine: Engine, reason: str) -> None:
    counted = engine.stats.get(f"failures:load:{reason}", 0)
    assert engine.loaded() == 0 and engine.failures() == counted > 0, engine.stats
    assert lines.having(f"not loaded ({reason})", "WARNING")
    lines.clear()


@case
def without_free_space_nothing_is_stored_and_it_is_said(lab: Lab) -> None:
    with engine_lines() as said:
        engine = lab.engine(extra={"free_space_reserve": "1000000TiB"})
        for _ in range(2):
            same(engine.run(PROMPTS, LENGTH), lab.expected())
    assert engine.failures("store") == engine.stats.get("failures:store:dropped", 0) > 0
    assert "store_extents" not in engine.stats and engine.loaded() == 0
    complaints = [line for line in said if "no space for stores" in line]
    assert len(complaints) == 1 and "free_space_reserve" in complaints[0], said
    assert lines.having("chunk not stored (dropped)", "WARNING")


@case
def a_full_disk_is_used_again_when_it_has_space(lab: Lab) -> None:
    small, ballast = lab.root / "small", lab.root / "small" / "ballast"
    with small_file_system(small, 8):
        ballast.write_bytes(bytes((8 << 20) - (512 << 10)))  # less than a segment is left
        with engine_lines() as said:
            engine = lab.engine(root=str(small / "depot"), capacity="8MiB", extra={"free_space_reserve": 0})
            same(engine.run(PROMPTS, LENGTH), lab.expected())
        assert engine.stats.get("failures:store:dropped", 0) > 0 and "store_extents" not in engine.stats
        assert len([line for line in said if "no space for stores" in line]) == 1, said
        ballast.unlink()
        for _ in range(20):
            same(engine.run(PROMPTS, LENGTH), lab.expected())
            if engine.loaded():
                break
        assert engine.loaded() > 0


@case
def a_read_only_file_system_is_served_and_not_stored_to(lab: Lab) -> None:
    small, other = lab.root / "small", [PROMPTS[0][::-1]]
    with small_file_system(small, 64):
        root = str(small / "depot")
        store_prompts(lab, root=root)
        make_read_only(small)
        with engine_lines() as said:
            engine = lab.engine(root=root)
        expected = "is not writable (read-only file system): serving what it holds, storing nothing there"
        assert len([line for line in said if root in line and expected in line]) == 2, said  # two processes
        same(engine.run(PROMPTS, LENGTH), lab.expected())
        assert engine.loaded() > 0 and engine.failures() == 0
        same(engine.run(other, LENGTH), lab.expected(prompts=other))
        assert engine.stats.get("failures:store:dropped", 0) > 0 and "store_extents" not in engine.stats
        assert lines.having("chunk not stored (dropped)", "WARNING")


@case
def a_flipped_byte_in_a_journal_costs_the_chunk_it_spoke_of(lab: Lab) -> None:
    store_prompts(lab)
    (journal,) = (lab.root / "journals").iterdir()
    flip_byte(journal, 128 + 64)  # the first record of an extent
    with engine_lines() as said:
        engine = lab.engine()
        same(engine.run(PROMPTS, LENGTH), lab.expected())
    complaints = [line for line in said if f"journal {journal.name} has 1 damaged records" in line]
    assert len(complaints) == 2 and complaints[0] == complaints[1], said  # one in each of the two processes
    assert engine.failures() == 0 and engine.stats.get("store_extents", 0) == 1, engine.stats
    for prompt in PROMPTS:
        whole = (len(prompt) - 1) // engine.options.chunk * engine.options.chunk
        assert ask(engine, prompt) == whole, "what was computed again is stored again"


@case
def a_flipped_byte_in_the_marker_keeps_the_depot_out(lab: Lab) -> None:
    store_prompts(lab)
    marker = lab.root / "DEPOT"
    flip_byte(marker, 20)
    damaged = marker.read_bytes()
    lines.clear()
    engine = lab.engine()
    for _ in range(2):
        same(engine.run(PROMPTS, LENGTH), lab.expected())
    said = lines.having("not used", "ERROR")
    assert len(said) == 2 and said[0] == said[1], said  # one line in each of the two processes
    assert str(lab.root) in said[0] and "marker has digest" in said[0]
    assert engine.loaded() == 0 and "store_extents" not in engine.stats
    assert marker.read_bytes() == damaged, "a root that is not understood is not touched"


@case
def a_flipped_byte_in_a_manifest_is_mended_at_start(lab: Lab) -> None:
    store_prompts(lab)
    (manifest,) = (lab.root / "manifests").iterdir()
    whole = manifest.read_bytes()
    flip_byte(manifest, 20)
    with engine_lines() as said:
        engine = lab.engine()
    assert manifest.read_bytes() == whole
    complaints = [line for line in said if "was damaged and is written anew" in line]
    assert len(complaints) == 1 and manifest.name in complaints[0], said
    same(engine.run(PROMPTS, LENGTH), lab.expected())
    assert engine.loaded() > 0 and engine.failures() == 0
    assert engine.stats["mended_manifests"] == 1 and engine.stats["open_seconds"] > 0


@case
def a_load_past_its_deadline_is_recomputed(lab: Lab) -> None:
    store_prompts(lab)
    engine = lab.engine(extra={"load_timeout": 1e-9})
    same(engine.run(PROMPTS, LENGTH), lab.expected())
    assert engine.stats["failures:load:timed_out"] > 0
    assert lines.having("timed_out", "WARNING")


@case
def a_depot_that_closes_under_way_fails_its_loads(lab: Lab) -> None:
    store_prompts(lab)
    engine = lab.engine()

    def close(so) -> None:
        if so.kv_connector_metadata.loads:
            engine.ranks[0].connector._worker_half._depot.close()

    engine.between = close
    same(engine.run(PROMPTS, LENGTH), lab.expected())
    assert lines.having("switched off", "ERROR")
    engine.between = None
    external = engine.external
    same(engine.run(PROMPTS, LENGTH), lab.expected())
    assert engine.external == external, "a rank without a depot is not promised to again"


@case
def a_promise_that_cannot_be_planned_is_a_failed_load(lab: Lab) -> None:
    for hybrid in (False, True):
        root = str(lab.root / str(hybrid))
        store_prompts(lab, hybrid=hybrid, root=root)
        engine = lab.engine(hybrid=hybrid, root=root)
        half, plan = engine.half, engine.half._plan
        calls: list[int] = []
        half._plan = lambda keys, groups, calls=calls: calls.append(1)
        same(engine.run(PROMPTS, LENGTH), lab.expected(hybrid))
        assert calls and len(calls) <= 2 * len(PROMPTS)
        # Where verified first, nothing is promised before its plan.
        planned_first = hybrid and not versions.REQUEST_LEVEL_FAILURES
        assert engine.stats.get("broken_promises", 0) == (0 if planned_first else len(calls))
        assert engine.loaded() == 0
        half._plan = plan
        same(engine.run(PROMPTS, LENGTH), lab.expected(hybrid))
        assert engine.loaded() > 0


@case
def a_worker_that_refuses_its_cache_switches_the_depot_off(lab: Lab) -> None:
    store_prompts(lab)
    other = next(family for family in ("BPNHD", "BNHC", "PBHND") if family != DEFAULT_FAMILY)
    declared = versions.declared_shape
    versions.declared_shape = lambda *_: tuple(other)
    try:
        engine = lab.engine()
    finally:
        versions.declared_shape = declared
    same(engine.run(PROMPTS, LENGTH), lab.expected())
    assert engine.loaded() == 0
    assert len(lines.having("not used", "ERROR")) == 1
    assert engine.stats["switched_off"] == 2, "the rank, and the scheduler's half that heard of it"


def _runs_without_it(lab: Lab, engine: Engine, reason: str) -> None:
    same(engine.run(PROMPTS, LENGTH), lab.expected())
    assert engine.loaded() == 0
    assert sum(reason in line for line in lines.having("not used", "ERROR")) == 1


@case
def a_cache_of_another_dtype_than_the_engine_declares_switches_the_depot_off(lab: Lab) -> None:
    store_prompts(lab)
    allocated = harness.allocate

    def of_another_dtype(*arguments: Any) -> Any:
        tensors, cells = allocated(*arguments)
        return {name: tensor.to(torch.float64) for name, tensor in tensors.items()}, cells

    harness.allocate = of_another_dtype
    try:
        engine = lab.engine()
    finally:
        harness.allocate = allocated
    _runs_without_it(lab, engine, "has a cache tensor of torch.float64 where the engine declares torch.")


@case
def a_device_that_the_cache_is_not_on_switches_the_depot_off(lab: Lab) -> None:
    store_prompts(lab)
    engine = lab.engine(extra={"device": "cuda:3"})
    _runs_without_it(lab, engine, '"device" is "cuda:3" but the KV cache is on "host"')


@case
def a_scheduler_that_refuses_alone_is_counted_by_the_worker(lab: Lab) -> None:
    def unidentified(*_) -> dict:
        raise RefusedError("its weights cannot be identified")

    made, scheduler.manifest = scheduler.manifest, unidentified
    try:
        engine = lab.engine()
    finally:
        scheduler.manifest = made
    same(engine.run(PROMPTS, LENGTH), lab.expected())
    assert engine.half is None and len(lines.having("weights cannot be identified", "ERROR")) == 1
    assert engine.stats["switched_off"] == 1 and "store_extents" not in engine.stats


class Plant(SimpleNamespace):
    """The native module with a fault in it, as the self-test sees it."""

    def __init__(self, depot=lambda depot, root: depot, **parts) -> None:
        def opened(config: str, **named):
            root = json.loads(config)["roots"][0].split("?")[0]
            self.roots.append(root)
            return depot(_core.Depot.open(config, **named), root)

        super().__init__(**{**vars(_core), "Depot": SimpleNamespace(open=opened), "roots": [], **parts})


class WithFault:
    """A depot of which one call does something before or after."""

    def __init__(self, depot, call: str, *, before=lambda: None, after=lambda: None) -> None:
        def faulty(*arguments):
            before()
            answer = getattr(depot, call)(*arguments)
            after()
            return answer

        self._depot = depot
        setattr(self, call, faulty)

    def __getattr__(self, name: str):
        return getattr(self._depot, name)


class OtherKeysForArrays:
    """Keys that depend on the form of the token ids, as if stores and look-ups made them in two places."""

    def __init__(self, namespace: bytes, tokens: int) -> None:
        self._chain = _core.KeyChain(namespace, tokens)

    def append(self, ids) -> None:
        self._chain.append(ids if isinstance(ids, list) else [number + 1 for number in ids])

    def keys(self) -> bytes:
        return self._chain.keys()


@case
def a_fault_that_the_self_test_finds_keeps_the_depot_out(lab: Lab) -> None:
    spoiled = []

    def spoil() -> None:
        for tensor in spoiled:
            tensor.fill_(5.0)

    faults = (
        (Plant(KeyChain=OtherKeysForArrays), "what was stored of group 0 is not found"),
        (Plant(lambda depot, root: WithFault(depot, "longest_prefix", before=lambda: damage(root))), "(corrupt)"),
        (Plant(lambda depot, root: WithFault(depot, "submit_store", before=depot.close)), "closed"),
        (Plant(lambda depot, root: WithFault(depot, "poll", after=spoil)), "came back with other bytes"),
    )
    native = self_test._core
    registered = WorkerHalf.attach

    def attach(half, kv_caches) -> None:
        spoiled[:] = kv_caches.values()
        registered(half, kv_caches)

    for plant, complaint in faults:
        lines.clear()
        self_test._core = plant
        WorkerHalf.attach = attach
        try:
            engine = lab.engine()
            try:
                lab.engine(extra={"on_error": "fail"})
            except ValueError as error:
                assert "self-test" in str(error) and complaint in str(error), error
            else:
                raise AssertionError(f"{complaint}: was not found")
        finally:
            self_test._core, WorkerHalf.attach = native, registered
        (said,) = lines.having("not used", "ERROR")
        assert "self-test" in said and complaint in said, said
        same(engine.run(PROMPTS, LENGTH), lab.expected())
        assert engine.stats["switched_off"] == 2 and "store_extents" not in engine.stats
        assert len(plant.roots) == 2 and not any(Path(root).parent.exists() for root in plant.roots)
    same(lab.engine().run(PROMPTS, LENGTH), lab.expected())


@case
def the_self_test_leaves_the_cache_and_the_temporary_directory_as_they_were(lab: Lab) -> None:
    native, self_test._core = self_test._core, Plant()
    try:
        for hybrid in (False, True):
            for layout in ("canonical", "opaque"):
                for tp in (1, 2):
                    root = str(lab.root / f"{hybrid}-{layout}-{tp}")
                    engine = lab.engine(hybrid=hybrid, layout=layout, tp=tp, root=root)
                    assert all((cells == -1.0).all() for rank in engine.ranks for cells in rank.cells.values())
        roots = self_test._core.roots
    finally:
        self_test._core = native
    assert len(roots) == len(lines.having("self-test passed", "INFO")) == 12
    assert not any(Path(root).parent.exists() for root in roots)


@case
def without_a_temporary_directory_nothing_is_tested_and_it_is_said(lab: Lab) -> None:
    def full(path: str) -> SimpleNamespace:
        return SimpleNamespace(free=1 << 20)

    usage, shutil.disk_usage = shutil.disk_usage, full
    try:
        engine = lab.engine()
    finally:
        shutil.disk_usage = usage
    assert lines.having("no self-test: no temporary directory has room for 4 MiB", "WARNING")
    same(engine.run(PROMPTS, LENGTH), lab.expected())
    assert engine.stats["store_extents"] > 0
