"""`tokendepot replay` and `tokendepot plan`: what a trace of prompts finds in a depot, and how large it should be."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import _core
from . import show

if TYPE_CHECKING:
    from ..bench.cache_models import Cache, Outcome
    from ..bench.extents import Geometry
    from ..bench.plan import Planner, Prefill
    from ..bench.shapes import Shape
    from ..bench.traces import Trace

DAMAGED, NOT_DONE, INTERRUPTED = 1, 3, 130
INSTALL = "pip install 'tokendepot[bench]'"

Traces = Annotated[list[str], typer.Argument(metavar="TRACE", help="Files of one trace, plain or gzip.")]
Model = Annotated[str, typer.Option("--model", help="A known model, or the path of a Hugging Face config.json.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Type of KV elements: bf16, fp16, fp32 or fp8.")]
ChunkTokens = Annotated[
    int | None,
    typer.Option(min=1, show_default="the trace's blocks", help="Tokens of a chunk; only complete chunks are kept."),
]
Requests = Annotated[int | None, typer.Option(min=1, show_default="all", help="Only the first so many requests.")]
BlockTokens = Annotated[
    int | None, typer.Option(min=1, show_default="found out", help="Tokens of a block of the trace.")
]
TimeUnit = Annotated[
    str | None, typer.Option(metavar="ms|s", show_default="the format's", help="Unit of the trace's times.")
]
SessionEvery = Annotated[float, typer.Option(min=0.0, help="Seconds between the starts of agent sessions.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first broken line instead of skipping it.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def _refuse(option: str | None, why: object) -> typer.BadParameter:
    return typer.BadParameter(str(why), param_hint=option and f"'{option}'")


def _missing(error: ImportError) -> typer.BadParameter:
    return _refuse(None, f"the package {error.name} is missing; {INSTALL} installs it")


def _read(paths: list[str], chunk_tokens: int | None, time_unit: str | None, **how: Any) -> Trace:
    from ..bench.traces import TIME_UNITS, TraceError, in_chunks, read_trace

    if time_unit is not None and time_unit not in TIME_UNITS:
        raise _refuse("--time-unit", f"'{time_unit}': expected ms or s")
    total = 0
    for path in paths:
        with suppress(OSError):  # reading says what is wrong
            total += os.path.getsize(path)
    try:
        with show.progress_of_bytes("reading", total) as advance:
            trace = read_trace(paths, time_unit=time_unit, advance=advance, **how)
        return in_chunks(trace, chunk_tokens) if chunk_tokens else trace
    except TraceError as error:
        raise _refuse(None, error) from None


def _shape(model: str, dtype: str) -> Shape:
    from ..bench.shapes import ShapeError, element_bytes, shape_of

    try:
        element_bytes(dtype)
        return shape_of(model)
    except ShapeError as error:
        raise _refuse(None, error) from None


def _size(option: str, text: str) -> int:
    try:
        return _core.parse_size(text)
    except _core.DepotError as error:
        raise _refuse(option, error) from None


def _size_or_share(option: str, text: str, whole_bytes: int) -> int:
    """Bytes, from a size or from a percentage of the trace's different blocks."""
    if not text.endswith("%"):
        return _size(option, text)
    try:
        share = float(text[:-1])
    except ValueError:
        share = -1.0
    if not 0 < share <= 1000:
        raise _refuse(option, f"'{text}': expected a percentage above 0% and up to 1000%")
    return int(whole_bytes * share / 100)


# --- replay ----------------------------------------------------------------------------------------------------------


def replay(
    traces: Traces,
    capacity: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE|PERCENT",
            show_default="10%",
            help="Of each tier, fastest first: 64GiB, or 10% of the trace's different blocks.",
        ),
    ] = None,
    root: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR", help="Really store and load there, in a new or empty directory; one a --capacity."),
    ] = None,
    model: Model = "llama-3.1-8b",
    dtype: Dtype = "bf16",
    layers: Annotated[
        int | None, typer.Option(min=1, show_default="all", help="Keep so many of the model's layers only.")
    ] = None,
    block_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", show_default="the model's", help="KV of a block, without a model.")
    ] = None,
    segment: Annotated[
        str | None, typer.Option(metavar="SIZE", show_default="the engine's choice", help="Size of segments.")
    ] = None,
    speed: Annotated[
        float | None,
        typer.Option(min=1e-6, show_default="as fast as it goes", help="With --root: 1 = at the trace's own times."),
    ] = None,
    rewrite_percent: Annotated[
        int, typer.Option(min=0, max=10, help="With --root: the depot's option of that name.")
    ] = 0,
    keep: Annotated[bool, typer.Option("--keep", help="With --root: leave the depot there.")] = False,
    chunk_tokens: ChunkTokens = None,
    requests: Requests = None,
    block_tokens: BlockTokens = None,
    time_unit: TimeUnit = None,
    session_every: SessionEvery = 0.0,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Plays a trace of prompts against models of a depot and, with --root, against a real one: hits, bytes, evictions."""
    from ..bench.cache_models import Outcome, play
    from . import replay_tables

    asked, roots = capacity or ["10%"], root or []
    if roots and len(roots) != len(asked):
        raise _refuse("--capacity", f"expected one for each of the {len(roots)} roots, got {len(asked)}")
    for option, given in (("--speed", speed is not None), ("--rewrite-percent", rewrite_percent > 0), ("--keep", keep)):
        if given and not roots:
            raise _refuse(option, "expected a --root with it")
    shape = _shape(model, dtype)
    if layers is not None and layers > shape.layers:
        raise _refuse("--layers", f"{layers}: expected at most the {shape.layers} of {model}")
    how = {"limit": requests, "block_tokens": block_tokens, "session_every_s": session_every, "strict": strict}
    trace = _read(traces, chunk_tokens, time_unit, **how)
    geometry = _geometry(shape, dtype, layers, block_bytes, trace)
    capacities = [_size_or_share("--capacity", text, trace.unique_blocks * geometry.extent_bytes) for text in asked]
    segment_bytes = _size("--segment", segment) if segment else None
    caches = _caches(geometry.extent_bytes, capacities, segment_bytes)
    outcomes: dict[str, Outcome] = {}
    interrupted = False
    try:
        if roots:
            tiers = list(zip(roots, capacities, strict=True))
            _play_really(trace, tiers, segment_bytes, geometry, speed, rewrite_percent, keep, outcomes)
        with show.progress_of_count("playing", len(trace.requests) * len(caches)) as advance:
            for name, cache in caches.items():
                outcomes[name] = Outcome()
                play(trace, cache, outcomes[name], advance)
    except KeyboardInterrupt:
        interrupted = True
    report = replay_tables.PlayReport(trace, outcomes, geometry, capacities, interrupted)
    if as_json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        report.say("as stated" if block_bytes else f"{model}, {dtype}, {geometry.layers} layers")
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _geometry(shape: Shape, dtype: str, layers: int | None, block_bytes: str | None, trace: Trace) -> Geometry:
    from ..bench.extents import Geometry, SizeError

    if block_bytes is None:
        return Geometry.of_model(shape, dtype, trace.block_tokens, layers or shape.layers)
    try:
        return Geometry.of_bytes(_size("--block-bytes", block_bytes))
    except SizeError as error:
        raise _refuse("--block-bytes", error) from None


def _caches(extent_bytes: int, capacities: list[int], segment_bytes: int | None) -> dict[str, Cache]:
    """Models of the same capacity; those without tiers get the largest one's, which also holds what is above it."""
    from ..bench.cache_models import BlockCache, SegmentCache
    from ..bench.extents import SizeError

    blocks = max(capacities) // extent_bytes
    try:
        return {
            "depot (model)": SegmentCache(capacities, extent_bytes, segment_bytes),
            "LRU by block": BlockCache(blocks),
            "FIFO by block": BlockCache(blocks, fifo=True),
            "no bound": BlockCache(None),
        }
    except SizeError as error:
        raise _refuse(None, error) from None


def _play_really(
    trace: Trace,
    roots: list[tuple[str, int]],
    segment_bytes: int | None,
    geometry: Geometry,
    speed: float | None,
    rewrite_percent: int,
    keep: bool,
    outcomes: dict[str, Outcome],
) -> None:
    try:
        from ..bench.interrupts import Interrupts
        from ..bench.real_depot import RealDepot, RealOutcome, RootError, WrongBytesError
    except ImportError as error:
        raise _missing(error) from None

    try:
        with Interrupts() as interrupts:
            depot = RealDepot(roots, segment_bytes, geometry, keep, rewrite_percent)
            outcome = RealOutcome()
            try:
                with show.progress_of_count("storing and loading", len(trace.requests)) as advance:
                    depot.play(trace, outcome, speed, advance)
            finally:
                interrupts.hold_off()
                if outcome.stats:  # not interrupted before the first prompt
                    outcomes["depot (real)"] = outcome
                depot.close()
    except RootError as error:
        raise _refuse("--root", error) from None
    except (WrongBytesError, TimeoutError) as error:
        show.complain(str(error))
        raise typer.Exit(DAMAGED if isinstance(error, WrongBytesError) else NOT_DONE) from None


# --- plan ------------------------------------------------------------------------------------------------------------


def plan(
    traces: Traces,
    model: Model = "llama-3.1-8b",
    dtype: Dtype = "bf16",
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks, each with segments of its own.")] = 1,
    memory: Annotated[
        str, typer.Option(metavar="LIST", help="Sizes of the memory tier: 0,64GiB or percentages of all blocks.")
    ] = "0,2%,10%",
    nvme: Annotated[str, typer.Option(metavar="LIST", help="Sizes of the NVMe tier.")] = "0,10%,30%,100%",
    window: Annotated[float, typer.Option(min=1e-3, help="Seconds over which peak bandwidth is taken.")] = 10.0,
    prefill_rate: Annotated[
        float | None,
        typer.Option(min=1e-6, show_default="from the FLOP", help="Measured prefill, tokens/s of one GPU."),
    ] = None,
    prefill_at: Annotated[int, typer.Option(min=1, help="Tokens of the prompt that was measured.")] = 8192,
    gpu_tflops: Annotated[float, typer.Option(min=1e-6, help="Without --prefill-rate: TFLOP/s of one GPU.")] = 989.0,
    utilisation: Annotated[float, typer.Option(min=1e-6, max=1.0, help="Share of them that a prefill reaches.")] = 0.4,
    gpu_hour: Annotated[
        float | None, typer.Option(min=0.0, show_default="no costs", help="Dollars of one GPU for an hour.")
    ] = None,
    gib_month: Annotated[float, typer.Option(min=0.0, help="Dollars of a GiB of storage for a month.")] = 0.0,
    chunk_tokens: ChunkTokens = None,
    requests: Requests = None,
    block_tokens: BlockTokens = None,
    time_unit: TimeUnit = None,
    session_every: SessionEvery = 0.0,
    strict: Strict = False,
    plot: Annotated[str | None, typer.Option(metavar="FILE", help="Draw it, e.g. into out.png.")] = None,
    as_json: Json = False,
) -> None:
    """How much capacity a trace needs, at which bandwidth, what it saves, and which tier would serve what."""
    try:
        from ..bench.plan import Planner, Prefill, Prices

        if plot is not None:
            from ..bench import plots
    except ImportError as error:
        raise _missing(error) from None
    from ..bench.extents import SizeError
    from ..bench.shapes import ShapeError, extent_bytes
    from . import replay_tables

    stated = {
        "--window": window, "--prefill-rate": prefill_rate, "--gpu-tflops": gpu_tflops, "--gpu-hour": gpu_hour,
        "--gib-month": gib_month,
    }
    for option, value in stated.items():
        if value is not None and not math.isfinite(value):
            raise _refuse(option, f"{value}: expected a finite number")
    shape = _shape(model, dtype)
    prefill = Prefill(shape, prefill_rate, prefill_at, gpu_tflops, utilisation)
    if plot is not None:
        _check_can_write(plot)
    how = {"limit": requests, "block_tokens": block_tokens, "session_every_s": session_every, "strict": strict}
    trace = _read(traces, chunk_tokens, time_unit, **how)
    try:
        extent_bytes(shape, trace.block_tokens, tp)
        planner = Planner(trace, dtype, tp, prefill, Prices(gpu_hour, gib_month), window)
    except (ShapeError, SizeError) as error:
        raise _refuse(None, error) from None
    unique = planner.plan.unique_bytes
    memories, nvmes = (
        [0 if size == "0" else _size_or_share(option, size, unique) for size in sizes.split(",")]
        for option, sizes in (("--memory", memory), ("--nvme", nvme))
    )
    interrupted = _work_out(planner, memories, nvmes)
    report = replay_tables.PlanReport(trace, planner.plan, interrupted)
    assumed = _assumptions(planner, prefill, tp, window, gpu_hour, gib_month)
    if as_json:
        print(json.dumps({**report.as_dict(), "assumptions": assumed}, indent=2))
    else:
        report.say(assumed)
    if plot is not None:
        try:
            plots.draw_plan(planner.plan, f"{', '.join(map(os.path.basename, traces))}, KV of {model}, {dtype}", plot)
        except OSError as error:
            raise _refuse("--plot", f"'{plot}': cannot be written: {error.strerror}") from None
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _check_can_write(path: str) -> None:
    from ..bench.image_types import IMAGE_TYPES

    ending = os.path.splitext(path)[1].removeprefix(".").lower()
    if ending not in IMAGE_TYPES:
        raise _refuse("--plot", f"'{path}': expected a name that ends in one of {', '.join(IMAGE_TYPES)}")
    if os.path.isdir(path) or not os.access(os.path.dirname(os.path.abspath(path)), os.W_OK | os.X_OK):
        raise _refuse("--plot", f"'{path}': expected a file in a directory that can be written")


def _work_out(planner: Planner, memories: list[int], nvmes: list[int]) -> bool:
    """True: it was interrupted, and the plan has what was done until then."""
    try:
        with show.progress_of_count("planning", planner.runs + len(memories) * len(nvmes)) as advance:
            planner.follow_depot(advance)
            planner.try_tiers(memories, nvmes, advance)
    except KeyboardInterrupt:
        return True
    return False


def _assumptions(
    planner: Planner, prefill: Prefill, tp: int, window: float, gpu_hour: float | None, gib_month: float
) -> list[str]:
    made = [
        f"KV: {show.size(planner.plan.block_bytes)} a block, a short last block counted as a whole one; {tp} rank(s)",
        f"prefill: {prefill.in_words()}",
        f"peak: windows of {window:g} s side by side; every miss is stored, every hit is loaded",
        "one GPU's seconds; loads cost no GPU time; the trace goes on like this all day",
        "the cache is empty when the trace begins; GB/s are those of all ranks together",
        "bandwidth and savings of a target are those of LRU by block at its capacity; dollars pay for the depot's, months of 30 days",
    ]
    if gpu_hour is None:
        made.append("costs: none, because --gpu-hour was not stated")
    else:
        made.append(f"costs: prefill only, ${gpu_hour:g} a GPU-hour, ${gib_month:g} a GiB-month for the depot's capacity")
    return made
