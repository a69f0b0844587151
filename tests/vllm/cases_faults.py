"""Whatever fails, the text stays right, the engine alive and the fault visible."""

from __future__ import annotations

import os
import shutil

from tokendepot.engines.vllm import versions

from harness import DEFAULT_FAMILY
from lab import (
    HYBRID_LOADS,
    LENGTH,
    PROMPTS,
    Lab,
    ask,
    case,
    damage,
    keys_of,
    lines,
    same,
    store_prompts,
)


@case
def corrupt_extents_are_recomputed_and_healed(lab: Lab) -> None:
    for hybrid in (False, True) if HYBRID_LOADS else (False,):
        root = lab.root / str(hybrid)
        store_prompts(lab, hybrid=hybrid, root=str(root))
        damage(root)
        engine = lab.engine(hybrid=hybrid, root=str(root), policy="fail")
        same(engine.run(PROMPTS, LENGTH), lab.expected(hybrid))
        assert engine.failures() > 0 and engine.loaded() == 0
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
def truncated_segments_are_misses(lab: Lab) -> None:
    store_prompts(lab)
    for number, path in enumerate(sorted((lab.root / "segments").iterdir())):
        os.truncate(path, os.path.getsize(path) // 2 if number % 2 == 0 else 0)
    engine = lab.engine()
    same(engine.run(PROMPTS, LENGTH), lab.expected())
    same(engine.run(PROMPTS, LENGTH), lab.expected())


@case
def a_root_that_vanishes_leaves_the_engine_running(lab: Lab) -> None:
    store_prompts(lab)
    engine = lab.engine()
    shutil.rmtree(lab.root)
    same(engine.run(PROMPTS, LENGTH), lab.expected())
    same(engine.run(PROMPTS[::-1], LENGTH), lab.expected()[::-1])


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
    for hybrid in (False, True) if HYBRID_LOADS else (False,):
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
