"""How far the reported TTFT is from a scripted one, at 1 and at 64 streams: RESULT lines.

usage: precision.py [--toy]       (tokendepot installed, with its extra `bench`)

The server runs in a process of its own and shares the client's clock. It sends the first token of each answer 100 to
400 ms after the request is there, and 31 more, 20 ms apart; a stream that ends starts again. Limit: 1 ms + 1 % of the
scripted time. Beside it, without a limit: from the server's own stamp of the first token to the client's.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time

from scripted_server import DONE, ScriptedServer, Script, running, text_event, usage_event
from tokendepot.bench.ttft.results import percentile
from tokendepot.bench.ttft.stream import Inbox, Target, ask

TOKENS, STEP_S = 32, 0.020


def first_token_s(number: int) -> float:
    return 0.100 + 0.0047 * (number % 64)


class Scripted(ScriptedServer):
    def script(self, body: dict, number: int) -> Script:
        first = first_token_s(body["number"])
        tokens = [(first + i * STEP_S, text_event(" token")) for i in range(TOKENS)]
        return [(0.001, text_event("")), *tokens, (first + TOKENS * STEP_S, usage_event(10, TOKENS) + DONE)]


async def measure(url: str, streams: int, rounds: int) -> list[tuple[int, float, float]]:
    """(number, seconds from sending to the first token, when that was on the shared clock) of each request."""
    target, inbox = Target.of(url + "/v1/completions", {}), Inbox()
    found = []

    async def stream(which: int) -> None:
        await asyncio.sleep(which * 0.005)
        for number in range(which, streams * rounds, streams):
            body = json.dumps({"prompt": str(number), "number": number}).encode()
            answer = await ask(target, body, 30.0, inbox)
            found.append((number, answer.ttft_s, answer.sent_at + answer.ttft_s))

    await asyncio.gather(*map(stream, range(streams)))
    return found


def limit_s(number: int) -> float:
    return 0.001 + 0.01 * first_token_s(number)


def run(streams: int, rounds: int) -> tuple[list[tuple[int, float, float]], dict[int, tuple[float, float]]]:
    """What measure() found, and the server's stamps of each request: when it was there, when the first token was sent."""
    with running(Scripted()) as server:
        gc.disable()  # as while a cell of the benchmark runs
        found = asyncio.run(measure(server.url, streams, rounds))
        gc.enable()
        return found, {int(entry["prompt"]): (entry["there"], entry["sent"][1]) for entry in server.log()}


def main(toy: bool) -> None:
    for streams, rounds in ((1, 2 if toy else 32), (64, 1 if toy else 16)):
        found, stamps = run(streams, rounds)
        late = [(ttft - first_token_s(number)) * 1e3 for number, ttft, _ in found]
        share = [abs(ttft - first_token_s(number)) / limit_s(number) for number, ttft, _ in found]
        way = [(at - stamps[number][1]) * 1e3 for number, _, at in found]
        for name, values in (("reported - scripted", late), ("server's stamp to client's", way)):
            spread = f"median {percentile(values, 0.5):.3f}, p99 {percentile(values, 0.99):.3f}, most {max(values):.3f}"
            print(f"# {streams} streams, {len(found)} requests, {name}, ms: {spread}")
        print(f"# {streams} streams: {sum(value <= 1 for value in share)} of {len(share)} within the limit")
        for name, value in (("p99", percentile(share, 0.99)), ("most", max(share))):
            print(f"RESULT ttft_error_{streams}_{name} {value:.3f} of_1ms_and_1% limit 1 ratio {value:.3f}")


if __name__ == "__main__":
    began = time.monotonic()
    main("--toy" in sys.argv[1:])
    print(f"# {time.monotonic() - began:.0f} s")
