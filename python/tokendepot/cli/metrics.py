"""`tokendepot metrics`: imports what it runs when it is called."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import show
from .arguments import Json, print_json, root_and_options

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

EXTRA = "tokendepot metrics needs the package {}: pip install 'tokendepot[metrics]'"


def root_and_capacity(text: str) -> tuple[str, int | None]:
    path, options = root_and_options(text)
    return path, options.get("capacity")


def metrics(
    roots: Annotated[
        list[str],
        typer.Argument(metavar="ROOT", help="Directories of roots, each with ?capacity=SIZE if that is to be shown."),
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="TCP port; 0 = any that is free.")] = 9477,
    address: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 = on all interfaces.")] = "127.0.0.1",
    once: Annotated[bool, typer.Option("--once", help="Print the metrics and end.")] = False,
    as_json: Json = False,
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
    named = [{"root": root.label, "path": root.path} for root in collector.roots]
    if once and as_json:
        print_json({"roots": named, "metrics": _values(registry)})
        return
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
    url = f"http://{address}:{server.server_port}/metrics"
    if as_json:
        print_json({"roots": named, "url": url})
    else:
        for root in collector.roots:
            show.say(f"root {root.label} is {show.clean(root.path)}")
        show.say(f"metrics on {url}")
    sys.stdout.flush()
    stop.wait()
    # Not by the interpreter's own end, which would tear down a thread that is inspecting a root inside native code.
    os._exit(0)


def _values(registry: CollectorRegistry) -> list[dict[str, Any]]:
    return [
        {"name": sample.name, "labels": sample.labels, "value": sample.value}
        for family in registry.collect()
        for sample in family.samples
    ]
