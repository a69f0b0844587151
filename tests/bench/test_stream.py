"""What counts as a token, when it came, and which answers are none."""

import asyncio
import json

import pytest
from scripted_server import CLOSE, DONE, HANG, RESET, ScriptedServer, delta_event, event, text_event, usage_event

from tokendepot.bench.ttft.answer import RequestFailed
from tokendepot.bench.ttft.stream import Inbox, Target, ask

LATE_S = 0.005  # from the server's stamp to the client's
TEXT = b"".join(text_event(f" word{i}") for i in range(64))
FINISH = event({"choices": [{"text": "", "finish_reason": "stop"}]})


class Scripts(ScriptedServer):
    """Sends the script whose name is the prompt."""

    def __init__(self, **scripts):
        super().__init__()
        self.scripts = scripts

    def script(self, body, number):
        return self.scripts[body["prompt"]]


def asked(server, prompt, timeout_s=10.0, path="/v1/completions"):
    async def one():
        return await ask(Target.of(server.url + path, {}), json.dumps({"prompt": prompt}).encode(), timeout_s, Inbox())

    return asyncio.run(one())


def failure(server, prompt, **more):
    with pytest.raises(RequestFailed) as failed:
        asked(server, prompt, **more)
    return failed.value


def asked_in_time(server, prompt, times):
    """An answer whose `times` ({place in the script: reported seconds}) are those of the script as it really ran, by the
    server's stamps of the request and of what it sent: never shorter, and longer by LATE_S at most. The best of twelve, because
    a machine that stands still is no error of the client."""
    attempts = []
    for _ in range(12):
        answer = asked(server, prompt)
        entry = server.log()[-1]
        longer = {place: at - (entry["sent"][place] - entry["there"]) for place, at in times(answer).items()}
        assert min(longer.values()) >= 0, f"reported before it was sent: {longer}"
        attempts.append(max(longer.values()))
        if attempts[-1] <= LATE_S:
            return answer
    raise AssertionError(f"late by {attempts}, expected {LATE_S} at most")


# --- tokens and their times (T1, T2) ---

ROLE_FIRST = {
    "chat": [(0.005, delta_event(role="assistant", content=None)), (0.060, delta_event(content="")), (0.214, delta_event(content="Hel"))]
    + [(0.214 + 0.02 * i, delta_event(content="lo")) for i in range(1, 6)] + [(0.334, DONE)],
    "completions": [(0.005, text_event("")), (0.060, text_event(None)), (0.214, text_event("Hel"))]
    + [(0.214 + 0.02 * i, text_event("lo")) for i in range(1, 6)] + [(0.334, DONE)],
}  # fmt: skip


@pytest.mark.parametrize("name", ROLE_FIRST)
def test_the_first_token_is_the_first_event_that_bears_one_and_the_first_byte_is_reported_apart(serve, name):
    server = serve(Scripts(**ROLE_FIRST))
    answer = asked_in_time(server, name, lambda answer: {0: answer.first_byte_s, **dict(zip(range(2, 8), answer.token_s))})
    assert answer.first_byte_s >= 0.005 and answer.ttft_s >= 0.214
    assert answer.text == "Hel" + 5 * "lo" and len(answer.token_s) == 6
    assert answer.first_content_s == answer.ttft_s


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_is_the_first_token_and_content_is_timed_apart(serve, name):
    script = [(0.1, delta_event(**{name: "hm"})), (0.5, delta_event(content="so")), (0.51, FINISH + usage_event(9, 2) + DONE)]
    server = serve(Scripts(x=script))
    answer = asked_in_time(server, "x", lambda answer: {0: answer.ttft_s, 1: answer.first_content_s})
    assert answer.ttft_s >= 0.1 and answer.first_content_s >= 0.5
    assert (answer.text, answer.reasoning, answer.output_tokens, answer.estimated) == ("so", "hm", 2, False)


def test_an_answer_that_only_reasons_is_complete_without_content(serve):
    script = [(0, delta_event(reasoning="hm") + event({"choices": [{"delta": {}, "finish_reason": "length"}]}) + DONE)]
    answer = asked(serve(Scripts(x=script)), "x")
    assert answer.first_content_s is None and answer.text == "" and answer.finish_reason == "length"


@pytest.mark.parametrize(
    ("before", "each", "after", "counted"),
    [
        (b"", {}, usage_event(7, 5), (7, 5, False)),
        (b"", {"usage": {"prompt_tokens": 7, "completion_tokens": 2}}, b"", (7, 2, False)),
        (event({"choices": []}), {}, b"", (None, 2, True)),
        (usage_event(7, 0), {"usage": None}, usage_event(7, 3), (7, 3, False)),
    ],
    ids=["at the end", "in every event", "nowhere, and no choices first", "first and last"],
)
def test_usage_counts_wherever_it_is_and_tokens_without_it_are_marked_as_estimated(serve, before, each, after, counted):
    events = b"".join(event({"choices": [{"text": piece}], **each}) for piece in ("a", "b"))
    answer = asked(serve(Scripts(x=[(0, before + events + FINISH + after + DONE)])), "x")
    assert (answer.prompt_tokens, answer.output_tokens, answer.estimated) == counted


def test_a_tool_call_bears_a_token_without_being_content(serve):
    script = [(0, delta_event(tool_calls=[{"function": {"name": "f"}}]) + DONE)]
    answer = asked(serve(Scripts(x=script)), "x")
    assert len(answer.token_s) == 1 and answer.first_content_s is None


# --- the same stream in any pieces (T3) ---


def pieces(whole, size):
    return [(0.002 + 0.0001 * i, whole[at : at + size]) for i, at in enumerate(range(0, len(whole), size))]


VARIANTS = {
    "lf": TEXT + DONE,
    "crlf": (TEXT + DONE).replace(b"\n", b"\r\n"),
    "cr": (TEXT + DONE).replace(b"\n", b"\r"),
    "comments": TEXT.replace(b"data:", b": ping\n\nevent: message\nid: 3\ndata:") + DONE,
    "no_space": (TEXT + DONE).replace(b"data: ", b"data:"),
    "two_data_lines": TEXT.replace(b': [{"text"', b':\ndata: [{"text"') + DONE,
    "done_without_newline": TEXT + b"data: [DONE]",
}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("variant", VARIANTS)
def test_text_counts_and_order_do_not_depend_on_how_the_stream_is_written_or_cut(variant, size):
    from tokendepot.bench.ttft.answer import Answer
    from tokendepot.bench.ttft.sse import Parser

    parser, answer, ended = Parser(), Answer(), []
    for at, (_, piece) in enumerate(pieces(VARIANTS[variant], size)):
        ended += [answer.take(data, at + 1.0) for data in parser.feed(piece)]
    assert answer.text == "".join(f" word{i}" for i in range(64))
    assert ended == [False] * 64 + [True]
    assert answer.token_s == sorted(answer.token_s) and answer.token_s[0] > 0


@pytest.mark.parametrize(
    ("variant", "size"),
    [(variant, size) for variant in ("lf", "crlf", "done_without_newline") for size in (7, 1 << 20)]
    + [("crlf", size) for size in (1, 2, 3)],
)
def test_a_connection_left_open_after_done_is_not_waited_for(serve, variant, size):
    server = serve(Scripts(x=[*pieces(VARIANTS[variant], size), (0.1, HANG)]))
    answer = asked(server, "x", timeout_s=30.0)
    assert len(answer.token_s) == 64 and 0 < answer.ttft_s <= answer.end_s < 20
    assert answer.text == "".join(f" word{i}" for i in range(64)) and answer.token_s == sorted(answer.token_s)


# --- answers that are none (T5) ---

BROKEN = {
    "error_event": [(0, text_event("a") + event({"error": {"message": "engine is dead"}}) + DONE)],
    "truncated": [(0, text_event("a") * 3), (0.01, CLOSE)],
    "reset": [(0, text_event("a")), (0.01, b'data: {"choi'), (0.02, RESET)],
    "not_a_stream": [(0, b"<html>a proxy's page</html>\n")],
    "stalled": [(0, text_event("a")), (0.01, HANG)],
    "timeout": [(0, b": ping\n\n"), (0.01, HANG)],
    "empty": [(0, text_event("") + FINISH + DONE)],
    "aborted": [(0, text_event("a") + event({"choices": [{"text": "", "finish_reason": "abort"}]}) + DONE)],
    "malformed": [(0, b"data: {broken\n\n" + DONE)],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_answer_that_is_not_whole_is_a_failure_of_its_kind(serve, kind):
    assert failure(serve(Scripts(**BROKEN)), kind, timeout_s=0.5 if kind in ("stalled", "timeout") else 10.0).kind == kind


@pytest.mark.parametrize("content", [[], 3, "x", {"choices": ["x"]}, {"choices": 3}, {"usage": 3, "choices": [{"text": 5}]}])
def test_events_that_are_json_but_no_completion_are_malformed(serve, content):
    assert failure(serve(Scripts(x=[(0, event(content) + DONE)])), "x").kind == "malformed"


def test_an_end_without_done_is_whole_when_a_finish_reason_came(serve):
    assert asked(serve(Scripts(x=[(0, text_event("a") + FINISH)])), "x").text == "a"
    assert failure(serve(Scripts(x=[(0, text_event("a"))])), "x").kind == "truncated"


@pytest.mark.parametrize("reason", [None, "stop", "length", "tool_calls", "content_filter"])
def test_an_answer_is_whole_with_every_end_that_is_one(serve, reason):
    end = event({"choices": [{"text": "", "finish_reason": reason}]})
    assert asked(serve(Scripts(x=[(0, text_event("a") + end + DONE)])), "x").finish_reason == reason


@pytest.mark.parametrize("reason", ["abort", "error", {"type": "abort"}])
def test_an_end_that_is_no_model_s_is_named(serve, reason):
    end = event({"choices": [{"text": "", "finish_reason": reason}]})
    failed = failure(serve(Scripts(x=[(0, text_event("a") + end + usage_event(3, 1) + DONE)])), "x")
    assert failed.kind == "aborted" and repr(reason) in str(failed)


def test_a_page_with_status_200_is_not_a_stream_and_is_quoted(serve):
    class Page(Scripts):
        def status(self, body, number):
            return 200, "text/html"

    failed = failure(serve(Page(x=[(0, b"<html>log in first</html>")])), "x")
    assert failed.kind == "not_a_stream" and "log in first" in str(failed)


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (503, b"too busy", "http_503"),
        (400, b"This model's maximum context length is 100 tokens", "context_overflow"),
        (400, b"The input (90 tokens) is longer than the model's context length (80 tokens).", "context_overflow"),
        (400, b"request (90 tokens) exceeds the available context size (80 tokens), try increasing it", "context_overflow"),
        (422, b"Input validation error: `inputs` tokens + `max_new_tokens` must be <= 80. Given: 90", "context_overflow"),
        (422, b"Input validation error: `inputs` must have less than 80 tokens. Given: 90", "context_overflow"),
        (400, b"no such field", "http_400"),
        (422, b"no such field", "http_422"),
        (503, b"no worker with the maximum context length", "http_503"),
    ],
)
def test_a_refusal_is_a_failure_with_its_status_and_words(serve, status, body, kind):
    class Refuses(Scripts):
        def status(self, body, number):
            return status, "application/json"

    failed = failure(serve(Refuses(x=[(0, body)])), "x")
    assert failed.kind == kind and body.decode() in str(failed)


def test_no_server_is_refused_and_no_such_host_is_unreachable():
    async def one(url):
        await ask(Target.of(url, {}), b"{}", 5.0, Inbox())

    for url, kind in (("http://127.0.0.1:9/v1", "refused"), ("http://no.such.host.invalid/v1", "unreachable")):
        with pytest.raises(RequestFailed) as failed:
            asyncio.run(one(url))
        assert failed.value.kind == kind


def test_many_streams_at_once_are_stamped_when_their_tokens_come(serve):
    """And not with the stream's end, long after. How exactly is in the benchmarks."""
    script = [(0.3, text_event("a")), (0.4, text_event("b")), (5.0, DONE)]
    server = serve(Scripts(x=script))

    async def all_of_them():
        target, inbox = Target.of(server.url + "/v1/completions", {}), Inbox()
        body = json.dumps({"prompt": "x"}).encode()
        return await asyncio.gather(*(ask(target, body, 30.0, inbox) for _ in range(64)))

    answers = asyncio.run(all_of_them())
    firsts = sorted(entry["sent"][0] for entry in server.log())
    for arrived, sent in zip(sorted(a.sent_at + a.ttft_s for a in answers), firsts, strict=True):
        assert -0.005 < arrived - sent < 4.5
    assert min(answer.ttft_s for answer in answers) >= 0.3
