"""Only equal prompts of equal models meet, and configuration is refused in one sentence."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

from tokendepot.engines import vllm, vllm_releases
from tokendepot.engines.vllm import bystander, versions
from vllm.lora.request import LoRARequest

from fake_cache import VERSION
from harness import Engine
from lab import (
    LENGTH,
    PROMPTS,
    SHARED,
    Lab,
    ask,
    case,
    damage,
    engine_lines,
    lines,
    request,
    same,
)


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
def a_long_salt_and_model_path_are_stored_and_the_salt_is_nowhere_in_clear(lab: Lab) -> None:
    """Trial I5."""
    salt = "s3cret-" + "~" * 121
    model = lab.scratch / f"model-{lab.number}"
    while len(str(model)) < 240:
        model /= "m" * min(100, 239 - len(str(model)))
    shutil.copytree(lab.model, model)
    with engine_lines() as said:
        engine = lab.engine(str(model))
        for _ in range(2):
            same(engine.run(PROMPTS, LENGTH, salt=salt), lab.expected())
        assert ask(engine, PROMPTS[0], cache_salt=salt) == 128 and ask(engine, PROMPTS[0]) == 0
        assert engine.loaded() > 0 and engine.failures() == 0, engine.stats
        damage(lab.root)
        same(engine.run(PROMPTS, LENGTH, salt=salt), lab.expected())  # failures are told, too
        assert engine.failures() > 0
        half = engine.ranks[0].connector._worker_half
        seen = [*said, *(line for _, line in lines.all), str(engine.stats), str(half._depot.stats())]
        lab.stop(engine)
    assert not any("s3cret" in text for text in [*seen, *said])
    for path in lab.root.rglob("*"):
        assert "s3cret" not in str(path)
        assert not path.is_file() or b"s3cret" not in path.read_bytes(), path


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
            answer = engine.scheduler.connector.get_num_new_matched_tokens(
                request(SHARED, lora_request=lora), 0
            )[0]
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
    variants = {
        image,
        keys(("f" * 63 + "e", 10, 30)),
        keys(("f" * 64, 11, 30)),
        keys(),
        keys(("a", 5, 10), ("b", 30, 10)),
        keys(("b", 5, 10), ("a", 30, 10)),
    }
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
def kv_types_of_equal_size_never_meet_and_fp8_is_fp8_e4m3(lab: Lab) -> None:
    """Trial I2. In the canonical layout nothing but the namespace tells float16 from bfloat16: every size is equal."""
    kinds = [
        {"dtype": dtype, "kv_dtype": kv_dtype}
        for dtype, kv_dtype in (
            ("float16", "auto"),
            ("bfloat16", "auto"),
            ("float16", "fp8"),
            ("float16", "fp8_e4m3"),
            ("float16", "fp8_e5m2"),
        )
    ]
    for kind in kinds:
        engine = lab.engine(**kind)
        alias = kind["kv_dtype"] == "fp8_e4m3"
        assert ask(engine, PROMPTS[0]) == (128 if alias else 0), kind
        same(engine.run(PROMPTS, LENGTH), lab.expected(**kind))
        assert not alias or engine.loaded() > 0, "an alias loads what was stored under the other name"
        assert engine.failures() == 0, engine.stats
        lab.stop(engine)
    for kind in kinds:  # the diagonal: without it, misses would prove nothing
        engine = lab.engine(**kind)
        assert ask(engine, PROMPTS[0]) == 128, kind
        same(engine.run(PROMPTS, LENGTH), lab.expected(**kind))
        assert engine.loaded() > 0 and engine.failures() == 0, engine.stats
        lab.stop(engine)
    texts = [lab.expected(**kind) for kind in kinds]
    assert texts[2] == texts[3] and all(texts.count(text) == 1 for text in (texts[0], texts[1], texts[4])), (
        "text tells the types apart"
    )


@case
def opaque_pages_of_equal_size_go_back_to_an_equal_arrangement_only(lab: Lab) -> None:
    """Trial I3: a page of 16 tokens and all heads has as many bytes as one of 32 tokens and half of them."""
    arrangements = ({"tp": 1, "block_size": 16}, {"tp": 2, "block_size": 32}, {"pp": 2, "block_size": 16})
    for arrangement in arrangements:
        engine = lab.engine(layout="opaque", **arrangement)
        assert ask(engine, PROMPTS[0]) == 0, arrangement
        same(engine.run(PROMPTS, LENGTH), lab.expected())
        assert engine.failures() == 0, engine.stats
        lab.stop(engine)
    for arrangement in arrangements:
        engine = lab.engine(layout="opaque", **arrangement)
        assert ask(engine, PROMPTS[0]) == 128, arrangement
        same(engine.run(PROMPTS, LENGTH), lab.expected())
        assert engine.loaded() > 0 and engine.failures() == 0, engine.stats
        lab.stop(engine)


@case
def refusals_name_key_value_and_what_is_allowed(lab: Lab) -> None:
    occupied = lab.root.parent / f"{lab.root.name}-occupied"
    occupied.mkdir()
    (occupied / "thesis.txt").write_text("not the depot's")
    future = lab.root.parent / f"{lab.root.name}-future"
    future.mkdir()
    marker = b"TDDEPOT\n" + (2).to_bytes(4, "little") + bytes(4084)
    (future / "DEPOT").write_bytes(marker)
    system = os.statvfs(lab.root.parent)
    too_large = system.f_blocks * system.f_frsize + (1 << 40)
    refused = (
        (
            {"roots": [f"{lab.root}?capacity={too_large}"]},
            (str(lab.root), f"capacity={too_large}", "larger than its file system", " bytes of "),
        ),
        (
            {"roots": [f"{occupied}?capacity=64MiB"]},
            (str(occupied), "thesis.txt", "holds something else", "expected an empty"),
        ),
        ({"roots": [f"{future}?capacity=64MiB"]}, (str(future), "version 2", "version 1")),
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
    assert [path.name for path in occupied.iterdir()] == ["thesis.txt"], "what is there is not touched"
    assert [path.name for path in future.iterdir()] == ["DEPOT"] and (future / "DEPOT").read_bytes() == marker
    same(engine.run(PROMPTS, LENGTH), lab.expected())
    try:
        lab.engine(extra={"on_error": "ignore"})
    except ValueError as error:
        assert "on_error" in str(error) and "ignore" in str(error)
    else:
        raise AssertionError("on_error accepts anything")


@case
def latents_on_a_cpu_are_not_kept(lab: Lab) -> None:
    engine = lab.engine(latent=True)
    said = lines.having("not used, the engine runs without it: the model has MLA", "ERROR")
    assert len(said) == 2 and said[0] == said[1], lines.all  # one line in each of the two processes
    for _ in range(2):
        same(engine.run(PROMPTS, LENGTH), lab.expected())
    assert engine.external == 0 and not lab.root.exists()


@case
def the_start_names_every_option_and_where_its_value_is_from(lab: Lab) -> None:
    lab.engine(extra={"load_timeout": 7.0})
    (line,) = lines.having("options given", "INFO")  # the scheduler alone says it
    given, by_default = line.split("by default: ")
    assert "load_timeout=7.0" in given and f'roots[0].path="{lab.root}"' in given, line
    assert 'store="all"' in by_default and "io_depth=16" in by_default, line


@case
def a_vllm_that_does_not_fit_runs_without_the_depot(lab: Lab) -> None:
    """With this release's own base classes, as if it were one that is not served."""
    vllm_says = bystander.log
    reason = vllm_releases.refusal("0.19.1")
    used, vllm.TokendepotConnector = vllm.TokendepotConnector, bystander.bystander(reason)
    bystander.log = versions.log
    try:
        engine = lab.engine(hybrid=True)
        try:
            lab.engine(extra={"on_error": "fail"})
        except ValueError as error:
            assert str(error) == f"tokendepot cannot serve this engine: {reason}"
        else:
            raise AssertionError("an unsupported vLLM was accepted")
    finally:
        vllm.TokendepotConnector, bystander.log = used, vllm_says
    said = lines.having("not used", "ERROR")
    assert said == [f"tokendepot: not used, the engine runs without it: {reason}"] * 2, said  # a line a process
    for _ in range(2):
        same(engine.run(PROMPTS, LENGTH), lab.expected(hybrid=True))
    assert engine.external == 0 and engine.scheduler.reset_prefix_cache()
    assert not lab.root.exists()


@case
def several_connectors_can_be_combined(lab: Lab) -> None:
    import harness

    child = {
        "kv_connector": "TokendepotConnector",
        "kv_connector_module_path": "tokendepot.engines.vllm",
        "kv_role": "kv_both",
    }
    transfer = harness.KVTransferConfig

    def combined(**fields):
        extra = fields.pop("kv_connector_extra_config")
        children = [
            {
                **child,
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {**extra, "roots": [f"{lab.root}/{name}?capacity=64MiB"]},
            }
            for name in ("first", "second")
        ]
        return transfer(
            **{
                **fields,
                "kv_connector": "MultiConnector",
                "kv_connector_module_path": None,
                "kv_connector_extra_config": {"connectors": children},
            }
        )

    lab.root.mkdir(parents=True)
    harness.KVTransferConfig = combined
    try:
        engine = lab.engine(without_hybrid_manager=VERSION < (0, 21))  # its MultiConnector has no SupportsHMA
    finally:
        harness.KVTransferConfig = transfer
    parts = engine.scheduler.connector._connectors
    workers = engine.ranks[0].connector._connectors
    names = [engine.add(prompt, LENGTH) for prompt in PROMPTS]
    engine.step_until_ended(names)
    same([engine.output[name] for name in names], lab.expected())
    for worker, part in zip(workers, parts, strict=True):
        assert worker._worker_half._depot.flush(30.0)
        part._scheduler_half._depot.refresh()
        assert part._scheduler_half.matched_tokens(request(PROMPTS[0]), 0) == 128
    engine.scheduler.reset_prefix_cache()
    names = [engine.add(prompt, LENGTH) for prompt in PROMPTS]
    engine.step_until_ended(names)
    same([engine.output[name] for name in names], lab.expected())
    assert workers[0]._worker_half._depot.stats()["load"]["extents"] > 0
    assert workers[1]._worker_half._depot.stats()["load"]["extents"] == 0, "the first that has it loads it"
