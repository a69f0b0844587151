"""What `tokendepot bench ttft` does with its options: sets up, runs, shows, draws, judges."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

from ..._core import version
from ...cli import show as terminal
from ..image_types import IMAGE_TYPES
from . import compare, plot, results, show
from .run import Run
from .server import Server, ServerFault
from .settings import BadSetting, Settings, option

OK, FAILED, NOT_DONE, INTERRUPTED = 0, 1, 3, 130
REASONS = 4  # of a base that is refused: one broken run has a reason for each cell
_MAY_CHANGE = {"url", "timeout_s", "between"}  # from one part of a run to the next


def ttft(
    asked: Settings,
    given: Collection[str],
    out: pathlib.Path | None = None,
    resume: pathlib.Path | None = None,
    base_file: pathlib.Path | None = None,
    plot_file: pathlib.Path | None = None,
    as_json: bool = False,
    cacert: pathlib.Path | None = None,
) -> int:
    """The exit code: 0; 1 when requests failed or the run or the comparison is not valid; 3 when the server went away;
    130 when interrupted. BadSetting and ServerFault before anything was measured.

    `given` names the fields of `asked` that the user set: with `resume` they must be those of the file.
    """
    base = _base(base_file) if base_file else None
    if resume:
        result, settings = _resumed(resume, asked, given)
        file = resume
    else:
        result, settings = results.new(asked, version()), asked
        file = out or pathlib.Path(f"ttft-{result['run_id']}.json")
        if file.exists():
            raise BadSetting(f"--out is {str(file)!r}, which exists; --resume goes on with it")
    if base and (different := compare.settings_differ(settings.as_json(), base["settings"])):
        raise BadSetting(f"--compare is {str(base_file)!r}, which is not the same measurement: {'; '.join(different)}")
    # A run that is complete loses no time: its table is shown, with what is wrong below.
    if base and not result["complete"] and (reasons := compare.hopeless(settings.as_json(), base)):
        more = f"; and {len(reasons) - REASONS} more" if len(reasons) > REASONS else ""
        told = "; ".join(reasons[:REASONS]) + more
        raise BadSetting(f"--compare is {str(base_file)!r}, with which this run cannot be compared: {told}")
    if plot_file and plot_file.suffix.lower().removeprefix(".") not in IMAGE_TYPES:
        raise BadSetting(f"--plot is {str(plot_file)!r}, expected a name that ends in one of {', '.join(IMAGE_TYPES)}")
    if plot_file and plot_file.is_dir():
        raise BadSetting(f"--plot is {str(plot_file)!r}, which is a directory, expected a file's name")
    for name, path in (("--out", file), ("--plot", plot_file)):
        if path and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise BadSetting(f"{name} is {str(path)!r}, but {str(path.parent)!r} is not a directory that can be written to")
    code, stopped = OK, None
    if not result["complete"]:
        try:
            code, stopped = _measure(settings, result, file, cacert)
        except (BrokenPipeError, SystemExit):  # rich makes the one the other: nobody reads what is said any more
            code = INTERRUPTED
    results.judge(result, stopped)
    refused = compare.refusals(result, base) if base else None
    if base and refused is not None:
        rows = compare.rows(result, base)
        result["comparison"] = {"base": base["run_id"], "valid": not refused, "refused": refused, "rows": rows}
    written = _last_save(result, file)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        show.cells(result)
        if base:
            show.comparison(result["comparison"]["rows"])
        show.closing(result, refused)
    if plot_file and any(cell["ttft_s"] for cell in result["summary"]):  # after the tables: it may fail
        try:
            names = ("ON (this run)", "OFF (base)") if base else ("this run", "")
            plot.draw(result, base, names, plot_file)
            written.append(plot_file)
        except OSError as error:
            terminal.complain(f"--plot is {str(plot_file)!r}, which cannot be written ({error.strerror or error})")
            code = code or NOT_DONE
    if written and not as_json:
        terminal.say("Wrote " + " and ".join(map(str, written)))
    if file not in written:
        code = code or NOT_DONE
    return code or (FAILED if result["problems"] or refused else OK)


def _last_save(result: dict[str, Any], file: pathlib.Path) -> list[pathlib.Path]:
    """[file], or nothing when it could not be written: what was measured is shown all the same."""
    try:
        results.save(result, file)
    except results.NotWritten as error:
        terminal.complain(f"{error}: what it has is older than what is shown; --resume {file} goes on from there")
        return []
    return [file]


def _base(file: pathlib.Path) -> dict[str, Any]:
    """A result that can be compared with: judged before anything is measured."""
    base = results.load(file, "--compare")
    try:
        compare.refusals(base, base)  # reads every field that a comparison needs
        compare.hopeless(base["settings"], base)
    except (KeyError, TypeError, AttributeError):
        raise BadSetting(f"--compare is {str(file)!r}, expected the whole result of a run") from None
    return base


def _resumed(file: pathlib.Path, asked: Settings, given: Collection[str]) -> tuple[dict[str, Any], Settings]:
    result = results.load(file, "--resume")
    try:
        kept = Settings.from_json(result["settings"])
    except (KeyError, TypeError):
        raise BadSetting(f"--resume is {str(file)!r}, whose settings are not those of a run") from None
    for name in sorted(set(given) - _MAY_CHANGE):
        mine, begun = getattr(asked, name), getattr(kept, name)
        if mine != begun:
            raise BadSetting(f"{option(name)} is {mine}, but {str(file)!r} was begun with {begun}")
    settings = replace(kept, **{name: getattr(asked, name) for name in _MAY_CHANGE & set(given)})
    if not result["complete"]:
        result["settings"] = settings.as_json()
        result["resumes"] += 1
    return result, settings


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, as batch systems and timeouts send it, ends a run as Ctrl-C does: with all that is done."""
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return

    def as_interrupt(number: int, frame: Any) -> None:
        handler = signal.getsignal(signal.SIGINT)  # asyncio's own while requests are in flight
        if not callable(handler):  # ignored, as in the background of a script
            raise KeyboardInterrupt
        handler(signal.SIGINT, frame)

    before = signal.signal(signal.SIGTERM, as_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _broken_pipes_raise() -> Iterator[None]:
    """The command line lets SIGPIPE end a command; a server that closes while a request is sent must not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGPIPE, before)


def _measure(
    settings: Settings, result: dict[str, Any], file: pathlib.Path, cacert: pathlib.Path | None
) -> tuple[int, str | None]:
    def say(sentence: str) -> None:
        terminal.err.print(terminal.clean(sentence), soft_wrap=True)

    if too_few := results.out_of_reach(settings.as_json()):
        say(f"WARNING: {too_few}")  # now and not after hours only
    server = Server(settings.url, os.environ.get("OPENAI_API_KEY", ""), cacert)
    with _broken_pipes_raise(), contextlib.closing(server), _terminated_as_interrupted():
        run = Run(settings, server, result, lambda: results.save(result, file), say)
        try:
            results.save(result, file)
        except results.NotWritten as error:
            raise BadSetting(f"--out: {error}") from None
        total = sum(run.contexts) * settings.repeats * settings.turns
        try:
            with terminal.progress_of_tokens("asking", total) as advance:
                run.go(advance)
        except KeyboardInterrupt:
            say(f"interrupted; --resume {file} goes on")
            return INTERRUPTED, None
        except ServerFault as fault:
            say(f"tokendepot: {fault}; --resume {file} goes on")
            return NOT_DONE, str(fault)
        except results.NotWritten as error:
            say(f"tokendepot: {error}; with room for it --resume {file} goes on")
            return NOT_DONE, str(error)
        finally:
            result["ended"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return OK, run.stopped
