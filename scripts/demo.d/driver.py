"""The demo: a long document, a question, kill -9, restart, another question, with and without the depot."""

from __future__ import annotations

import argparse
import pathlib
import shlex
import shutil
import signal
import sys
import tempfile
import time
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import client
import document
import model as checkpoint
import panels
import report
import server

LOADED_BYTES = "tokendepot_load_bytes_total"
LOAD_SECONDS = "tokendepot_load_seconds_total"
STORED_BYTES = "tokendepot_store_bytes_total"

ANSWER_TOKENS = 24
QUESTION_TOKENS = 256  # room for two questions and two answers
START_TIMEOUT_S = 300.0
QUIET_S = 2.0  # no store acknowledged for so long: the depot has what it was given
GIB = 1 << 30


class Demo:
    vllm_options: tuple[str, ...] = ()  # beside those of server.vllm_command()
    sees_prompts = True  # the depot's process does

    def __init__(self, options: argparse.Namespace, console: Console, progress: Progress) -> None:
        self.options = options
        self.console = console
        self.progress = progress
        self.bar = progress.add_task("set-up", total=3 + 3 * len(options.contexts))
        self.work = pathlib.Path(tempfile.mkdtemp(prefix="tokendepot-demo-", dir="/var/tmp"))
        self.memory: pathlib.Path | None = None
        if shutil.disk_usage("/dev/shm").free >= 3 * GIB:
            self.memory = pathlib.Path(tempfile.mkdtemp(prefix="tokendepot-demo-", dir="/dev/shm"))
        self.start_s = 0.0
        self.panels: list[panels.Value] = []

    def close(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        if self.memory is not None:
            shutil.rmtree(self.memory, ignore_errors=True)

    def roots(self) -> list[str]:
        roots = [f"{self.memory}/depot?capacity=2GiB"] if self.memory is not None else []
        return [*roots, f"{self.work}/depot?capacity=4GiB"]

    def say(self, text: str) -> None:
        elapsed = int(time.time() - self.options.since)
        self.console.print(f"[dim]{elapsed // 60:2d}:{elapsed % 60:02d}[/dim]  {text}", highlight=False, soft_wrap=True)

    @contextmanager
    def running(self, what: str, model: pathlib.Path, kv_config: str | None):
        """A server that is ready and warmed up; killed with -9 at the end of the block."""
        self.progress.update(self.bar, description=f"starting vLLM, {what}")
        longest = max(self.options.contexts) + QUESTION_TOKENS

        def command(port: int) -> list[str]:
            arguments = [*server.vllm_command(model, port, longest, kv_config), *self.vllm_options]
            return shlex.split(self.options.server) + arguments[3:] if self.options.server else arguments

        one = server.Server(command, server.vllm_environment(kv_cache_gib=2), self.work / f"server-{what.replace(' ', '-')}.log")
        try:
            self.start_s = one.wait_ready(START_TIMEOUT_S, lambda waited: self.progress.refresh())
            one.client.complete("Good morning.", 4)  # what a process does once is not what we measure
            self.progress.advance(self.bar)
            self.say(f"vLLM is up ({what}, {self.start_s:.0f} s)")
            yield one.client
        except client.ServerFault as fault:
            self.options.out.mkdir(parents=True, exist_ok=True)
            shutil.copy(one.log, self.options.out / one.log.name)
            raise client.ServerFault(f"{what}: {fault}; the server's log is {self.options.out / one.log.name}") from fault
        finally:
            one.kill()
        self.say("kill -9")

    def ask(self, api: client.Client, prompt: str, what: str) -> client.Answer:
        self.progress.update(self.bar, description=what)
        answer = api.complete(prompt, ANSWER_TOKENS)
        self.progress.advance(self.bar)
        self.say(f"{what}: first token after {answer.ttft_s:.2f} s, {answer.cached_tokens or 0:,} of {answer.prompt_tokens:,} tokens cached")
        return answer

    def fits(self, context: int, previous: tuple[int, float] | None) -> bool:
        """Whether both recomputations of this context and the two starts to come fit in the time."""
        if previous is None:
            return True
        expected = previous[1] * (context / previous[0]) ** 1.5
        return time.time() - self.options.since + 2 * expected + 2 * self.start_s + 45 < self.options.minutes * 60

    def run(self, model: pathlib.Path) -> list[report.Row]:
        with_depot = self.kv_transfer_config()
        first: dict[int, tuple[str, client.Answer]] = {}
        with self.running("empty depot", model, with_depot) as api:
            previous = None
            for number, context in enumerate(self.options.contexts):
                if not self.fits(context, previous):
                    self.say(f"leaving out {context:,} tokens: this machine would need too long")
                    continue
                prompt = api.first_tokens(document.day_book(number, context // 30), context) + document.FIRST_QUESTION
                answer = self.ask(api, prompt, f"turn 1, {context:,} tokens, cold")
                if answer.cached_tokens:
                    raise client.ServerFault(f"the cold prompt of {context} tokens had {answer.cached_tokens} cached tokens")
                previous = (context, answer.ttft_s)
                first[context] = (prompt, answer)
            self.progress.update(self.bar, total=3 + 3 * len(first))
            self.settle(api)
        second = {c: prompt + answer.text + document.SECOND_QUESTION for c, (prompt, answer) in first.items()}

        warm: dict[int, tuple[client.Answer, float, float]] = {}
        with self.running("same depot", model, with_depot) as api, self.watched(api):
            for context, prompt in second.items():
                bytes_before, seconds_before = self.loaded(api)
                answer = self.ask(api, prompt, f"turn 2, {context:,} tokens, from the depot")
                bytes_after, seconds_after = self.loaded(api)
                warm[context] = (answer, bytes_after - bytes_before, seconds_after - seconds_before)

        cold: dict[int, client.Answer] = {}
        with self.running("no depot", model, None) as api:
            for context, prompt in second.items():
                cold[context] = self.ask(api, prompt, f"turn 2, {context:,} tokens, without a depot")

        return [
            report.Row(
                context=context,
                prompt_tokens=warm[context][0].prompt_tokens,
                cold_s=first[context][1].ttft_s,
                restart_cold_s=cold[context].ttft_s,
                restart_warm_s=warm[context][0].ttft_s,
                loaded_bytes=int(warm[context][1]),
                load_s=warm[context][2],
                cached_tokens=warm[context][0].cached_tokens or 0,
                answers_equal=warm[context][0].text == cold[context].text,
                warm_answer=warm[context][0].text,
                cold_answer=cold[context].text,
            )
            for context in first
        ]

    def kv_transfer_config(self) -> str:
        return server.kv_transfer_config(self.roots())

    def depot(self, api: client.Client) -> client.Client:
        """Who counts what the depot does."""
        return api

    def loaded(self, api: client.Client) -> tuple[float, float]:
        """Bytes from the depot since the start, and the seconds that each extent took, added up."""
        metrics = self.depot(api).metrics()
        return metrics.get(LOADED_BYTES, 0.0), metrics.get(LOAD_SECONDS, 0.0)

    def stored_bytes(self, api: client.Client) -> float:
        return self.depot(api).metrics().get(STORED_BYTES, 0.0)

    @contextmanager
    def watched(self, api: client.Client):
        """With --metrics: Prometheus scrapes meanwhile, and at the end says what the dashboard shows."""
        if not self.options.metrics:
            yield
            return
        watch = panels.Watch(self.work, self.scraped(api), self.roots())
        try:
            watch.wait_scraped()
            yield
            self.panels = watch.values()
        finally:
            watch.close()

    def scraped(self, api: client.Client) -> dict[str, str]:
        """Job -> URL of what serves metrics beside the roots."""
        return {"vllm": api.url}

    def settle(self, api: client.Client) -> None:
        """Until the depot has acknowledged what it was given: a user takes longer to think than this."""
        stored, since = -1.0, time.monotonic()
        deadline = since + 30
        while time.monotonic() < deadline and time.monotonic() - since < QUIET_S:
            now = self.stored_bytes(api)
            if now != stored:
                stored, since = now, time.monotonic()
            time.sleep(QUIET_S / 8)
        self.say(f"the depot holds {stored / 1e6:.1f} MB")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("demo-out"), help="directory of ttft.json and ttft.png")
    parser.add_argument("--contexts", default="1000,2000,4000,8000", help="tokens of the document, ascending")
    parser.add_argument("--minutes", type=float, default=13.0, help="time for everything; larger contexts are left out")
    parser.add_argument("--model", type=pathlib.Path, help="a model directory of your own")
    parser.add_argument("--metrics", action="store_true", help="show what the dashboard shows, by a Prometheus of its own")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model: quicker, with answers that mean nothing")
    parser.add_argument("--cache", type=pathlib.Path, default=pathlib.Path(".cache"), help="where the model is built")
    parser.add_argument("--server", help="a command that takes the arguments of vLLM's API server, instead of it")
    parser.add_argument("--since", type=float, default=time.time(), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    try:
        options.contexts = sorted({int(text) for text in options.contexts.split(",")})
    except ValueError:
        parser.error(f"--contexts is {options.contexts!r}, expected numbers with commas between")
    if options.contexts[0] < 300:
        parser.error(f"--contexts has {options.contexts[0]}, expected 300 or more: the depot keeps chunks of 256 tokens")
    if options.model is not None and not (options.model / "config.json").is_file():
        parser.error(f"--model is {options.model}, expected a directory with a config.json")
    for name in ("out", "cache", "model"):
        if getattr(options, name) is not None:
            setattr(options, name, getattr(options, name).resolve())
    return options


def main(argv: list[str] | None = None, kind: type[Demo] = Demo) -> int:
    options = arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console() if sys.stdout.isatty() else Console(width=120)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        demo = kind(options, console, progress)
        try:
            about = f"Model: {options.model}"
            if options.model is None:
                demo.say("preparing the model")
                options.model, about = checkpoint.prepare(options.cache, options.tiny)
            demo.say(about)
            rows = demo.run(options.model)
        except client.ServerFault as fault:
            console.print(f"[red]the demo failed:[/red] {escape(str(fault))}", highlight=False, soft_wrap=True)
            return 1
        finally:
            demo.close()
    console.print(report.table(rows))
    found = report.complaints(rows)
    if options.metrics:
        console.print(panels.table(demo.panels))
        found += panels.complaints(demo.panels, demo.sees_prompts)
    return conclude(rows, found, about, options, console)


def conclude(rows: list[report.Row], found: list[str], about: str, options: argparse.Namespace, console: Console) -> int:
    options.out.mkdir(parents=True, exist_ok=True)
    report.write_json(rows, {"model": options.model.name, "complaints": found}, options.out / "ttft.json")
    report.write_plot(rows, options.model.name, options.out / "ttft.png")
    for line in (
        "Turn 2 is the document, the first question with its answer, and a second question. Load rate: bytes over the",
        "seconds that each extent took; extents overlap, so the depot as a whole moves more than this.",
        about,
        f"Wrote {options.out / 'ttft.json'} and {options.out / 'ttft.png'}",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for line in found:
        console.print(f"FAILED: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
