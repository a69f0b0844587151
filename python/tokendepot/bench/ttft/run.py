"""A run: turn by turn, in each turn context by context, in each context its conversations; resumable after every cell.

A cell is one context in one turn. Everything that costs the client time (making prompts, tokenizing answers, writing
JSON) happens between cells; while a cell runs there is only sending and reading.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import prompts, results, resume
from .answer import Answer, RequestFailed
from .counting import Counting
from .lag import LagMonitor
from .server import Server, ServerFault
from .settings import Settings
from .stream import Inbox, Target, ask

RESTART_TIMEOUT_S = 1800.0  # for the server to answer again after --between
OWN_HITS, EXTERNAL_HITS = "vllm:prefix_cache_hits_total", "vllm:external_prefix_cache_hits_total"
STOPPING = ("http_401", "http_403")
MATRIX_UP_TO = 32  # conversations


@dataclass
class Conversation:
    context: int
    repeat: int
    number: int  # in the run
    generation: int = 0
    prompt: prompts.Prompt = None
    digest: str = ""  # of the prompt
    as_ids: list[int] | None = None
    previous: tuple[prompts.Prompt, list[int] | None] | None = None  # prompt of the turn before
    first: prompts.Prompt = None
    planned: int | None = None  # tokens, of a first turn
    common_prefix: int | None = None
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return any("error" in record for record in self.records)


class Run:
    """One run against one server. `result` is a new one (results.new) or that of a run to go on with.

    go() fills it in and calls `save` after each cell. `advance(tokens)` and `say(sentence)` tell the user.
    """

    def __init__(
        self,
        settings: Settings,
        server: Server,
        result: dict[str, Any],
        save: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self.settings, self._server, self._result, self._save, self._say = settings, server, result, save, say
        entry = server.model(settings.model)
        self._model = entry["id"]
        resume.check_model(result, server.url, self._model)
        self._counting = Counting(settings, server, self._model)
        self._maker = self._counting.maker()
        self.target = Target.of(server.url + settings.path, server.headers, server.tls)
        self.origin = time.perf_counter()
        self.stopped: str | None = None
        form = "token ids" if self._counting.sends_ids else "text"
        tokens = {
            "counted_by": self._counting.counted_by,
            "sent_as": form,
            "added_by_server": self._maker.added,
            "most_of_a_word": self._maker.dearest,
        }
        if result["tokens"] and result["tokens"] != tokens:
            raise ServerFault(f"{server.url} counts otherwise than when the run began: {tokens}, expected {result['tokens']}")
        result["tokens"] = tokens
        resume.take_server(result, {"version": server.version(), "models": server.models(), "model": self._model})
        limit = entry.get("max_model_len")
        self._limit = limit if isinstance(limit, int) else None
        self._skipped = {entry["context"] for entry in result["skipped"]}
        resume.begin_anew(result)
        self._last: list[dict[str, Any]] = []  # requests of the last cell
        self._conversations = self._plan()

    @property
    def contexts(self) -> list[int]:
        """Those that are measured."""
        return list(self._conversations)

    def skip(self, context: int, reason: str) -> None:
        self._skipped.add(context)
        self._result["skipped"].append({"context": context, "reason": reason})
        self._say(f"skipping {context:,} tokens: {reason}")

    def _plan(self) -> dict[int, list[Conversation]]:
        s = self.settings
        planned: dict[int, list[Conversation]] = {}
        for place, context in enumerate(s.contexts):
            longest = context + s.answer_tokens + (s.turns - 1) * (s.answer_tokens + 2 * self._maker.overhead)
            if context in self._skipped:
                continue
            if self._limit is not None and longest > self._limit:
                self.skip(context, f"with questions and answers up to {longest:,}, and the server's limit is {self._limit:,}")
                continue
            planned[context] = [Conversation(context, r, place * s.repeats + r) for r in range(s.repeats)]
            for one in planned[context]:
                one.records = results.of_conversation(self._result, context, one.repeat)
                one.generation = one.records[0]["generation"] if one.records else self._result["resumes"]
            try:
                for one in planned[context]:
                    self._begin(one)
            except prompts.TooSmall as error:
                del planned[context]
                self.skip(context, str(error))
        return planned

    # --- prompts ----------------------------------------------------------------------------------------------------

    def _begin(self, one: Conversation) -> None:
        identity = prompts.Identity(self._result["run_id"], one.generation, one.number)
        content, one.planned = self._maker.context(one.context, identity, f"{self.settings.seed}/{one.number}")
        one.prompt = [{"role": "user", "content": content}] if self.settings.endpoint == "chat" else content
        one.first, one.digest = one.prompt, _digest(one.prompt)
        if one.records and one.digest != one.records[0]["prompt_sha256"]:
            raise ServerFault(f"{self._server.url} tokenizes otherwise than when the run began, so it cannot be resumed")

    def _go_on(self, one: Conversation, turn: int) -> None:
        """From the prompt of turn - 1 to that of `turn`."""
        one.previous = (one.prompt, one.as_ids)
        one.prompt = prompts.longer(one.prompt, one.records[turn - 2]["answer"], turn, self._counting.ids)
        one.digest, one.planned = _digest(one.prompt), None

    def _look(self, one: Conversation) -> None:
        """Notes what the prompt shares with that of the turn before, as ids where they can be known."""
        one.as_ids = self._counting.as_ids(one.prompt)
        if one.previous is None:
            return
        before, ids_before = one.previous
        if one.as_ids is not None and ids_before is not None:
            one.common_prefix = prompts.common_prefix(ids_before, one.as_ids)
        else:
            one.common_prefix = None
        assert prompts.common_prefix(before, one.prompt) == len(before), "a turn begins with the turn before"

    def overlap(self, sent: list[Conversation]) -> dict[str, Any]:
        """Proof that first turns are unlike each other and later ones go on from their own."""
        as_ids = all(one.as_ids is not None for one in sent)
        first = [one.as_ids if as_ids else _text(one.first) for one in sent]
        return {
            "unit": "tokens" if as_ids else "characters",
            "longest": prompts.longest_overlap(first),
            "allowed": results.allowed_overlap(as_ids, self._result["tokens"]),
        }

    def matrix(self, sent: list[Conversation]) -> list[list[int]]:
        """Characters or ids that the last prompt of row i shares with the first prompt of column j."""
        view = (lambda p: p) if self._counting.sends_ids else _text
        return [[prompts.common_prefix(view(a.prompt), view(b.first)) for b in sent] for a in sent]

    # --- running ----------------------------------------------------------------------------------------------------

    def go(self, advance: Callable[[int], None]) -> None:
        """Raises KeyboardInterrupt and ServerFault as they come; what was done until then is in the result."""
        for turn in range(1, self.settings.turns + 1):
            open_cells = [c for c in self._conversations if self._open(c, turn)]
            if turn > 1 and open_cells:
                self._before_later_turn(turn)
            for context in list(self._conversations):
                if self.stopped or context in self._skipped:
                    continue
                try:
                    self._cell(context, turn, advance)
                except ServerFault:
                    resume.lose(self._result, self._last)
                    raise
                except KeyboardInterrupt:  # from a terminal it may have reached the server as well
                    self._ask_whether_gone()
                    raise
        sent = [one for conversations in self._conversations.values() for one in conversations if one.records]
        if len(sent) <= MATRIX_UP_TO:
            unit = "tokens" if self._counting.sends_ids else "characters"
            self._result["overlap"] |= {"matrix": self.matrix(sent), "matrix_unit": unit}
        self._result["complete"] = self.stopped is None

    def _ask_whether_gone(self) -> None:
        if resume.perhaps_lost(self._last):
            try:
                self._server.models()
            except ServerFault:
                resume.lose(self._result, self._last)

    def _open(self, context: int, turn: int) -> list[Conversation]:
        """Conversations of the context that still have to send this turn."""
        return [one for one in self._conversations[context] if len(one.records) == turn - 1 and not one.failed]

    def _before_later_turn(self, turn: int) -> None:
        if self.settings.between:
            self._say(f"before turn {turn}: {self.settings.between}")
            # To stderr with what it prints: stdout is for the result, and may be one JSON document.
            done = subprocess.run(self.settings.between, shell=True, stdin=subprocess.DEVNULL, stdout=2, check=False)
            code = done.returncode
            if code:
                raise ServerFault(f"--between ended with exit code {code}: {self.settings.between!r}")
            until = time.monotonic() + RESTART_TIMEOUT_S
            while True:
                try:
                    self._server.model(self._model)
                    break
                except ServerFault:
                    if time.monotonic() > until:
                        raise
                    time.sleep(0.5)
        if self.settings.cold_gpu and self._server.reset_prefix_cache():
            self._say("the server's own prefix cache was emptied")

    def _cell(self, context: int, turn: int, advance: Callable[[int], None]) -> None:
        conversations = self._conversations[context]
        for one in conversations:
            if len(one.records) >= turn - 1 and not one.failed and turn > 1:
                self._go_on(one, turn)
            if len(one.records) >= turn - 1 and not one.failed:
                self._look(one)
        if turn == 1:
            every = [one for c in self._conversations.values() for one in c if one.as_ids or one.context <= context]
            self._result["overlap"] = overlap = self.overlap(every)
            if overlap["longest"] > overlap["allowed"]:
                raise ServerFault(
                    f"first turns share {overlap['longest']} {overlap['unit']}, expected {overlap['allowed']} at most: "
                    "they would not be cold"
                )
        todo = self._open(context, turn)
        advance(context * (len(conversations) - len(todo)))
        if not todo:
            return
        bodies = [self._counting.body(one.prompt, self.settings.answer_tokens) for one in todo]
        before = self._server.metrics()
        cell = _Cell(self, turn, todo, bodies, advance)
        self._result["begun"] = {"context": context, "turn": turn, "repeats": [one.repeat for one in todo]}
        self._save()  # before anything is sent: who is killed meanwhile says nothing more
        gc.collect()
        gc.disable()
        try:
            asyncio.run(cell.run())
        finally:
            gc.enable()
            cell.tell()
            # What overflowed is skipped, as it is where the server tells its limit beforehand, and no failure.
            kept = [record for record in cell.records if record.get("error") != "context_overflow"]
            ended = cell.ended(before, self._server)
            if kept or not cell.records:
                self._result["requests"] += kept
                self._result["cells"].append(ended)
            self._last = cell.records
            self._result["begun"] = None
            self._save()
        if resume.perhaps_lost(cell.records):
            self._server.models()  # ServerFault when it has gone: there may be no other cell to find that out


class _Cell:
    """The requests of one context in one turn, with at most `concurrency` in flight, in the order of `todo`."""

    def __init__(
        self, run: Run, turn: int, todo: list[Conversation], bodies: list[bytes], advance: Callable[[int], None]
    ) -> None:
        self._run, self._turn, self._todo, self._bodies, self._advance = run, turn, todo, bodies, advance
        self._lag = LagMonitor()
        self._next = 0
        self._in_flight = self._peak = self._not_told = 0
        self._began = self._ended = 0.0
        self._overflow = ""  # what the server said
        self.records: list[dict[str, Any]] = []

    async def run(self) -> None:
        settings = self._run.settings
        inbox = Inbox()
        self._lag.start()
        self._began = time.perf_counter()
        try:
            workers = min(settings.concurrency, len(self._todo))
            await asyncio.gather(*(self._work(inbox, settings) for _ in range(workers)))
        finally:
            self._ended = time.perf_counter()
            self._lag.stop()

    async def _work(self, inbox: Inbox, settings: Settings) -> None:
        while self._next < len(self._todo) and not self._run.stopped and not self._overflow:
            place = self._next
            self._next += 1
            due = time.perf_counter()
            if settings.rate is not None:
                due = self._began + place / settings.rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                if self._run.stopped:
                    return
            self._in_flight += 1
            self._peak = max(self._peak, self._in_flight)
            await self._one(self._todo[place], self._bodies[place], due, inbox, settings)
            self._in_flight -= 1
            self._not_told += self._todo[place].context
            if not self._in_flight and settings.rate is None:
                self.tell()  # drawing takes milliseconds, which nobody waits for now

    def tell(self) -> None:
        self._advance(self._not_told)
        self._not_told = 0

    async def _one(self, one: Conversation, body: bytes, due: float, inbox: Inbox, settings: Settings) -> None:
        run = self._run
        record = {
            "context": one.context,
            "repeat": one.repeat,
            "turn": self._turn,
            "generation": one.generation,
            "prompt_sha256": one.digest,
            "planned_tokens": one.planned,
            "common_prefix": one.common_prefix,
            "common_prefix_of": None if one.common_prefix is None else len(one.previous[1]),
            "scheduled_s": due - run.origin,
        }
        begun = time.perf_counter()
        try:
            answer = await ask(run.target, body, settings.timeout_s, inbox)
        except RequestFailed as failure:
            record |= {"error": failure.kind, "message": str(failure), "failed_after_s": time.perf_counter() - begun}
            if failure.kind in STOPPING:
                run.stopped = f"{failure.kind}: {failure}"
                record["cut_off"] = True
            if failure.kind == "context_overflow":
                self._overflow = str(failure) or failure.kind
        except asyncio.CancelledError:
            if self._turn == 1:
                raise  # the server may have seen this context: a resumed run takes another
            record |= {"error": "interrupted", "message": "the run was interrupted", "cut_off": True}
            record["failed_after_s"] = time.perf_counter() - begun
            one.records.append(record)
            self.records.append(record)
            raise
        else:
            record |= times_and_counts(answer, due, run.origin)
            record["client_lag_s"] = self._lag.worst(answer.sent_at, answer.sent_at + answer.ttft_s)
        one.records.append(record)
        self.records.append(record)

    def ended(self, before: dict[str, float], server: Server) -> dict[str, Any]:
        """The cell without its requests: how long it took, and what the server's caches counted meanwhile."""
        if self._overflow:
            self._run.skip(self._todo[0].context, f"in turn {self._turn} the server says that it is too long: {self._overflow}")
        try:
            after = server.metrics()
        except ServerFault:
            after = {}

        def grown(name: str) -> float | None:
            return after[name] - before[name] if name in before and name in after else None

        return {
            "context": self._todo[0].context,
            "turn": self._turn,
            "in_flight": self._peak,
            "wall_s": self._ended - self._began,
            "own_cache_tokens": grown(OWN_HITS),
            "external_cache_tokens": grown(EXTERNAL_HITS),
        }


def times_and_counts(answer: Answer, due: float, origin: float) -> dict[str, Any]:
    """What a complete answer adds to its record. Times in seconds; those without "scheduled" count from the request's sending."""
    waited = answer.sent_at - due
    return {
        "sent_s": answer.sent_at - origin,
        "connect_s": answer.connect_s,
        "first_byte_s": answer.first_byte_s,
        "ttft_s": answer.ttft_s,
        "ttft_from_schedule_s": waited + answer.ttft_s,
        "first_content_s": answer.first_content_s,
        "token_s": answer.token_s,
        "end_s": answer.end_s,
        "end_from_schedule_s": waited + answer.end_s,
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
        "output_tokens": answer.output_tokens,
        "output_estimated": answer.estimated,
        "finish_reason": answer.finish_reason,
        "answer": answer.text,
    }


def _text(prompt: prompts.Prompt) -> str | list[int]:
    if isinstance(prompt, list) and isinstance(prompt[0], dict):
        return "\n".join(message["content"] for message in prompt)
    return prompt


def _digest(prompt: prompts.Prompt) -> str:
    return hashlib.sha256(json.dumps(prompt).encode()).hexdigest()
