"""What `tokendepot events` says about itself, for Prometheus. The only label has one of three values."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from .publisher import Sent

PREFIX = "tokendepot_events_"
EVENTS = ("BlockStored", "BlockRemoved", "AllBlocksCleared")  # label `event` of "published"
# Field of Sent, but for "published" -> help. Prometheus appends "_total".
COUNTERS = {
    "published": "Events, by name.",
    "batches": "Messages published.",
    "dropped_batches": "Of them, those that a subscriber did not get because it reads too slowly.",
    "replays": "Requests for earlier batches.",
    "fresh_starts": "Times that everything was told anew for who asked for batches that were gone.",
}
GAUGES = {
    "subscriptions": "Topics that subscribers are subscribed to now.",
    "lost_roots": "Roots that cannot be read now: nothing is told of them.",
}


class PublisherCollector(Collector):
    """Reads what the publishing thread counts. Thread-safe: each value is one number."""

    def __init__(self, sent: Sent, lost_roots: Callable[[], int]) -> None:
        """lost_roots is called by scrapes, from any thread."""
        self._sent = sent
        self._lost_roots = lost_roots

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        for name, text in COUNTERS.items():
            if name == "published":
                counter = CounterMetricFamily(PREFIX + name, text, labels=["event"])
                for event in EVENTS:
                    counter.add_metric([event], self._sent.events[event])
                yield counter
            else:
                yield CounterMetricFamily(PREFIX + name, text, value=getattr(self._sent, name))
        now = {"subscriptions": self._sent.subscriptions, "lost_roots": self._lost_roots()}
        yield from (GaugeMetricFamily(PREFIX + name, text, value=now[name]) for name, text in GAUGES.items())


def registry_of(sent: Sent, lost_roots: Callable[[], int]) -> CollectorRegistry:
    """A registry with nothing else in it. Arguments are those of PublisherCollector."""
    registry = CollectorRegistry()
    registry.register(PublisherCollector(sent, lost_roots))
    return registry
