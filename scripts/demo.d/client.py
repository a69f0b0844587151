"""The demo's talk with a server, over the client of `tokendepot bench ttft`: greedy completions, first tokens of a text."""

from __future__ import annotations

import asyncio
import json

from tokendepot.bench.ttft.answer import Answer, RequestFailed
from tokendepot.bench.ttft.server import Server, ServerFault
from tokendepot.bench.ttft.stream import Inbox, Target, ask

MODEL = "demo"
TIMEOUT_S = 600.0


class Client(Server):
    def complete(self, prompt: str, max_tokens: int) -> Answer:
        """ServerFault unless the answer is whole and its prompt is counted."""
        body = {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        body["stream_options"] = {"include_usage": True}
        target = Target.of(f"{self.url}/v1/completions", {})

        async def once() -> Answer:
            return await ask(target, json.dumps(body).encode(), TIMEOUT_S, Inbox())

        try:
            answer = asyncio.run(once())
        except RequestFailed as failure:
            raise ServerFault(f"{failure.kind}: {failure}") from failure
        if answer.prompt_tokens is None:
            raise ServerFault("the stream carried no usage")
        return answer

    def first_tokens(self, text: str, count: int) -> str:
        """The text of the first `count` tokens of `text`; ServerFault when it has fewer."""
        tokens = self.tokenize(MODEL, text, special=False) or []
        if len(tokens) < count:
            raise ServerFault(f"the document has {len(tokens)} tokens, expected at least {count}")
        return self.detokenize(MODEL, tokens[:count])
