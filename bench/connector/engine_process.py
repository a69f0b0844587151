"""A real vLLM engine that computes what it is told: one JSON object a line on stdin, one line for each on stdout.

usage: engine_process.py JSON with the arguments of vllm.LLM. A job is {"prompts": [[token id, ...], ...], "length": n};
the answer is "RAN " and {"begin", "end" (ns of the monotonic clock), "cached", "lengths"}. Ends when stdin does.
"""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    from vllm import LLM, SamplingParams

    engine = LLM(**json.loads(sys.argv[1]))
    print("READY", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        sampling = SamplingParams(temperature=0, max_tokens=job["length"], ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": tokens} for tokens in job["prompts"]]
        begin = time.perf_counter_ns()
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        end = time.perf_counter_ns()
        answer = {
            "begin": begin,
            "end": end,
            "cached": [output.num_cached_tokens for output in outputs],
            "lengths": [len(output.outputs[0].token_ids) for output in outputs],
        }
        print("RAN " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
