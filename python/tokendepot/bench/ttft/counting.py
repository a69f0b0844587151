"""How a server's tokens are counted, and in which form prompts are sent. Found out once, before anything is measured."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

from .answer import Answer, RequestFailed
from .prompts import Maker, Prompt
from .server import Server, ServerFault
from .settings import BadSetting, Settings
from .stream import Inbox, Target, ask
from .words import WORDS

USAGE_WORDS = 24  # each costs a request where only usage counts
_PROBE = "and so on"


def local_tokenizer(name: str) -> Any:
    """A tokenizers.Tokenizer from a tokenizer.json or a directory that has one."""
    try:
        import tokenizers
    except ImportError:
        raise BadSetting("--tokenizer needs the package tokenizers: pip install tokenizers") from None
    file = os.path.join(name, "tokenizer.json") if os.path.isdir(name) else name
    try:
        return tokenizers.Tokenizer.from_file(file)
    except Exception as error:  # the library raises Exception itself
        raise BadSetting(f"--tokenizer is {name!r}, expected a tokenizer.json or its directory ({error})") from None


class Counting:
    """Asks the server how it counts; ServerFault when it answers no request at all, or cannot be counted for."""

    def __init__(self, settings: Settings, server: Server, model: str) -> None:
        self._settings, self._server, self._model = settings, server, model
        self._target = Target.of(server.url + settings.path, server.headers, server.tls)
        self._local = local_tokenizer(settings.tokenizer) if settings.tokenizer else None
        usage = self._try(self._first_turn(_PROBE)).prompt_tokens
        self._has_tokenize = server.tokenize(model, self._first_turn(_PROBE)) is not None
        if self._has_tokenize:
            self.counted_by = "the server's /tokenize"
        elif usage is not None:
            self.counted_by = "the server's usage"
        elif self._local:
            self.counted_by = f"the local tokenizer {settings.tokenizer}"
        else:
            raise ServerFault(f"{server.url} has no /tokenize and sends no usage, expected --tokenizer to count with")
        self.sends_ids = settings.endpoint == "completions" and self._takes_ids(usage is not None)

    def maker(self) -> Maker:
        by_usage = self.counted_by == "the server's usage"
        words = USAGE_WORDS if by_usage and not self.sends_ids else len(WORDS)
        try:
            return Maker(self._count, self.ids if self.sends_ids else None, self.sends_ids, not by_usage, words)
        except ValueError as error:
            raise ServerFault(f"{self._server.url}: {error}") from None

    def _first_turn(self, text: str) -> Prompt:
        return [{"role": "user", "content": text}] if self._settings.endpoint == "chat" else text

    def body(self, prompt: Prompt, answer_tokens: int) -> bytes:
        """The JSON of one request."""
        kind = "messages" if self._settings.endpoint == "chat" else "prompt"
        content = {"model": self._model, kind: prompt, "max_tokens": answer_tokens, "temperature": 0, "stream": True}
        return json.dumps({**content, "stream_options": {"include_usage": True}}).encode()

    def _try(self, prompt: Prompt) -> Answer:
        """One token of an answer. It also warms up whatever a server does once."""
        body = self.body(prompt, 1)
        try:
            return asyncio.run(self._ask(body))
        except RequestFailed as failure:
            if failure.kind == "empty" and failure.answer:  # a model may end at once, and has counted all the same
                return failure.answer
            where = self._server.url + self._settings.path
            raise ServerFault(f"{where}: {failure.kind}: {failure}") from None

    async def _ask(self, body: bytes) -> Answer:
        return await ask(self._target, body, self._settings.timeout_s, Inbox())

    def _takes_ids(self, sends_usage: bool) -> bool:
        """Whether ids are taken as ids: not refused, and counted one by one where the server counts."""
        if not self._has_tokenize and not self._local:
            return False
        ids = self.ids(_PROBE)
        try:
            usage = self._try(ids).prompt_tokens
        except ServerFault:
            return False
        return usage == len(ids) or (usage is None and not sends_usage)

    def ids(self, text: str) -> list[int]:
        """Bare ids of a text, nothing added before or after."""
        if self._has_tokenize:
            found = self._server.tokenize(self._model, text, special=False)
            if found is None:
                raise ServerFault(f"{self._server.url}/tokenize does not answer any more")
            return found
        return list(self._local.encode(text, add_special_tokens=False).ids)

    def as_ids(self, prompt: Prompt) -> list[int] | None:
        """The prompt as the model sees it, template and all; None where that cannot be known."""
        if self.sends_ids:
            return prompt
        if self._has_tokenize:
            return self._server.tokenize(self._model, prompt)
        return None

    def _count(self, text: str) -> int:
        if self._has_tokenize:
            return len(self._server.tokenize(self._model, self._first_turn(text)) or ())
        if self.counted_by == "the server's usage":
            counted = self._try(self._first_turn(text)).prompt_tokens
            if counted is None:
                raise ServerFault(f"{self._server.url} sent usage once and not again, expected it with every answer")
            return counted
        return len(self._local.encode(text).ids)
