"""`tokendepot events`: imports what it runs when it is called."""

from __future__ import annotations

import signal
import sys
import threading
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from ..holdings import Holdings
from . import show
from .arguments import Json, Roots, once_each, print_json

if TYPE_CHECKING:
    from ..publisher import Publisher

EXTRA = "tokendepot events needs the package {}: pip install 'tokendepot[events]'"
NOT_DONE = 3


class Hashes(str, Enum):
    number = "number"
    bytes = "bytes"


class Form(str, Enum):
    map = "map"
    array = "array"


def events(
    roots: Roots,
    endpoint: Annotated[
        str, typer.Option(metavar="URL", help="ZeroMQ endpoint to publish on; a port of 0 = any that is free.")
    ] = "tcp://127.0.0.1:5557",
    replay: Annotated[
        str | None, typer.Option(metavar="URL", help="Endpoint that sends earlier batches again. [default: none]")
    ] = None,
    topic: Annotated[str, typer.Option(help="Of all messages.")] = "",
    hashes: Annotated[
        Hashes, typer.Option(help="Block hashes: the last 8 bytes of a key as a number, as vLLM's are, or its 32 bytes.")
    ] = Hashes.number,
    form: Annotated[
        Form, typer.Option(help="Events as maps, as vLLM sends them from 0.24 on, or arrays, as before.")
    ] = Form.map,
    metrics: Annotated[
        str | None, typer.Option(metavar="ADDRESS:PORT", help="Serve what is published to Prometheus there. [default: none]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Publishes what comes into roots and what goes as KV events, in vLLM's format, until SIGTERM."""
    try:
        import zmq

        from ..publisher import Publisher, Wire, follow
    except ModuleNotFoundError as error:
        raise typer.BadParameter(EXTRA.format(error.name)) from None
    for option, given in (("--endpoint", endpoint), ("--replay", replay)):
        if given is not None and not given.startswith(("tcp://", "ipc://")):
            raise typer.BadParameter(f"{option} is {given!r}, expected tcp://ADDRESS:PORT or ipc://PATH")
    place = _address_and_port(metrics) if metrics is not None else None
    holdings = Holdings(once_each(roots), show.complain)
    wire = Wire(arrays=form is Form.array, number_hashes=hashes is Hashes.number)
    try:
        publisher = Publisher(endpoint, replay, topic, wire)
    except zmq.ZMQError as error:
        show.complain(f"cannot publish on {' and '.join(filter(None, (endpoint, replay)))}: {error}")
        raise typer.Exit(NOT_DONE) from None
    try:
        served = _serve(*place, publisher, holdings) if place else None
    except OSError as error:
        publisher.close()
        show.complain(f"cannot serve metrics on {metrics}: {error.strerror}; name another --metrics")
        raise typer.Exit(NOT_DONE) from None
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    named = [{"root": root_id[:8], "path": path} for path, root_id in zip(once_each(roots), holdings.root_ids, strict=True)]
    if as_json:
        events_on, *replays_on = publisher.endpoints
        print_json({"roots": named, "events": events_on, "replays": next(iter(replays_on), None), "metrics": served})
    else:
        for root in named:
            show.say(f"root {root['root']} is {show.clean(root['path'])}")
        show.say(f"events on {' and replays on '.join(publisher.endpoints)}")
        if served:
            show.say(f"metrics on {served}")
    sys.stdout.flush()
    try:
        follow(holdings, publisher, wire, stop.is_set)
    finally:
        publisher.close()


def _address_and_port(text: str) -> tuple[str, int]:
    address, _, port = text.rpartition(":")
    if not address or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise typer.BadParameter(f"--metrics is {text!r}, expected ADDRESS:PORT, such as 127.0.0.1:9478")
    return address, int(port)


def _serve(address: str, port: int, publisher: Publisher, holdings: Holdings) -> str:
    """Starts a thread that ends with the process. Returns the URL; raises OSError where it cannot listen."""
    try:
        import prometheus_client

        from ..publisher_metrics import registry_of
    except ModuleNotFoundError as error:
        raise typer.BadParameter(f"--metrics needs the package {error.name}: pip install 'tokendepot[metrics]'") from None
    server, _ = prometheus_client.start_http_server(port, address, registry_of(publisher.sent, holdings.lost_roots))
    return f"http://{address}:{server.server_port}/metrics"
