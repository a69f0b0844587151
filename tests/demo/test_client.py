"""Faults of a server as the demo reports them; streams are tested with the client of the benchmark."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

import client

USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "prompt_tokens_details": {"cached_tokens": 4}}}


def text(piece):
    return {"choices": [{"text": piece}]}


def stream(*events, done=True):
    lines = [f"data: {json.dumps(event)}\n\n" for event in events]
    return ("".join(lines) + ("data: [DONE]\n\n" if done else "")).encode()


@pytest.fixture
def serve():
    """serve(bytes, status) -> a client of a server that answers every POST with them."""
    running = []

    def start(body, status=200):
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

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


@pytest.mark.parametrize(
    ("body", "status", "complaint"),
    [
        (stream(text("a"), USAGE, done=False), 200, "truncated"),
        (stream(text("a"), {"error": {"message": "boom"}}), 200, "boom"),
        (stream(text("a")), 200, "no usage"),
        (b"too busy", 503, "http_503: too busy"),
    ],
)
def test_a_stream_that_is_no_counted_answer_is_a_fault(serve, body, status, complaint):
    with pytest.raises(client.ServerFault, match=complaint):
        serve(body, status).complete("x", 2)


def test_a_server_that_is_not_there_is_not_ready():
    api = client.Client("http://127.0.0.1:9")
    assert not api.ready()
    with pytest.raises(client.ServerFault, match="refused"):
        api.complete("x", 2)


@pytest.mark.parametrize("body", [b"{}", b'{"tokens": [1, 2]}', b"no json"])
def test_a_text_with_fewer_tokens_than_wanted_is_a_fault(serve, body):
    with pytest.raises(client.ServerFault, match="expected at least 3"):
        serve(body).first_tokens("x", 3)
