"""Who waits for whose load, and for how long."""

from __future__ import annotations

from types import SimpleNamespace

from tokendepot.engines.vllm.groups import FULL, WINDOW
from tokendepot.engines.vllm.sharing import UNSEEN_S, Sharing
from tokendepot.engines.vllm.tracked import Hold, Tracked
from vllm.v1.request import RequestStatus

KEYS = [bytes([number]) * 32 for number in range(8)]
OTHER = bytes(32 * 8)


def loading(name: str) -> Tracked:
    return Tracked(SimpleNamespace(request_id=name, status=RequestStatus.WAITING_FOR_REMOTE_KVS))


def sharing(*attentions: str, prefix_caching: bool = True) -> Sharing:
    groups = [SimpleNamespace(attention=attention) for attention in attentions or (FULL,)]
    return Sharing(groups, prefix_caching, patience_s=10.0)


def test_a_request_waits_for_a_load_that_brings_half_of_its_chunks_or_more() -> None:
    for brought, asked, chunks, waits in (
        (KEYS, KEYS, range(0, 8), True),
        (KEYS[:4], KEYS, range(0, 8), True),
        (KEYS[:3], KEYS, range(0, 8), False),
        (KEYS[:3], KEYS[:5], range(0, 5), True),
        (KEYS[:3], KEYS[:5], range(1, 5), True),
        (KEYS[:3], KEYS[:5], range(3, 5), False),
        (KEYS, KEYS[:1], range(0, 1), True),
        (KEYS, [KEYS[0], KEYS[1], OTHER[:32], OTHER[:32]], range(0, 4), True),
        (KEYS, [KEYS[0], OTHER[:32], OTHER[:32], OTHER[:32]], range(0, 4), False),
    ):
        one = sharing()
        one.brings(loading("first"), b"".join(brought))
        assert one.begin("second", b"".join(asked), chunks, 0, 0.0) == waits, (brought, asked, chunks)
        assert one.goes_on("second", 0, 1.0) == waits
        assert not one.begin("first", b"".join(asked), chunks, 0, 0.0), "nobody waits for itself"


def test_with_a_window_only_the_whole_of_what_is_brought_is_waited_for() -> None:
    for brought, asked, waits in (
        (KEYS[:6], KEYS, True),
        (KEYS, KEYS, True),
        (KEYS[:3], KEYS, False),
        (KEYS, KEYS[:6], False),
        (KEYS[:6], [*KEYS[:5], *[OTHER[:32]] * 3], False),
    ):
        one = sharing(FULL, WINDOW)
        one.brings(loading("first"), b"".join(brought))
        assert one.begin("second", b"".join(asked), range(0, len(asked)), 0, 0.0) == waits, (brought, asked)


def test_a_wait_ends_with_the_load_and_is_not_repeated_in_vain() -> None:
    keys, chunks = b"".join(KEYS), range(0, 8)
    one, first = sharing(), loading("first")
    one.brings(first, keys)
    for name in ("served", "in vain", "early"):
        assert one.begin(name, keys, chunks, 0, 0.0) and one.goes_on(name, 0, 9.0)
    assert not one.goes_on("early", 64, 1.0), "it found something meanwhile and is looked up anew"
    first.request.status = RequestStatus.RUNNING
    assert not one.goes_on("served", 0, 1.0)
    assert one.end("served", 128) and not one.end("served", 128), "counted once"
    assert not one.end("in vain", 0)
    one.brings(loading("another"), keys)
    assert one.begin("served", keys, chunks, 0, 1.0)
    assert not one.begin("in vain", keys, chunks, 0, 1.0)


def test_waits_of_one_request_are_bounded_together() -> None:
    keys, chunks = b"".join(KEYS), range(0, 8)
    one = sharing()
    for number in range(3):
        name = f"load {number}"
        one.brings(loading(name), keys)
        assert one.begin("second", keys, chunks, 0, number * 4.0)
        one.forget(name)
        assert not one.goes_on("second", 0, number * 4.0) and not one.end("second", 0)
    one.brings(loading("last"), keys)
    assert one.goes_on("second", 0, 9.0) is False and not one.begin("second", keys, chunks, 0, 10.0)
    one.forget("second")
    assert one.begin("second", keys, chunks, 0, 10.0), "a later request of the same name starts afresh"


def test_a_hold_is_waited_for_until_it_fails_or_is_given_up() -> None:
    keys, chunks = b"".join(KEYS), range(0, 8)
    one, first = sharing(), loading("first")
    first.request.status = RequestStatus.WAITING
    first.hold = Hold(1, "first", 8, keys, began=0.0, until=5.0)
    one.brings(first, keys)
    assert one.begin("second", keys, chunks, 0, 0.0)
    assert one.goes_on("second", 0, 4.0) and not one.goes_on("second", 0, 5.0)
    first.hold.failed = True
    assert not one.goes_on("second", 0, 1.0)
    first.hold, first.request.status = None, RequestStatus.WAITING_FOR_REMOTE_KVS
    one.brings(first, keys)
    assert one.goes_on("second", 0, 6.0), "the load that it became"


def test_a_load_that_ended_unseen_is_waited_for_a_moment_only() -> None:
    keys, chunks = b"".join(KEYS), range(0, 8)
    one = sharing()
    one.brings(loading("first"), keys)
    assert one.begin("second", keys, chunks, 0, 0.0)
    one.ended("first", 2.0)
    assert one.goes_on("second", 0, 2.5) and not one.goes_on("second", 0, 2.0 + UNSEEN_S)


def test_nobody_waits_without_the_engines_prefix_cache() -> None:
    one = sharing(prefix_caching=False)
    one.brings(loading("first"), b"".join(KEYS))
    assert not one.begin("second", b"".join(KEYS), range(0, 8), 0, 0.0)
