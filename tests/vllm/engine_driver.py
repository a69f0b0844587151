"""Runs a real vLLM engine through a list of rounds; one JSON line a round. Driven by test_real_engine.py.

usage: engine_driver.py JSON with: results (file that gets the lines; stdout has log lines of several processes), model,
llm (arguments of LLM), extra (kv_connector_extra_config or null), prompts, ranked (how many candidates to tell of each
token), rounds; a round is {"length": n, "damage": bool, "settle": sound extents to wait for after it, "prompts": others}.
The process then waits to be killed, or for stdin to end, on which it ends in order.
"""

from __future__ import annotations

import json
import os
import sys
import time

SETTLE_LIMIT_S = 60.0
SEEN_WITHIN_S = 1.0  # a process sees what another one has stored

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def damage_extents(root: str) -> int:
    """Flips one byte in the payload of every extent of the root."""
    import tokendepot

    extents = tokendepot.list_extents(root)
    for extent in extents:
        with open(os.path.join(root, "segments", f"{extent['segment']}.seg"), "r+b") as file:
            file.seek(extent["offset"] + extent["bytes"] * 2 // 3)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 0x5A]))
    return len(extents)


def settle(root: str, wanted: int) -> None:
    """Until the root has `wanted` extents that verify, and the scheduler has read of them. TimeoutError with what there is
    after a minute."""
    import tokendepot

    end = time.monotonic() + SETTLE_LIMIT_S
    while True:
        found = tokendepot.verify_extents(root, tokendepot.list_extents(root))
        if found.count("ok") >= wanted:
            break
        if time.monotonic() > end:
            raise TimeoutError(f"{wanted} sound extents wanted, {found.count('ok')} there: {found}")
        time.sleep(0.1)
    time.sleep(2 * SEEN_WITHIN_S)


def empty_prefix_cache(engine) -> None:
    """A step that the engine launched ahead may hold blocks for a moment."""
    end = time.monotonic() + SETTLE_LIMIT_S
    while not engine.reset_prefix_cache():
        if time.monotonic() > end:
            raise TimeoutError("the engine's prefix cache cannot be emptied")
        time.sleep(0.05)


def record_every_step(engine) -> None:
    """As vLLM's server does. LLM before 0.28 drops what was counted in a step without output: a failed load, mostly."""
    inside = engine.llm_engine
    get_output = inside.engine_core.get_output

    def get_and_record():
        outputs = get_output()
        if outputs.scheduler_stats is not None and not outputs.outputs:
            inside.logger_manager.record(scheduler_stats=outputs.scheduler_stats, iteration_stats=None)
        return outputs

    inside.engine_core.get_output = get_and_record


def candidates(logprobs) -> list[list]:
    """Of each position, pairs of token and logarithm of its probability."""
    return [[(token, rank.logprob) for token, rank in place.items()] for place in logprobs or ()]


def main() -> None:
    order = json.loads(sys.argv[1])
    import vllm
    from packaging.version import Version
    from prometheus_client import REGISTRY
    from vllm import LLM, SamplingParams

    transfer = None
    if order["extra"] is not None:
        transfer = dict(
            kv_connector="TokendepotConnector",
            kv_connector_module_path="tokendepot.engines.vllm",
            kv_role="kv_both",
            kv_connector_extra_config=order["extra"],
        )
    arguments = dict(
        enforce_eager=True,
        skip_tokenizer_init=True,
        dtype="float32",
        seed=0,
        block_size=32,
        max_model_len=1024,
        kv_transfer_config=transfer,
        disable_log_stats=False,
    )
    engine = LLM(model=order["model"], **{**arguments, **order["llm"]})
    if Version(vllm.__version__) < Version("0.28"):
        record_every_step(engine)
    for round_ in order["rounds"]:
        prompts = [{"prompt_token_ids": tokens} for tokens in round_.get("prompts", order["prompts"])]
        damaged = 0
        if round_.get("damage"):
            damaged = damage_extents(order["extra"]["roots"][0].split("?")[0])
        sampling = SamplingParams(
            temperature=0,
            max_tokens=round_["length"],
            ignore_eos=True,
            detokenize=False,
            logprobs=order["ranked"] or None,
        )
        started = time.monotonic()
        outputs = [
            engine.generate(prompts[:1], sampling, use_tqdm=False)[0],
            *engine.generate(prompts[1:], sampling, use_tqdm=False),
        ]
        seconds = time.monotonic() - started
        empty_prefix_cache(engine)
        metrics = {
            ":".join(
                [
                    sample.name,
                    *(sample.labels[label] for label in ("operation", "reason", "cause") if label in sample.labels),
                ]
            ): sample.value
            for metric in REGISTRY.collect()
            for sample in metric.samples
            if sample.name.startswith("tokendepot_") or sample.name == "vllm:num_preemptions_total"
        }
        result = dict(
            tokens=[list(output.outputs[0].token_ids) for output in outputs],
            ranked=[candidates(output.outputs[0].logprobs) for output in outputs],
            damaged=damaged,
            seconds=seconds,
            cached=[output.num_cached_tokens for output in outputs],
            metrics=metrics,
        )
        with open(order["results"], "a", encoding="utf-8") as out:
            out.write(json.dumps(result) + "\n")
        if round_.get("settle"):
            settle(order["extra"]["roots"][0].split("?")[0], round_["settle"])
    print("DONE", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
