"""Preemption, abort, chunked prefill, limits of what is promised and stored."""

from __future__ import annotations

import time
from threading import Timer
from types import SimpleNamespace

import torch

from harness import ABORTED, Engine
from lab import (
    LENGTH,
    PROMPTS,
    Lab,
    ask,
    case,
    damage,
    keys_of,
    lines,
    request,
    run_one_by_one,
    same,
    store_prompts,
)

from tokendepot import _core
from tokendepot.engines.vllm.repeats import PROOF
from tokendepot.engines.vllm.scheduler import SEEN_STORE_S

TOUCHES_THE_CACHE = ("submit_load", "place", "submit_store")


@case
def preemption_with_a_tiny_pool_never_mixes_requests(lab: Lab) -> None:
    for hybrid, blocks in ((False, 21), (True, 36)):
        root, expected = str(lab.root / str(hybrid)), lab.expected(hybrid, length=30)
        engine = lab.engine(blocks=blocks, hybrid=hybrid, root=root)
        same(engine.run(PROMPTS, 30), expected)
        same(engine.run(PROMPTS, 30), expected)
        assert engine.preemptions > 0 or hybrid
        lab.stop(engine)
        engine = lab.engine(hybrid=hybrid, root=root)
        follow = [prompt + text + [9] * 70 for prompt, text in zip(PROMPTS, expected, strict=True)]
        same(engine.run(follow, LENGTH), lab.expected(hybrid, prompts=follow))
        assert engine.loaded() > 0


def _churned(lab: Lab, name: str, *, hybrid: bool, blocks: int, fenced: bool, **options):
    """What a fresh engine reads and writes after one with a tiny pool and late gathers has stored everything."""
    root = str(lab.root / name)
    engine = lab.engine(blocks=blocks, hybrid=hybrid, root=root, late_gathers=1000, **options)
    if not fenced:
        engine.half._fence.needed_by = lambda output: False
    texts = engine.run(PROMPTS, 30)
    names = [engine.add([number + 60] + prompt, 30) for number, prompt in enumerate(PROMPTS)]
    for _ in range(4):
        engine.step()
    engine.scheduler.finish_requests(names[0], ABORTED)
    engine.finish(names[1:])
    texts += engine.run(PROMPTS[::-1], 30)
    lab.stop(engine)
    engine = lab.engine(hybrid=hybrid, root=root)
    follow = [prompt + text + [9] * 70 for prompt, text in zip(PROMPTS, texts, strict=False)]
    again = run_one_by_one(engine, follow)
    assert engine.loaded() > 0
    return texts + again, follow


@case
def stores_that_are_never_found_again_are_said_and_counted(lab: Lab) -> None:
    class Blind:
        def __init__(self, depot) -> None:
            self._depot = depot

        def __getattr__(self, name: str):
            return getattr(self._depot, name)

        def longest_prefix(self, keys, wants) -> int:
            return 0

    engine = lab.engine()
    same(engine.run(PROMPTS, LENGTH), lab.expected())
    same(engine.run(PROMPTS, LENGTH), lab.expected())
    assert "missed_repeats" not in engine.stats, "what is found is no missed repeat"
    lab.stop(engine)
    engine = lab.engine(root=str(lab.root / "other"))
    seeing = engine.half._depot
    engine.half._depot = Blind(seeing)
    same(engine.run(PROMPTS, LENGTH), lab.expected())
    time.sleep(SEEN_STORE_S)
    assert "missed_repeats" not in engine.stats and not lines.having("began with a chunk")
    for _ in range(PROOF):
        engine.run(PROMPTS[:1], 1)
    assert engine.stats["missed_repeats"] >= PROOF
    assert len(lines.having("began with a chunk that this engine had stored", "WARNING")) == 1
    engine.half._depot = seeing


@case
def no_block_is_given_away_before_a_late_gather_has_read_it(lab: Lab) -> None:
    for hybrid, blocks in ((False, 21), (True, 36)):
        expected = lab.expected(hybrid, length=30)
        wanted = expected + expected[::-1]
        for asynchronous in (False, True):
            name = f"fenced-{hybrid}-{asynchronous}"
            got, follow = _churned(
                lab, name, hybrid=hybrid, blocks=blocks, fenced=True, asynchronous=asynchronous
            )
            same(got, wanted + lab.expected(hybrid, prompts=follow))


@case
def without_the_fence_late_gathers_would_store_other_requests_blocks(lab: Lab) -> None:
    for hybrid, blocks in ((False, 21), (True, 36)):
        got, follow = _churned(lab, f"open-{hybrid}", hybrid=hybrid, blocks=blocks, fenced=False)
        expected = lab.expected(hybrid, length=30)
        assert got != expected + expected[::-1] + lab.expected(hybrid, prompts=follow)


@case
def a_step_that_takes_no_block_of_a_store_is_not_fenced(lab: Lab) -> None:
    engine = lab.engine(late_gathers=3)
    fences = []
    engine.between = lambda so: fences.append(so.kv_connector_metadata.fence)
    same(engine.run(PROMPTS, 30), lab.expected(length=30))
    assert engine.stats["store_extents"] > 0 and not any(fences), "the pool has room for all"
    assert not engine.half._fence._reading, "nothing is remembered for ever"


@case
def an_engine_that_goes_to_sleep_waits_for_what_touches_its_cache(lab: Lab) -> None:
    engine = lab.engine(late_gathers=1000)
    worker = engine.ranks[0].connector
    names = [engine.add(prompt, LENGTH) for prompt in PROMPTS]
    engine.step_until_ended(names)
    assert worker._worker_half._depot._late, "stores that have read nothing yet"
    worker.unregister_kv_caches()
    for cells in engine.ranks[0].cells.values():
        cells.fill_(7.0)
    lab.stop(engine)
    engine = lab.engine()
    same(engine.run(PROMPTS, LENGTH), lab.expected())
    assert engine.loaded() > 0 and engine.failures() == 0
    lab.stop(engine)

    engine, depot = _held_back(lab, root=str(lab.root / "loads"))
    worker = engine.ranks[0].connector
    name = engine.add(SHARERS[0], LENGTH)
    engine.step()
    assert worker._worker_half._loading
    Timer(0.05, depot.let_go).start()
    worker.unregister_kv_caches()
    assert not worker._worker_half._loading
    engine.finish([name])
    same([engine.output[name]], lab.expected(prompts=SHARERS[:1]))


def _last_step_before(calls: list, name: str) -> set:
    """What engine_step() was last told when something was called."""
    told, found = None, set()
    for call in calls:
        told = call if isinstance(call, tuple) else told
        if call == name and told is not None:
            found.add(told)
    return found


class CallsInOrder:
    """A depot that notes what is called; of engine_step() also how."""

    def __init__(self, depot) -> None:
        self._depot, self.calls = depot, []

    def __getattr__(self, name: str):
        def noted(*arguments):
            self.calls.append(arguments if name == "engine_step" else name)
            return getattr(self._depot, name)(*arguments)

        return noted


@case
def on_a_gpu_the_stream_is_marked_before_anything_is_submitted_and_no_step_waits(lab: Lab) -> None:
    for hybrid in (False, True):
        root = str(lab.root / str(hybrid))
        store_prompts(lab, hybrid=hybrid, root=root)
        engine = lab.engine(hybrid=hybrid, root=root)
        half = engine.ranks[0].connector._worker_half
        depot = half._depot = CallsInOrder(half._depot)
        half._device, half._stores_hold_up_step = "cuda:0", False
        forward = engine.forward
        engine.forward = lambda so: (
            depot.calls.append("forward" if so.total_num_scheduled_tokens else "nothing") or forward(so)
        )
        marked, current_stream = [], torch.cuda.current_stream
        torch.cuda.current_stream = lambda device: marked.append(str(device)) or SimpleNamespace(cuda_stream=7)
        try:
            same(engine.run(PROMPTS, LENGTH), lab.expected(hybrid))
            follow = [prompt + [9] * 70 for prompt in PROMPTS]
            same(engine.run(follow, LENGTH), lab.expected(hybrid, prompts=follow))
        finally:
            torch.cuda.current_stream = current_stream
        submits = [index for index, name in enumerate(depot.calls) if name in TOUCHES_THE_CACHE]
        loads = [depot.calls[index] for index in submits if depot.calls[index] != "submit_store"]
        assert loads and len(loads) < len(submits)
        for index in submits:
            assert depot.calls[index - 1] in ("mark_stream", "submit_store"), depot.calls[index - 3 : index + 1]
        assert set(marked) == {"cuda:0"} and "wait_gathered" not in depot.calls
        before = {name: _last_step_before(depot.calls, name) for name in ("forward", "nothing", "poll")}
        assert before == {"forward": {(True,)}, "nothing": {(False,)}, "poll": {(False,)}}


@case
def what_is_faster_computed_is_not_loaded_and_counted(lab: Lab) -> None:
    store_prompts(lab)
    engine = lab.engine(extra={"min_load_tokens": None})
    rule = engine.half._worth
    rule.of_load = lambda local, hit, total: False
    same(engine.run(PROMPTS, LENGTH), lab.expected())
    assert engine.external == 0 and engine.stats["not_worth_tokens"] > 0 and "hit_tokens" not in engine.stats
    del rule.of_load
    rule.loaded(128, 1e-6)
    assert rule.load_seconds(128) < 0.1 and rule._last_end > 0, "steps and loads are measured"
    rule.of_load = lambda local, hit, total: True
    same(run_one_by_one(engine, PROMPTS), lab.expected())
    assert engine.external == len(PROMPTS) and rule._loads.near(128) is not None


@case
def a_fixed_threshold_is_not_measured(lab: Lab) -> None:
    engine = lab.engine(extra={"min_load_tokens": 65})
    engine.run([PROMPTS[0]], 2)
    engine.half._worth.of_load = lambda local, hit, total: False  # is not asked
    assert ask(engine, PROMPTS[0][:80]) == 0 and ask(engine, PROMPTS[0]) == 128


@case
def preemption_with_corrupt_extents(lab: Lab) -> None:
    store_prompts(lab)
    damage(lab.root)
    engine = lab.engine(blocks=21)
    same(engine.run(PROMPTS, 30), lab.expected(length=30))
    assert engine.failures() > 0


@case
def chunked_prefill_and_preemption_leave_no_hole(lab: Lab) -> None:
    long = [[(7 * n) % 240 + 3 for n in range(1000)]]
    expected = lab.expected(prompts=long)
    engine = lab.engine()
    name = engine.add(long[0], LENGTH)
    for _ in range(4):
        engine.step()
    assert 0 < engine.scheduler.requests[name].num_computed_tokens < 1000
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert engine.scheduler.requests[name].num_computed_tokens == 0
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
    for hybrid in (False, True):
        root = str(lab.root / str(hybrid))
        store_prompts(lab, hybrid=hybrid, root=root)
        engine = lab.engine(hybrid=hybrid, root=root)
        free = engine.free_blocks()
        name = engine.add(PROMPTS[0], LENGTH)
        aborted = []

        def abort(so, engine=engine, name=name, aborted=aborted, free=free) -> None:
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


class HeldBack:
    """A depot that begins no load and no hold before it is let go."""

    def __init__(self, depot) -> None:
        self._depot, self.waiting, self.begun, self._free = depot, [], 0, False

    def __getattr__(self, name: str):
        return getattr(self._depot, name)

    def submit_load(self, job: int, plan: bytes) -> None:
        self._begin(self._depot.submit_load, job, plan)

    def submit_hold(self, job: int, plan: bytes) -> None:
        self._begin(self._depot.submit_hold, job, plan)

    def _begin(self, submit, job: int, plan: bytes) -> None:
        self.begun += 1
        if self._free:
            submit(job, plan)
        else:
            self.waiting.append((submit, job, plan))

    def let_go(self) -> None:
        self._free = True
        for submit, job, plan in self.waiting:
            submit(job, plan)
        self.waiting = []


BEGINNING = [(19 * n) % 240 + 3 for n in range(320)]
SHARERS = [BEGINNING + [number + 3] * (number + 2) for number in range(8)]
NINTH = [(23 * n) % 240 + 3 for n in range(200)]


def _held_back(lab: Lab, **options) -> tuple[Engine, HeldBack]:
    """An engine whose root holds the beginning of all sharers, and whose loads are held back."""
    engine = lab.engine(**options)
    engine.run([SHARERS[0]], 1)
    lab.stop(engine)
    engine = lab.engine(**options)
    half = engine.ranks[0].connector._worker_half
    half._depot = HeldBack(half._depot)
    return engine, half._depot


@case
def one_load_serves_all_who_share_a_prefix(lab: Lab) -> None:
    for hybrid in (False, True):
        engine, depot = _held_back(lab, hybrid=hybrid, root=str(lab.root / str(hybrid)))
        expected = lab.expected(hybrid, prompts=[*SHARERS, NINTH])
        names = [engine.add(prompt, LENGTH) for prompt in SHARERS]
        ninth = engine.add(NINTH, LENGTH)
        engine.step_until_ended([ninth])
        assert len(depot.waiting) == 1 and not any(name in engine.output for name in names)
        depot.let_go()
        engine.finish(names)
        same([engine.output[name] for name in [*names, ninth]], expected)
        assert depot.begun == 1 and engine.stats["hit_tokens"] == len(BEGINNING), engine.stats
        assert engine.stats["shared_loads"] == len(SHARERS) - 1
        assert engine.stats["queried_tokens"] == sum(len(prompt) for prompt in [*SHARERS, NINTH])
        assert not engine.half._sharing._waits and not engine.half._sharing._until


@case
def who_waits_for_a_load_that_fails_or_is_aborted_is_served_all_the_same(lab: Lab) -> None:
    for hybrid in (False, True):
        root = lab.root / str(hybrid)
        expected = lab.expected(hybrid, prompts=SHARERS)
        engine, depot = _held_back(lab, hybrid=hybrid, root=str(root))
        names = [engine.add(prompt, LENGTH) for prompt in SHARERS]
        engine.step()
        assert len(depot.waiting) == 1
        engine.scheduler.finish_requests(names[0], ABORTED)
        engine.step()
        assert len(depot.waiting) == 2, "the next one loads, the others wait for it"
        depot.let_go()
        engine.finish(names[1:])
        same([engine.output[name] for name in names[1:]], expected[1:])
        assert engine.stats["shared_loads"] == len(SHARERS) - 2
        lab.stop(engine)

        engine, depot = _held_back(lab, hybrid=hybrid, root=str(root))
        damage(root)
        names = [engine.add(prompt, LENGTH) for prompt in SHARERS]
        engine.step()
        depot.let_go()
        engine.finish(names)
        same([engine.output[name] for name in names], expected)
        assert engine.failures() > 0 and "shared_loads" not in engine.stats


@case
def nobody_waits_longer_than_a_load_may_take(lab: Lab) -> None:
    engine, depot = _held_back(lab)
    names = [engine.add(prompt, LENGTH) for prompt in SHARERS]
    engine.step()
    assert len(depot.waiting) == 1
    engine.half._sharing._until = dict.fromkeys(engine.half._sharing._until, 0.0)
    engine.step()
    assert len(depot.waiting) == len(SHARERS)
    depot.let_go()
    engine.finish(names)
    same([engine.output[name] for name in names], lab.expected(prompts=SHARERS))


@case
def without_prefix_caching_each_request_loads(lab: Lab) -> None:
    engine, depot = _held_back(lab, prefix_caching=False)
    names = [engine.add(prompt, LENGTH) for prompt in SHARERS]
    engine.step()
    assert len(depot.waiting) == len(SHARERS)
    depot.let_go()
    engine.finish(names)
    same([engine.output[name] for name in names], lab.expected(prompts=SHARERS))


@case
def who_asks_for_log_probabilities_of_the_prompt_computes_it(lab: Lab) -> None:
    engine = lab.engine()
    engine.run([PROMPTS[0]], 2)
    assert ask(engine, PROMPTS[0]) == 128
    assert ask(engine, PROMPTS[0], skip_reading_prefix_cache=True) == 0


@case
def a_very_long_prompt_does_not_hold_up_the_scheduler(lab: Lab) -> None:
    engine = lab.engine()
    one = request([(17 * n) % 240 + 3 for n in range(200_000)])
    answers = [engine.scheduler.connector.get_num_new_matched_tokens(one, 0) for _ in range(4)]
    assert answers == [(None, False)] * 3 + [(0, False)]


@case
def only_prompts_are_stored_when_asked_for(lab: Lab) -> None:
    engine = lab.engine(extra={"store": "prompt"})
    texts = engine.run(PROMPTS, 40)
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
    store_prompts(lab)
    engine = lab.engine()
    assert ask(engine, PROMPTS[0]) == 128
    assert engine.scheduler.connector.reset_cache() is True
    assert ask(engine, PROMPTS[0]) == 0
    same(engine.run(PROMPTS, LENGTH), lab.expected())
    assert ask(engine, PROMPTS[0]) == 128
    lab.stop(engine)
    assert ask(lab.engine(), PROMPTS[0]) == 128


@case
def a_reset_that_cannot_be_registered_switches_the_depot_off_and_is_done(lab: Lab) -> None:
    class Unwritable:
        def __init__(self, depot) -> None:
            self._depot = depot

        def __getattr__(self, name: str):
            return getattr(self._depot, name)

        def register_namespace(self, manifest: str) -> bytes:
            raise _core.DepotError("cannot write the manifest", "io")

    store_prompts(lab)
    engine = lab.engine()
    assert ask(engine, PROMPTS[0]) == 128
    engine.half._depot = Unwritable(engine.half._depot)
    for _ in range(2):
        assert engine.scheduler.connector.reset_cache() is True
        assert ask(engine, PROMPTS[0]) == 0
    same(engine.run(PROMPTS, LENGTH), lab.expected())
    assert engine.loaded() == 0 and engine.stats["switched_off"] == 1
    assert len(lines.having("the namespace after a reset cannot be registered", "ERROR")) == 1


def _missed(engine: Engine) -> dict[str, int]:
    prefix = "missed:"
    return {key.removeprefix(prefix): int(value) for key, value in engine.stats.items() if key.startswith(prefix)}


@case
def what_is_missed_is_counted_by_cause(lab: Lab) -> None:
    prompt, chunk = PROMPTS[2], 64  # 219 tokens: 3 chunks
    engine = lab.engine()
    engine.run([prompt], LENGTH)
    assert _missed(engine) == {"absent": 3 * chunk}
    second = keys_of(engine, prompt)[1]
    gone = [extent for extent in _core.list_extents(str(lab.root)) if extent["key"] == second]
    assert _core.remove_extents(str(lab.root), gone) == 1
    engine.half._depot.refresh()
    engine.half._storing.clear()  # else it waits for its own store to be seen, and stores nothing anew
    engine.run([prompt], LENGTH)
    assert _missed(engine) == {"absent": 3 * chunk, "evicted": 2 * chunk}
    damage(lab.root, lambda extent: extent["key"] == keys_of(engine, prompt)[2])
    engine.run([prompt], LENGTH)
    assert _missed(engine)["corrupt"] == chunk
    lab.stop(engine)

    engine = lab.engine(chunk=32)
    engine.run([prompt], LENGTH)
    assert _missed(engine) == {"other_namespace": 6 * 32}
    lab.stop(engine)

    engine = lab.engine(extra={"min_load_tokens": None})
    engine.half._worth.of_load = lambda local, hit, total: False
    engine.run([prompt], LENGTH)
    assert _missed(engine) == {"not_worth_loading": 3 * chunk}


@case
def saved_seconds_wait_for_a_measured_prefill(lab: Lab) -> None:
    store_prompts(lab)
    engine = lab.engine(batched_tokens=256)
    engine.run([PROMPTS[0]], LENGTH)
    assert engine.loaded() > 0 and engine.stats.get("saved_seconds", 0) == 0
    rule = engine.half._worth
    rule._contexts.observe(rule._clock(), 128, 10.0)  # a prefill of 10 s a token
    engine.run([PROMPTS[1]], LENGTH)
    assert engine.stats["saved_seconds"] > 1000, "both loads, of 128 tokens each"
