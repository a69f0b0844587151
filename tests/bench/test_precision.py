"""The reported TTFT against a server's script. Everything else that is timed lives in benchmarks; this is what `bench ttft` is for."""

from __future__ import annotations

import precision
import pytest

from tokendepot.bench.ttft.results import percentile


@pytest.mark.parametrize(("streams", "rounds"), [(1, 4), (64, 2)])
def test_the_reported_ttft_is_that_of_the_script_within_1_ms_and_1_percent(streams: int, rounds: int) -> None:
    """The reported TTFT against the script as it really ran: from the server's stamp of the request to its stamp of the first
    token. It is never shorter, for the client sends before the request is there and sees a token after it was sent; and of
    the median and of the 75th percentile of requests it is longer by 1 ms and 1 % of the scripted time at most. Not of all
    of them, and in the best of twelve attempts, because a machine that stands still is no error of the client."""
    attempts = []
    for _ in range(12):
        found, stamps = precision.run(streams, rounds)
        assert len(found) == streams * rounds
        really = {number: sent - there for number, (there, sent) in stamps.items()}
        shortest = min(ttft - really[number] for number, ttft, _ in found)
        assert shortest >= 0, f"a TTFT is {-shortest * 1e3:.3f} ms too short: its clock started late, or stopped early"
        shares = [abs(ttft - really[number]) / precision.limit_s(number) for number, ttft, _ in found]
        attempts.append((percentile(shares, 0.5), percentile(shares, 0.75)))
        if max(attempts[-1]) <= 1:
            return
    raise AssertionError(f"of the limit, median and 75th percentile of each attempt: {attempts}")
