"""Which vLLM and which tokendepot an engine runs with: a kit's, or those of this Python."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import signal
import sys
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kit", type=Path, help="folder with vLLM for an offline host; without, this Python's vLLM")
    parser.add_argument("--tokendepot", type=Path, help="where the package was installed; without, this Python's")


def check(parser: argparse.ArgumentParser, chosen: argparse.Namespace) -> None:
    if chosen.kit is None and importlib.util.find_spec("vllm") is None:
        parser.error("this Python has no vLLM; expected one (pip install vllm==0.26.0) or --kit")
    if chosen.kit is not None and not (chosen.kit / "vllm_env.sh").is_file():
        parser.error(f"--kit {str(chosen.kit)!r} has no vllm_env.sh; expected a folder with one, which sets its environment")


def end_in_order() -> None:
    """Where this is terminated (`timeout`), what it started ends with it: engines have sessions of their own and would keep
    the GPU's memory."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def inside(chosen: argparse.Namespace, command: list[str]) -> list[str]:
    """`command` with the kit's environment where there is a kit; the package of --tokendepot goes before all others."""
    steps = [f". {shlex.quote(str(chosen.kit / 'vllm_env.sh'))}"] if chosen.kit else []
    if chosen.tokendepot:
        steps.append(f"export PYTHONPATH={shlex.quote(str(chosen.tokendepot))}${{PYTHONPATH:+:$PYTHONPATH}}")
    return ["bash", "-c", " && ".join([*steps, f"exec {shlex.join(command)}"])]
