"""What an engine's log says of its options: every value, and whether it was given or is a default."""

import json

import pytest

from tokendepot.engines.options import effective

OWN = {"load_timeout": 30.0, "on_error": "disable"}


@pytest.mark.parametrize(
    "root",
    ["/srv/depot?capacity=8GiB&read_only=true", {"path": "/srv/depot", "capacity": "8GiB", "read_only": True}],
)
def test_every_option_is_named_once_with_its_value_and_origin(root):
    given = {"roots": [root], "io_depth": 32, "load_timeout": 5.0}
    line = effective(given, OWN, json.dumps({"store_queue": "1GiB", "roots": [root], "io_depth": 32}))
    said, by_default = line.split("; by default: ")
    said = said.removeprefix("options given: ").split()
    assert said == [
        "io_depth=32", "load_timeout=5.0", "roots[0].capacity=8589934592", 'roots[0].path="/srv/depot"', "roots[0].read_only=true"
    ]  # fmt: skip
    others = by_default.split()
    assert {'on_error="disable"', "store_queue=1073741824", 'roots[0].segment="auto"', "poll_ms=100"} <= set(others)
    names = [part.partition("=")[0] for part in [*said, *others]]
    assert len(names) == len(set(names)) > 20 and "\n" not in line
