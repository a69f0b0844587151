"""Streams as servers send them, good and bad."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

import client

USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "prompt_tokens_details": {"cached_tokens": 4}}}


def text(piece):
    return {"choices": [{"text": piece}]}


def stream(*events, done=True, newline="\n"):
    lines = [f"data: {json.dumps(event)}{newline}{newline}" for event in events]
    return ("".join(lines) + (f"data: [DONE]{newline}{newline}" if done else "")).encode()


@pytest.fixture
def serve():
    """serve(bytes or list of pieces, status) -> a client of a server that answers every POST with them."""
    running = []

    def start(pieces, status=200):
        pieces = [pieces] if isinstance(pieces, bytes) else pieces

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(status)
                self.end_headers()
                for piece in pieces:
                    self.wfile.write(piece)
                    self.wfile.flush()

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append((server, client.Client(f"http://127.0.0.1:{server.server_port}")))
        return running[-1][1]

    yield start
    for server, api in running:
        api.close()
        server.shutdown()
        server.server_close()


def test_text_usage_and_cached_tokens_are_read(serve):
    answer = serve(stream(text("Hel"), text("lo"), USAGE)).complete("x", 2)
    assert (answer.text, answer.prompt_tokens, answer.cached_tokens) == ("Hello", 7, 4)


def test_the_first_token_is_the_first_text_that_is_not_empty(serve, monkeypatch):
    """The clock counts events."""
    count = 0
    real = client.events

    def counted(lines):
        nonlocal count
        for event in real(lines):
            count += 1
            yield event

    monkeypatch.setattr(client, "events", counted)
    monkeypatch.setattr(client.time, "perf_counter", lambda: float(count))
    events = [{"choices": [{"text": None}]}, text(""), text("Hel"), text("lo"), USAGE]
    answer = serve(stream(*events)).complete("x", 2)
    assert answer.ttft_s == 3
    assert answer.total_s == 5


def test_events_cut_anywhere_and_crlf_give_the_same_answer(serve):
    whole = stream(text("Größe "), text("two"), USAGE, newline="\r\n")
    for size in (1, 2, 3, 50):
        pieces = [whole[i : i + size] for i in range(0, len(whole), size)]
        assert serve(pieces).complete("x", 2).text == "Größe two"


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (stream(text("a"), USAGE, done=False), "without [DONE]"),
        (stream(text("a"), {"error": {"message": "boom"}}), "boom"),
        (stream(USAGE), "empty"),
        (stream(text("a")), "no usage"),
        (b"data: {broken\n\n", "not JSON"),
        (b"<html>proxy</html>\n", "unexpected line"),
    ],
)
def test_a_stream_that_is_no_answer_is_a_fault(serve, body, complaint):
    with pytest.raises(client.ServerFault, match=complaint.replace("[", r"\[")):
        serve(body).complete("x", 2)


def test_a_refused_request_is_a_fault_with_its_status(serve):
    with pytest.raises(client.ServerFault, match="status 503: too busy"):
        serve(b"too busy", status=503).complete("x", 2)


def test_a_server_that_is_not_there_is_not_ready():
    api = client.Client("http://127.0.0.1:9")
    assert not api.ready()
    with pytest.raises(client.ServerFault, match="ConnectError"):
        api.complete("x", 2)
