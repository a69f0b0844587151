"""Cases for one vLLM version, run in a process of its own: cases.py MODEL SCRATCH RESULTS [NAME ...]

RESULTS gets one JSON object a line: {"case": ..., "ok": ..., "detail": ..., "seconds": ...}. test_harness.py runs this for
every version and turns each line into a test.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

from harness import ABORTED, DEFAULT_FAMILY, FAMILIES, LAYERS, VERSION, Engine, Options
from tokendepot import _core
from tokendepot.engines.vllm import versions
from vllm.lora.request import LoRARequest

HYBRID_LOADS = VERSION >= (0, 30)
_random = random.Random(3)
SHARED = [_random.randrange(3, 250) for _ in range(150)]
PROMPTS = [SHARED + [_random.randrange(3, 250) for _ in range(11 + 29 * n)] for n in range(3)] + [SHARED[:128]]
LENGTH = 10


class Lab:
    """A fresh root for each case, and engines that are closed when it ends."""

    def __init__(self, model: str, scratch: Path) -> None:
        self.model, self.scratch = model, scratch
        self.engines: list[Engine] = []
        self.gold: dict = {}
        self.number = 0

    def begin(self) -> None:
        self.number += 1
        self.root = self.scratch / f"root{self.number}"
        lines.clear()

    def end(self) -> None:
        for engine in self.engines:
            engine.close()
        self.engines.clear()
        shutil.rmtree(self.root, ignore_errors=True)

    def engine(self, model: str | None = None, **options) -> Engine:
        options.setdefault("root", str(self.root))
        engine = Engine(model or self.model, Options(**options))
        self.engines.append(engine)
        return engine

    def stop(self, engine: Engine) -> None:
        engine.close()
        self.engines.remove(engine)

    def expected(self, hybrid: bool = False, prompts=None, length: int = LENGTH):
        """What an engine without a depot writes."""
        key = (hybrid, length, json.dumps(prompts))
        if key not in self.gold:
            engine = Engine(self.model, Options(root=str(self.scratch / "none"), hybrid=hybrid, extra={"nonsense": 1}))
            assert engine.half is None
            self.gold[key] = engine.run(prompts or PROMPTS, length)
            engine.close()
        return self.gold[key]


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[str, str]] = []

    def emit(self, record) -> None:
        self.all.append((record.levelname, record.getMessage()))

    def clear(self) -> None:
        self.all.clear()

    def having(self, text: str, level: str | None = None) -> list[str]:
        return [line for name, line in self.all if text in line and level in (None, name)]


lines = Lines()
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def same(got, expected) -> None:
    assert got == expected, f"other text: {[(g, e) for g, e in zip(got, expected, strict=True) if g != e][:1]}"


def damage(root, chosen=lambda extent: True, at: float = 0.6) -> int:
    """Flips one byte inside the payload of the chosen extents; returns how many."""
    count = 0
    for extent in _core.list_extents(str(root)):
        if chosen(extent):
            path = segment_path(root, extent)
            with open(path, "r+b") as file:
                file.seek(extent["offset"] + extent["bytes"] - int(extent["bytes"] * (1 - at)))
                byte = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 0x5A]))
            count += 1
    assert count
    return count


def segment_path(root, extent) -> Path:
    return Path(root) / "segments" / f"{extent['segment']}.seg"


def keys_of(engine: Engine, prompt) -> list[bytes]:
    chain = _core.KeyChain(engine.half._namespace, engine.options.chunk)
    chain.append(prompt)
    joined = bytes(chain.keys())
    return [joined[at : at + 32] for at in range(0, len(joined), 32)]


def request(tokens, **fields) -> SimpleNamespace:
    """What the scheduler half reads of a request."""
    values = dict(request_id=f"q{time.monotonic_ns()}", num_tokens=len(tokens), num_prompt_tokens=len(tokens),
                  all_token_ids=list(tokens), prompt_embeds=None, cache_salt=None, lora_request=None, mm_features=[],
                  resumable=False, streaming_queue=None)
    return SimpleNamespace(**{**values, **fields})


def ask(engine: Engine, tokens, local: int = 0, **fields) -> int:
    one = request(tokens, **fields)
    first = engine.scheduler.connector.get_num_new_matched_tokens(one, local)
    assert first == engine.scheduler.connector.get_num_new_matched_tokens(one, local), "asking twice must not matter"
    assert first[1] == (first[0] != 0), "loads are asynchronous, and only if there is something to load"
    engine.half.finished(one)
    return first[0]


# --- cold, warm, restart ------------------------------------------------------------------------------------------------


def _cold_warm_restart(lab: Lab, **options) -> None:
    expected = lab.expected(options.get("hybrid", False))
    loads = not options.get("hybrid") or HYBRID_LOADS
    first = lab.engine(**options)
    same(first.run(PROMPTS, LENGTH), expected)
    stored = int(first.stats.get("store_extents", 0))
    assert stored > 0 and first.loaded() == 0
    same(first.run(PROMPTS, LENGTH), expected)
    assert (first.loaded() > 0) == loads
    assert first.stats["store_extents"] == stored, "nothing is stored twice"
    lab.stop(first)
    second = lab.engine(**options)
    same(second.run(PROMPTS, LENGTH), expected)
    assert (second.loaded() > 0) == loads and second.failures() == 0
    assert (second.external == len(PROMPTS)) == loads


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
    for hybrid in (False, True) if HYBRID_LOADS else (False,):
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
            for _ in range(2):
                engine = lab.engine(layout=layout, family=family, root=str(root))
                same(engine.run(PROMPTS, LENGTH), expected)
                cold = number == 0 if layout == "canonical" else True
                assert engine.loaded() > 0 or (cold and _ == 0), (layout, family)
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
    assert one.external == 6 - 2 - 0 or one.loaded() > 0


@case
def asynchronous_scheduling_stores_only_known_tokens(lab: Lab) -> None:
    expected = lab.expected(length=80)
    engine = lab.engine(asynchronous=True)
    same(engine.run(PROMPTS, 80), expected)
    lab.stop(engine)
    engine = lab.engine(asynchronous=True)
    same(engine.run(PROMPTS, 80), expected)
    assert engine.loaded() > 0
    follow = [PROMPTS[0] + expected[0] + [5, 6, 7] * 10]
    same(engine.run(follow, LENGTH), lab.expected(prompts=follow))


@case
def rejected_drafts_are_never_stored(lab: Lab) -> None:
    expected = lab.expected(length=80)
    engine = lab.engine(drafts=3)
    for prompt, text in zip(PROMPTS, expected, strict=True):
        engine.draft_from[tuple(prompt[:8])] = prompt + text
        same(engine.run([prompt], 80), [text])
    lab.stop(engine)
    engine = lab.engine()
    follow = [prompt + text + [5, 6, 7] * 10 for prompt, text in zip(PROMPTS, expected, strict=True)]
    same(engine.run(follow, LENGTH), lab.expected(prompts=follow))
    assert engine.loaded() > 0 and engine.stats["hit_tokens"] >= sum(len(p) + 80 - 64 - 1 for p in PROMPTS)


@case
def prefix_caching_may_be_off(lab: Lab) -> None:
    expected = lab.expected()
    engine = lab.engine(prefix_caching=False)
    same(engine.run(PROMPTS, LENGTH), expected)
    same(engine.run(PROMPTS, LENGTH), expected)
    assert engine.loaded() > 0


# --- parallel ranks -----------------------------------------------------------------------------------------------------


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
    lab.stop_after = lab.engine(tp=2)
    same(lab.stop_after.run(PROMPTS, LENGTH), expected)
    lab.stop(lab.stop_after)
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


# --- faults -------------------------------------------------------------------------------------------------------------


def _stored(lab: Lab, **options) -> None:
    engine = lab.engine(**options)
    same(engine.run(PROMPTS, LENGTH), lab.expected(options.get("hybrid", False)))
    lab.stop(engine)


@case
def corrupt_extents_are_recomputed_and_healed(lab: Lab) -> None:
    for hybrid in (False, True) if HYBRID_LOADS else (False,):
        root = lab.root / str(hybrid)
        _stored(lab, hybrid=hybrid, root=str(root))
        damage(root)
        engine = lab.engine(hybrid=hybrid, root=str(root), policy="fail")
        same(engine.run(PROMPTS, LENGTH), lab.expected(hybrid))
        assert engine.failures() > 0 and engine.loaded() == 0
        assert len(lines.having("kv_load_failure_policy", "WARNING")) == 1
        assert lines.having("not loaded (corrupt)", "WARNING")
        before = engine.failures()
        same(engine.run(PROMPTS, LENGTH), lab.expected(hybrid))
        assert engine.failures() == before and engine.loaded() > 0, "what was computed again is stored again"
        assert not engine.half._loads


@case
def a_bad_key_is_tried_at_most_twice(lab: Lab) -> None:
    _stored(lab)
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
    _stored(lab)
    for number, path in enumerate(sorted((lab.root / "segments").iterdir())):
        os.truncate(path, os.path.getsize(path) // 2 if number % 2 == 0 else 0)
    engine = lab.engine()
    same(engine.run(PROMPTS, LENGTH), lab.expected())
    same(engine.run(PROMPTS, LENGTH), lab.expected())


@case
def a_root_that_vanishes_leaves_the_engine_running(lab: Lab) -> None:
    _stored(lab)
    engine = lab.engine()
    shutil.rmtree(lab.root)
    same(engine.run(PROMPTS, LENGTH), lab.expected())
    same(engine.run(PROMPTS[::-1], LENGTH), lab.expected()[::-1])


@case
def a_load_past_its_deadline_is_recomputed(lab: Lab) -> None:
    _stored(lab)
    engine = lab.engine(extra={"load_timeout": 1e-9})
    same(engine.run(PROMPTS, LENGTH), lab.expected())
    assert engine.stats["failures:load:timed_out"] > 0
    assert lines.having("timed_out", "WARNING")


@case
def a_depot_that_closes_under_way_fails_its_loads(lab: Lab) -> None:
    _stored(lab)
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
        _stored(lab, hybrid=hybrid, root=root)
        engine = lab.engine(hybrid=hybrid, root=root)
        half, plan = engine.half, engine.half._plan
        calls = []
        half._plan = lambda keys, groups: calls.append(1) or None
        same(engine.run(PROMPTS, LENGTH), lab.expected(hybrid))
        assert calls and len(calls) <= 2 * len(PROMPTS)
        assert engine.stats["broken_promises"] == len(calls) and engine.loaded() == 0
        half._plan = plan
        same(engine.run(PROMPTS, LENGTH), lab.expected(hybrid))
        assert engine.loaded() > 0


@case
def a_worker_that_refuses_its_cache_switches_the_depot_off(lab: Lab) -> None:
    _stored(lab)
    other = next(family for family in ("BPNHD", "BNHC", "PBHND") if family != DEFAULT_FAMILY)
    import harness

    declared = versions.declared_shape
    versions.declared_shape = lambda *_: tuple(other)
    try:
        engine = lab.engine()
    finally:
        versions.declared_shape = declared
    same(engine.run(PROMPTS, LENGTH), lab.expected())
    assert engine.loaded() == 0
    assert len(lines.having("not used", "ERROR")) == 1 and harness.VERSION


# --- scheduling ---------------------------------------------------------------------------------------------------------


@case
def preemption_with_a_tiny_pool_never_mixes_requests(lab: Lab) -> None:
    for hybrid, blocks in ((False, 24), (True, 40)):
        root, expected = str(lab.root / str(hybrid)), lab.expected(hybrid, length=60)
        engine = lab.engine(blocks=blocks, hybrid=hybrid, root=root)
        same(engine.run(PROMPTS, 60), expected)
        same(engine.run(PROMPTS, 60), expected)
        assert engine.preemptions > 0 or hybrid
        lab.stop(engine)
        engine = lab.engine(hybrid=hybrid, root=root)
        follow = [prompt + text + [9] * 70 for prompt, text in zip(PROMPTS, expected, strict=True)]
        same(engine.run(follow, LENGTH), lab.expected(hybrid, prompts=follow))
        assert engine.loaded() > 0 or (hybrid and not HYBRID_LOADS)


@case
def preemption_with_corrupt_extents(lab: Lab) -> None:
    _stored(lab)
    damage(lab.root)
    engine = lab.engine(blocks=24)
    same(engine.run(PROMPTS, 60), lab.expected(length=60))
    assert engine.failures() > 0


@case
def chunked_prefill_and_preemption_leave_no_hole(lab: Lab) -> None:
    long = [[(7 * n) % 240 + 3 for n in range(1000)]]
    expected = lab.expected(prompts=long)
    engine = lab.engine()
    name = engine.add(long[0], LENGTH)
    for _ in range(4):
        engine.step()
    victim = engine.scheduler.requests[name]
    assert 0 < victim.num_computed_tokens < 1000
    engine.scheduler.running.remove(victim)
    engine.scheduler._preempt_request(victim, time.monotonic())
    engine.scheduler.reset_prefix_cache()
    for rank in engine.ranks:
        for cells in rank.cells.values():
            cells.fill_(777.0)  # the freed blocks belong to others now
    engine.finish([name])
    same([engine.output[name]], expected)
    stored = engine.half._depot.stored(b"".join(keys_of(engine, long[0])), engine.half._wants[0])
    assert list(stored) == [1] * 15, list(stored)
    lab.stop(engine)
    engine = lab.engine()
    same(engine.run(long, LENGTH), expected)
    assert engine.stats["hit_tokens"] == 960


@case
def abort_during_a_load_frees_the_blocks_when_it_ends(lab: Lab) -> None:
    for hybrid in (False, True) if HYBRID_LOADS else (False,):
        root = str(lab.root / str(hybrid))
        _stored(lab, hybrid=hybrid, root=root)
        engine = lab.engine(hybrid=hybrid, root=root)
        free = engine.free_blocks()
        name = engine.add(PROMPTS[0], LENGTH)
        aborted = []

        def abort(so, engine=engine, name=name, aborted=aborted) -> None:
            if so.kv_connector_metadata.loads and not aborted:
                assert engine.free_blocks() < free
                aborted.append(engine.scheduler.finish_requests(name, ABORTED))

        engine.between = abort
        engine.step()
        engine.settle()
        assert aborted and engine.free_blocks() == free
        same(engine.run(PROMPTS, LENGTH), lab.expected(hybrid))
        assert engine.free_blocks() == free and not engine.half._requests and not engine.half._loads


@case
def external_tokens_leave_one_to_compute_and_are_never_negative(lab: Lab) -> None:
    engine = lab.engine(chunk=16)
    prompt = [(11 * n) % 240 + 3 for n in range(300)]
    engine.run([prompt], 2)
    for length in (15, 16, 17, 31, 32, 33, 256, 257):
        assert ask(engine, prompt[:length]) == 16 * ((length - 1) // 16), length
    wide = lab.engine(chunk=256, root=str(lab.root / "wide"))
    long = [(13 * n) % 240 + 3 for n in range(1000)]
    wide.run([long], 2)
    assert ask(wide, long) == 768
    assert ask(wide, long, 832) == 0 and ask(wide, long, 800) == 0 and ask(wide, long, 768) == 0
    assert ask(wide, long, 512) == 256


@case
def only_prompts_are_stored_when_asked_for(lab: Lab) -> None:
    engine = lab.engine(extra={"store": "prompt"})
    texts = engine.run(PROMPTS, 80)
    follow = PROMPTS[0] + texts[0] + [4] * 64
    assert ask(engine, follow) == len(PROMPTS[0]) // 64 * 64


@case
def roles_limit_what_is_done(lab: Lab) -> None:
    consumer = lab.engine(role="kv_consumer")
    same(consumer.run(PROMPTS, LENGTH), lab.expected())
    assert not consumer.stats.get("store_extents")
    producer = lab.engine(role="kv_producer")
    same(producer.run(PROMPTS, LENGTH), lab.expected())
    assert producer.stats["store_extents"] > 0 and producer.external == 0
    consumer.settle()
    same(consumer.run(PROMPTS, LENGTH), lab.expected())
    assert consumer.loaded() > 0


@case
def after_reset_cache_nothing_older_is_served(lab: Lab) -> None:
    _stored(lab)
    engine = lab.engine()
    assert ask(engine, PROMPTS[0]) == 128
    assert engine.scheduler.connector.reset_cache() is True
    assert ask(engine, PROMPTS[0]) == 0
    same(engine.run(PROMPTS, LENGTH), lab.expected())
    assert ask(engine, PROMPTS[0]) == 128
    lab.stop(engine)
    assert ask(lab.engine(), PROMPTS[0]) == 128


# --- identity -----------------------------------------------------------------------------------------------------------


@case
def salts_separate_tenants_and_empty_equals_none(lab: Lab) -> None:
    engine = lab.engine()
    salts = (None, "", "a", "b", "a@b", "0" * 64)
    for number, writer in enumerate(salts):
        prompt = [number + 3] + SHARED
        engine.run([prompt], 2, salt=writer)
        for reader in salts:
            expected = 128 if (writer or "") == (reader or "") else 0
            assert ask(engine, prompt, cache_salt=reader) == expected, (writer, reader)
    for path in lab.root.rglob("*"):
        assert "a@b" not in path.name


@case
def adapters_are_known_by_content(lab: Lab) -> None:
    def adapter(name: str, byte: bytes) -> str:
        path = lab.scratch / f"adapter-{lab.number}-{name}"
        path.mkdir()
        (path / "adapter_model.safetensors").write_bytes(byte * 100)
        (path / "adapter_config.json").write_text("{}")
        return str(path)

    first, second, copied = adapter("one", b"1"), adapter("two", b"2"), adapter("copy", b"1")

    def hit(engine: Engine, number: int, path: str) -> int:
        lora = LoRARequest("tuned", number, path)
        engine.half.arrived(request(SHARED, lora_request=lora))
        until = time.monotonic() + 10
        while time.monotonic() < until:
            answer = engine.scheduler.connector.get_num_new_matched_tokens(request(SHARED, lora_request=lora), 0)[0]
            if answer is not None:
                return answer
        raise AssertionError("the adapter was never identified")

    engine = lab.engine()
    engine.run([SHARED], 2, lora=LoRARequest("tuned", 1, first))
    assert hit(engine, 1, first) == 128
    assert hit(engine, 2, second) == 0
    assert ask(engine, SHARED) == 0
    lab.stop(engine)
    engine = lab.engine()
    assert hit(engine, 7, copied) == 128, "same name and content, other place and number"
    (Path(copied) / "adapter_model.safetensors").write_bytes(b"3" * 100)
    assert hit(engine, 7, copied) == 0, "rewritten while in use"
    assert hit(engine, 9, "organisation/not-local") == 0


@case
def media_is_known_by_content_and_place(lab: Lab) -> None:
    engine = lab.engine()

    def keys(*items) -> bytes:
        features = [
            SimpleNamespace(identifier=identifier, mm_position=SimpleNamespace(offset=offset, length=length))
            for identifier, offset, length in items
        ]
        one = request(SHARED, mm_features=features)
        tracked = engine.half._track(one)
        chain = engine.half._chain(tracked)
        engine.half._extend(tracked, 2)
        engine.half.finished(one)
        return bytes(chain.keys(0, 2))

    image = keys(("f" * 64, 10, 30))
    assert image == keys(("f" * 64, 10, 30))
    variants = {image, keys(("f" * 63 + "e", 10, 30)), keys(("f" * 64, 11, 30)), keys(),
                keys(("a", 5, 10), ("b", 30, 10)), keys(("b", 5, 10), ("a", 30, 10))}
    assert len(variants) == 6
    assert keys(("late", 70, 10))[:32] == keys()[:32] and keys(("late", 70, 10)) != keys()


@case
def prompts_without_stable_ids_take_no_part(lab: Lab) -> None:
    engine = lab.engine()
    engine.run([SHARED], 2)
    assert ask(engine, SHARED) == 128
    assert ask(engine, SHARED, prompt_embeds=object()) == 0
    assert ask(engine, SHARED, resumable=True) == 0
    nameless = SimpleNamespace(identifier=None, mm_position=SimpleNamespace(offset=0, length=4))
    assert ask(engine, SHARED, mm_features=[nameless]) == 0


@case
def weights_are_known_by_content_not_by_time_or_place(lab: Lab) -> None:
    model = lab.scratch / f"model-{lab.number}"
    shutil.copytree(lab.model, model)
    weights = model / "model.safetensors"
    original, status = weights.read_bytes(), os.stat(weights)
    engine = lab.engine(str(model))
    engine.run([SHARED], 2)
    lab.stop(engine)

    def hit_with(content: bytes) -> int:
        with open(weights, "r+b") as file:
            file.write(content)
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
        engine = lab.engine(str(model))
        answer = ask(engine, SHARED)
        lab.stop(engine)
        return answer

    assert hit_with(bytes([original[0] ^ 1]) + original[1:]) == 0
    assert hit_with(original) == 128
    moved = model.with_name(model.name + "-moved")
    shutil.copytree(model, moved)
    assert ask(lab.engine(str(moved)), SHARED) == 128


@case
def kv_type_is_part_of_the_identity_by_its_resolved_name(lab: Lab) -> None:
    _stored(lab)
    assert ask(lab.engine(dtype="bfloat16"), PROMPTS[0]) == 0
    assert ask(lab.engine(), PROMPTS[0]) == 128


# --- configuration ------------------------------------------------------------------------------------------------------


@case
def refusals_name_key_value_and_what_is_allowed(lab: Lab) -> None:
    refused = (
        ({"chunk_token": 64}, ("chunk_token", "chunk_tokens")),
        ({"chunk_tokens": 72}, ("chunk_tokens is 72", "block size 16")),
        ({"chunk_tokens": True}, ("chunk_tokens", "true", "whole number")),
        ({"layout": "packed"}, ("layout", "packed", "canonical")),
        ({"load_timeout": -1}, ("load_timeout", "-1", "seconds")),
        ({"store": "some"}, ("store", "some", "prompt")),
        ({"min_load_tokens": 0}, ("min_load_tokens", "0")),
        ({"model_digest": ""}, ("model_digest",)),
        ({"roots": ["relative/path?capacity=64MiB"]}, ("relative/path",)),
        ({"nonsense": 1}, ("nonsense",)),
    )
    for extra, words in refused:
        lines.clear()
        engine = lab.engine(extra=extra)
        said = lines.having("not used", "ERROR")
        assert len(said) == 2 and said[0] == said[1], (extra, said)  # one line in each of the two processes
        assert all(word in said[0] for word in words), (words, said[0])
        assert engine.scheduler.connector.get_num_new_matched_tokens(request(SHARED), 0) == (0, False)
        try:
            lab.engine(extra={**extra, "on_error": "fail"})
        except ValueError as error:
            assert all(word in str(error) for word in words)
        else:
            raise AssertionError(f"{extra} was accepted")
    same(engine.run(PROMPTS, LENGTH), lab.expected())
    try:
        lab.engine(extra={"on_error": "ignore"})
    except ValueError as error:
        assert "on_error" in str(error) and "ignore" in str(error)
    else:
        raise AssertionError("on_error accepts anything")


@case
def several_connectors_can_be_combined(lab: Lab) -> None:
    import harness

    child = {"kv_connector": "TokendepotConnector", "kv_connector_module_path": "tokendepot.engines.vllm",
             "kv_role": "kv_both"}
    transfer = harness.KVTransferConfig

    def combined(**fields):
        extra = fields.pop("kv_connector_extra_config")
        children = [
            {**child, "kv_load_failure_policy": "recompute",
             "kv_connector_extra_config": {**extra, "roots": [f"{lab.root}/{name}?capacity=64MiB"]}}
            for name in ("first", "second")
        ]
        return transfer(**{**fields, "kv_connector": "MultiConnector", "kv_connector_module_path": None,
                           "kv_connector_extra_config": {"connectors": children}})

    lab.root.mkdir(parents=True)
    harness.KVTransferConfig = combined
    try:
        engine = lab.engine()
    finally:
        harness.KVTransferConfig = transfer
    parts = engine.scheduler.connector._connectors
    workers = engine.ranks[0].connector._connectors
    names = [engine.add(prompt, LENGTH) for prompt in PROMPTS]
    for _ in range(400):
        if all(name in engine.reasons for name in names):
            break
        engine.step()
    same([engine.output[name] for name in names], lab.expected())
    for worker, part in zip(workers, parts, strict=True):
        assert worker._worker_half._depot.flush(30.0)
        part._scheduler_half._depot.refresh()
        assert part._scheduler_half.matched_tokens(request(PROMPTS[0]), 0) == 128
    engine.scheduler.reset_prefix_cache()
    names = [engine.add(prompt, LENGTH) for prompt in PROMPTS]
    for _ in range(400):
        if all(name in engine.reasons for name in names):
            break
        engine.step()
    same([engine.output[name] for name in names], lab.expected())
    assert workers[0]._worker_half._depot.stats()["load"]["extents"] > 0
    assert workers[1]._worker_half._depot.stats()["load"]["extents"] == 0, "the first that has it loads it"


def main() -> int:
    model, scratch, results, *names = sys.argv[1:]
    versions.log.addHandler(lines)
    versions.log.setLevel(logging.INFO)
    versions.log.propagate = False
    assert LAYERS == 4
    lab = Lab(model, Path(scratch))
    with open(results, "w", encoding="utf-8") as out:
        for name in names or CASES:
            started, detail = time.monotonic(), ""
            lab.begin()
            try:
                CASES[name](lab)
            except BaseException:  # whatever it was, it belongs into the report of this case
                detail = traceback.format_exc() + "\n".join(f"{level} {line}" for level, line in lines.all[-20:])
            lab.end()
            print(json.dumps({"case": name, "ok": not detail, "detail": detail,
                              "seconds": round(time.monotonic() - started, 2)}), file=out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
