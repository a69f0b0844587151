"""The reported TTFT against a server's script. Everything else that is timed lives in benchmarks; this is what `bench ttft` is for."""

from __future__ import annotations

from statistics import median

import precision
import pytest


@pytest.mark.parametrize(("streams", "rounds"), [(1, 6), (64, 2)])
def test_the_reported_ttft_is_that_of_the_script_within_1_ms_and_1_percent(streams: int, rounds: int) -> None:
    """Medians, and from the server's own stamp of what it sent, so that a machine that stands still is not taken for an error
    of the client; the best of three, because others use this machine."""
    shares = []
    for _ in range(3):
        found, sent = precision.run(streams, rounds)
        assert len(found) == streams * rounds
        shares.append(median(abs(at - sent[number]) / precision.limit_s(number) for number, _, at in found))
        assert all(ttft >= precision.first_token_s(number) for number, ttft, _ in found), "before it was sent"
        if shares[-1] <= 1:
            return
    raise AssertionError(f"of the limit: {shares}")
