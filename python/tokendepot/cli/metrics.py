"""`tokendepot metrics`: imports what it runs when it is called."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from typing import Annotated

import typer

from .. import _core
from . import show

EXTRA = "tokendepot metrics needs the package {}: pip install 'tokendepot[metrics]'"


def root_and_capacity(text: str) -> tuple[str, int | None]:
    """"/path", or "/path?capacity=SIZE" as in the configuration of an engine -> path and capacity."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise typer.BadParameter("the path is not UTF-8") from None
    path, question, keys = text.partition("?")
    if not question or os.path.isdir(text):
        return os.path.abspath(text), None
    try:
        root = _core.parse_options(json.dumps({"roots": [f"{os.path.abspath(path)}?{keys}"]}))["roots"][0]
    except _core.DepotError as error:
        raise typer.BadParameter(str(error)) from None
    return root["path"], root["capacity"]


def metrics(
    roots: Annotated[
        list[str],
        typer.Argument(metavar="ROOT", help="Directories of roots, each with ?capacity=SIZE if that is to be shown."),
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="TCP port; 0 = any that is free.")] = 9477,
    address: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 = on all interfaces.")] = "127.0.0.1",
    once: Annotated[bool, typer.Option("--once", help="Print the metrics and end.")] = False,
) -> None:
    """Serves what roots say about themselves to Prometheus, until SIGTERM. Engines' own metrics are on theirs."""
    try:
        import prometheus_client

        from ..exporter import BadRoots, registry_of
    except ModuleNotFoundError as error:
        raise typer.BadParameter(EXTRA.format(error.name)) from None
    try:
        registry, collector = registry_of([root_and_capacity(text) for text in roots], show.complain)
    except BadRoots as error:
        raise typer.BadParameter(str(error)) from None
    if once:
        sys.stdout.write(prometheus_client.generate_latest(registry).decode())
        return

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        server, _ = prometheus_client.start_http_server(port, address, registry)
    except OSError as error:
        show.complain(f"cannot listen on {address} port {port}: {error.strerror}; name another with --port or --address")
        raise typer.Exit(3) from None
    for root in collector.roots:
        show.say(f"root {root.label} is {show.clean(root.path)}")
    show.say(f"metrics on http://{address}:{server.server_port}/metrics")
    sys.stdout.flush()
    stop.wait()
    # Not by the interpreter's own end, which would tear down a thread that is inspecting a root inside native code.
    os._exit(0)
