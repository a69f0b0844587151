"""What the vLLM connector costs where it cannot help: a cold prefill, and an engine step that only decodes.

Prints lines "RESULT name value unit limit value ratio value" as all benchmarks do. Needs vLLM and tokendepot installed.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

TREE = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(TREE / "scripts" / "demo.d"))

import model as checkpoint  # noqa: E402
from engines import CHUNK_TOKENS, BenchError, Depot, Engine, Switched, engine_arguments  # noqa: E402
from hook_events import Event, Switch, group_count, read_events  # noqa: E402
from measure import Couple, Pair, cold_prefills, decodings, hook_shares, idle_steps, percentile, spread  # noqa: E402

IDLE_LIMIT_MS = 2.0
FEW, MANY, MANY_TOY = 1, 64, 4  # requests that decode at once
GIB = 1 << 30


def print_result(name: str, value: float, unit: str, limit: float, ratio: float | None = None) -> None:
    ratio = value / limit if ratio is None else ratio
    print(f"RESULT {name} {value:.4g} {unit} limit {limit:.4g} ratio {ratio:.3f}", flush=True)


@dataclass(frozen=True)
class Session:
    """What is done between one start of the engines and their end."""

    model: Path
    pairs: int = 0  # cold prompts
    idle: bool = False


def sessions_of(options: argparse.Namespace, say: Callable[[str], None]) -> list[Session]:
    """Idle steps take the tiny model: a quick step shows best what is added to it."""
    tiny, _ = checkpoint.prepare(options.cache, tiny=True)
    if options.toy:
        return [Session(tiny, options.pairs if "prefill" in options.part else 0, "idle" in options.part)]
    sessions = []
    if "prefill" in options.part:
        model = options.model
        if model is None:
            model, about = checkpoint.prepare(options.cache)
            say(about)
        ends = [options.pairs * number // options.starts for number in range(options.starts + 1)]
        sessions += [Session(model, end - begin) for begin, end in pairwise(ends)]
    if "idle" in options.part:
        sessions.append(Session(tiny, idle=True))
    return sessions


class Bench:
    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options = options
        self.work = work
        self.rng = random.Random(options.seed)
        self.begin = time.monotonic()
        self.starts = 0

    def say(self, text: str) -> None:
        elapsed = int(time.monotonic() - self.begin)
        print(f"{elapsed // 60:2d}:{elapsed % 60:02d}  {text}", flush=True)

    @contextmanager
    def couple(self, model: Path) -> Iterator[tuple[Couple, Path]]:
        """An engine on a root that did not exist with its control, and the directory of the hooks' times."""
        self.starts += 1
        depot, hooks = Depot(self.options.root / f"depot{self.starts}"), self.work / f"hooks{self.starts}"
        hooks.mkdir()
        longest = max(self.options.tokens, 2 * CHUNK_TOKENS) + 64
        root = f"{depot.path}?capacity={self.options.capacity_gib}GiB"
        engines: list[Engine] = []
        kinds = [("with the depot", root), ("without", None)] if self.options.control == "engine" else [("with the depot", root)]
        try:
            for name, place in kinds:
                log = self.work / f"engine-{name.replace(' ', '-')}-{self.starts}.log"
                engines.append(Engine(name, engine_arguments(model, longest, MANY, place), hooks, log))
            for engine in engines:
                engine.wait_ready()
            groups = group_count(hooks)
            self.say(f"up, start {self.starts}: {model.name}, {groups} KV-cache groups")
            if self.options.control == "engine":
                yield Couple(engines[0], engines[1], depot, groups, self.rng), hooks
            else:
                switch = Switch(hooks)
                pair = [Switched(name, engines[0], switch, on) for name, on in (("with the depot", True), ("without", False))]
                yield Couple(pair[0], pair[1], depot, groups, self.rng), hooks
            self.say(f"the depot keeps {depot.count()} extents in {depot.path}")
        finally:
            for engine in engines:
                engine.end()
            for engine in engines:
                engine.close()

    def run(self, sessions: Sequence[Session]) -> None:
        pairs: list[Pair] = []
        alone: list[Pair] = []
        crowd: list[Pair] = []
        events: list[Event] = []
        for session in sessions:
            with self.couple(session.model) as (couple, hooks):
                if session.pairs:
                    cold_prefills(couple, 1, self.options.tokens, lambda text: self.say(f"warm-up: {text}"))
                    found = cold_prefills(couple, session.pairs, self.options.tokens, self.say)
                    self.say(f"ratios since this start: {spread([pair.ratio for pair in found])}")
                    pairs += found
                if session.idle:
                    alone = decodings(couple, FEW, self.options.decodings, self.say)
                    crowd = decodings(couple, self.options.many, self.options.decodings, self.say)
            events += read_events(hooks)
        if pairs:
            self.report_prefill(pairs, events)
        if alone:
            self.report_idle(alone, crowd, events)

    def report_prefill(self, pairs: Sequence[Pair], events: Sequence[Event]) -> None:
        with_depot = [pair.with_depot.seconds for pair in pairs]
        without = [pair.without.seconds for pair in pairs]
        ratios = [pair.ratio for pair in pairs]
        print(f"cold prefill of {self.options.tokens} tokens, ratios of the pairs: {spread(ratios)}")
        middle = statistics.median(with_depot)
        print_result("connector_cold_prefill", middle, "s", statistics.median(without), statistics.median(ratios))
        # What else runs on a machine only ever adds time, so the quicker runs say more.
        print_result("connector_cold_prefill_quartile", percentile(with_depot, 0.25), "s", percentile(without, 0.25))
        shares = hook_shares(events, [pair.with_depot for pair in pairs])
        inside = [sum(values) for values in zip(*(share.seconds for share in shares), strict=True)]
        print_result("connector_cold_prefill_hooks", statistics.median(inside) * 1e3, "ms", middle * 1e3)
        for share in shares[:4]:
            print(f"  {share.hook}: {statistics.median(share.seconds) * 1e3:.3f} ms a prompt")

    def report_idle(self, alone: Sequence[Pair], crowd: Sequence[Pair], events: Sequence[Event]) -> None:
        one = self.idle_times(events, alone, FEW)
        print_result("connector_idle_step", statistics.median(one), "ms", IDLE_LIMIT_MS)
        print_result("connector_idle_step_p99", percentile(one, 0.99), "ms", IDLE_LIMIT_MS)
        many = self.idle_times(events, crowd, self.options.many)
        print_result("connector_idle_step_64", statistics.median(many), "ms", IDLE_LIMIT_MS)
        print_result("connector_idle_step_64_p99", percentile(many, 0.99), "ms", IDLE_LIMIT_MS)
        print_result("connector_decode_step", *self.whole_steps(alone))
        print_result("connector_decode_step_64", *self.whole_steps(crowd))
        for share in hook_shares(events, [pair.with_depot for pair in crowd])[:4]:
            print(f"  {share.hook}: {statistics.median(share.seconds) * 1e3:.3f} ms a text")

    def idle_times(self, events: Sequence[Event], pairs: Sequence[Pair], requests: int) -> list[float]:
        """Milliseconds of all hooks together in each idle step."""
        steps = idle_steps(events, pairs, requests)
        decoded = sum(pair.with_depot.lengths[0] - 1 for pair in pairs)
        if len(steps) < 0.9 * decoded:
            raise BenchError(f"{len(steps)} steps with {requests} requests were idle, expected nearly all {decoded}")
        print(f"idle steps with {requests} requests: {len(steps)} of {decoded}")
        return [step.total * 1e-6 for step in steps]

    def whole_steps(self, pairs: Sequence[Pair]) -> tuple[float, str, float, float]:
        """Milliseconds of a whole step with the depot, the unit, the same without it, the median of the pairs' ratios."""
        with_depot = statistics.median(pair.with_depot.seconds / pair.with_depot.lengths[0] for pair in pairs)
        without = statistics.median(pair.without.seconds / pair.without.lengths[0] for pair in pairs)
        print(f"whole steps, ratios of the pairs: {spread([pair.ratio for pair in pairs])}")
        return with_depot * 1e3, "ms", without * 1e3, statistics.median(pair.ratio for pair in pairs)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("part", nargs="*", help="prefill, idle (default: both)")
    parser.add_argument("--toy", action="store_true", help="tiny model, small sizes: the figures mean nothing")
    parser.add_argument(
        "--control",
        choices=("switch", "engine"),
        default="switch",
        help="what is compared with: the same engine while its hooks return at once, or another engine without a connector. "
        "Two processes differ by more than the connector adds, so the second wants many starts",
    )
    parser.add_argument("--pairs", type=int, default=40, help="pairs of cold prompts")
    parser.add_argument("--starts", type=int, default=1, help="starts of the engines that the pairs are spread over")
    parser.add_argument("--tokens", type=int, default=2048, help="length of a cold prompt")
    parser.add_argument("--decodings", type=int, default=8, help="texts of 254 tokens that each request writes")
    parser.add_argument("--model", type=Path, help="a model directory of your own, for the prefill")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where models are built")
    parser.add_argument("--root", type=Path, help="where the depot's roots are made and left (default: /dev/shm, removed)")
    parser.add_argument("--capacity-gib", type=int, default=4, help="capacity of the root")
    parser.add_argument("--seed", type=int, default=1, help="of the prompts and of who is first")
    options = parser.parse_args(argv)
    options.part = options.part or ["prefill", "idle"]
    for part in options.part:
        if part not in ("prefill", "idle"):
            parser.error(f"part is {part!r}, expected prefill or idle")
    if options.toy:
        options.pairs, options.starts, options.tokens, options.capacity_gib = 3, 1, 2 * CHUNK_TOKENS + 10, 1
        options.decodings = 1
    options.many = MANY_TOY if options.toy else MANY
    if options.tokens < CHUNK_TOKENS:
        parser.error(f"--tokens is {options.tokens}, expected {CHUNK_TOKENS} or more: the depot keeps whole chunks")
    for name in ("pairs", "starts", "decodings", "capacity-gib"):
        if getattr(options, name.replace("-", "_")) < 1:
            parser.error(f"--{name} is {getattr(options, name.replace('-', '_'))}, expected 1 or more")
    if options.starts > options.pairs:
        parser.error(f"--starts is {options.starts}, expected at most --pairs, which is {options.pairs}")
    for name in ("cache", "model", "root"):
        if getattr(options, name) is not None:
            setattr(options, name, getattr(options, name).resolve())
    return options


@contextmanager
def places(options: argparse.Namespace) -> Iterator[Path]:
    """The directory of logs and hooks' times, removed at the end, and so is that of the roots unless it was named."""
    work = Path(tempfile.mkdtemp(prefix="tokendepot-bench-", dir="/var/tmp"))
    made = None
    if options.root is None:
        if shutil.disk_usage("/dev/shm").free < (options.capacity_gib + 1) * GIB:
            raise BenchError(f"/dev/shm has less than {options.capacity_gib + 1} GiB free: name another place with --root")
        made = options.root = Path(tempfile.mkdtemp(prefix="tokendepot-bench-", dir="/dev/shm"))
    try:
        yield work
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with places(options) as work:
            bench = Bench(options, work)
            bench.run(sessions_of(options, bench.say))
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
