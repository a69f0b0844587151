"""Cold, warm and restarted text is equal, on any layout and over any number of ranks."""

from __future__ import annotations

from fake_cache import FAMILIES
from lab import (
    LENGTH,
    PROMPTS,
    Lab,
    case,
    damage,
    run_one_by_one,
    same,
)


def _cold_warm_restart(lab: Lab, **options) -> None:
    expected = lab.expected(options.get("hybrid", False))
    first = lab.engine(**options)
    same(first.run(PROMPTS, LENGTH), expected)
    stored = int(first.stats.get("store_extents", 0))
    assert stored > 0 and first.loaded() == 0
    same(first.run(PROMPTS, LENGTH), expected)
    assert first.loaded() > 0
    assert first.stats["store_extents"] == stored, "nothing is stored twice"
    assert first.stats["store_seconds"] > 0 and first.stats["store_bytes"] > 0
    lab.stop(first)
    second = lab.engine(**options)
    same(run_one_by_one(second, PROMPTS), expected)
    assert second.loaded() > 0 and second.failures() == 0
    assert second.external == len(PROMPTS)


@case
def warm_and_restarted_text_equals_cold_canonical(lab: Lab) -> None:
    _cold_warm_restart(lab)


@case
def warm_and_restarted_text_equals_cold_opaque(lab: Lab) -> None:
    _cold_warm_restart(lab, layout="opaque")


@case
def warm_and_restarted_text_equals_cold_hybrid(lab: Lab) -> None:
    for layout in ("canonical", "opaque"):
        _cold_warm_restart(lab, hybrid=True, layout=layout, root=str(lab.root / layout))


@case
def wrong_bytes_would_change_the_text(lab: Lab) -> None:
    for hybrid in (False, True):
        engine = lab.engine(hybrid=hybrid, root=str(lab.root / str(hybrid)))
        expected = lab.expected(hybrid)
        same(engine.run(PROMPTS, LENGTH), expected)
        engine.spoil_loads = True
        assert engine.run(PROMPTS, LENGTH) != expected


@case
def every_tensor_family_round_trips_and_canonical_extents_fit_all(lab: Lab) -> None:
    expected = lab.expected()
    for layout in ("canonical", "opaque"):
        for number, family in enumerate(FAMILIES):
            root = lab.root / layout / ("one" if layout == "canonical" else family)
            for start in ("first", "again"):
                engine = lab.engine(layout=layout, family=family, root=str(root))
                same(engine.run(PROMPTS, LENGTH), expected)
                cold = start == "first" and (number == 0 or layout == "opaque")
                assert (engine.loaded() == 0) == cold, (layout, family, start)
                lab.stop(engine)


@case
def block_size_does_not_matter_to_canonical_extents(lab: Lab) -> None:
    expected = lab.expected()
    for number, size in enumerate((16, 32, 64)):
        engine = lab.engine(block_size=size, blocks=100)
        same(engine.run(PROMPTS, LENGTH), expected)
        assert (engine.loaded() > 0) == (number > 0)
        lab.stop(engine)


@case
def two_engines_share_one_root_while_both_run(lab: Lab) -> None:
    expected = lab.expected()
    one, two = lab.engine(), lab.engine()
    same(one.run(PROMPTS[:2], LENGTH), expected[:2])
    two.settle()
    same(two.run(PROMPTS, LENGTH), expected)
    assert two.loaded() > 0
    one.settle()
    same(one.run(PROMPTS, LENGTH), expected)
    assert one.loaded() > 0


@case
def asynchronous_scheduling_stores_only_known_tokens(lab: Lab) -> None:
    expected = lab.expected(length=40)
    engine = lab.engine(asynchronous=True)
    same(engine.run(PROMPTS, 40), expected)
    lab.stop(engine)
    engine = lab.engine(asynchronous=True)
    same(engine.run(PROMPTS, 40), expected)
    assert engine.loaded() > 0
    follow = [PROMPTS[0] + expected[0] + [5, 6, 7] * 10]
    same(engine.run(follow, LENGTH), lab.expected(prompts=follow))


@case
def rejected_drafts_are_never_stored(lab: Lab) -> None:
    expected = lab.expected(length=40)
    engine = lab.engine(drafts=3)
    for prompt, text in zip(PROMPTS, expected, strict=True):
        engine.draft_from[tuple(prompt[:8])] = prompt + text
        same(engine.run([prompt], 40), [text])
    lab.stop(engine)
    engine = lab.engine()
    follow = [prompt + text + [5, 6, 7] * 10 for prompt, text in zip(PROMPTS, expected, strict=True)]
    same(run_one_by_one(engine, follow), lab.expected(prompts=follow))
    assert engine.loaded() > 0 and engine.stats["hit_tokens"] >= sum(len(p) + 40 - 64 - 1 for p in PROMPTS)


@case
def prefix_caching_may_be_off(lab: Lab) -> None:
    expected = lab.expected()
    engine = lab.engine(prefix_caching=False)
    same(engine.run(PROMPTS, LENGTH), expected)
    same(engine.run(PROMPTS, LENGTH), expected)
    assert engine.loaded() > 0


@case
def tensor_parallel_ranks_keep_their_shards_and_other_sizes_read_them(lab: Lab) -> None:
    expected = lab.expected()
    _cold_warm_restart(lab, tp=2)
    engine = lab.engine(tp=1)
    same(engine.run(PROMPTS, LENGTH), expected)
    assert engine.loaded() > 0 and "store_extents" not in engine.stats
    lab.stop(engine)
    _cold_warm_restart(lab, tp=2, layout="opaque", root=str(lab.root / "opaque"))
    engine = lab.engine(tp=1, layout="opaque", root=str(lab.root / "opaque"))
    same(engine.run(PROMPTS, LENGTH), expected)
    assert engine.loaded() == 0, "opaque pages are for an equal engine only"


@case
def one_rank_that_fails_makes_both_recompute(lab: Lab) -> None:
    expected = lab.expected()
    engine = lab.engine(tp=2)
    same(engine.run(PROMPTS, LENGTH), expected)
    lab.stop(engine)
    damage(lab.root, lambda extent: tuple(extent["part"])[2] == 1)
    engine = lab.engine(tp=2)
    same(engine.run(PROMPTS, LENGTH), expected)
    assert engine.failures() > 0 and engine.loaded() > 0
    before = engine.failures()
    same(engine.run(PROMPTS, LENGTH), expected)
    assert engine.failures() == before, "what was computed again is stored again"


@case
def pipeline_ranks_keep_their_layers_and_other_sizes_read_them(lab: Lab) -> None:
    _cold_warm_restart(lab, pp=2)
    engine = lab.engine()
    same(engine.run(PROMPTS, LENGTH), lab.expected())
    assert engine.loaded() > 0 and "store_extents" not in engine.stats
