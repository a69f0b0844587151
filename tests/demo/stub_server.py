"""Stands in for vLLM's API server: one token a byte, a prompt costs time by the bytes that no stored prompt covers,
prompts are kept in the first root. STUB_FAULT in the environment makes it misbehave."""

import argparse
import json
import os
import pathlib
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SECONDS_PER_TOKEN = 0.002
BYTES_PER_TOKEN = 1000
FAULT = os.environ.get("STUB_FAULT", "")


class Handler(BaseHTTPRequestHandler):
    store: pathlib.Path | None = None
    loaded = 0
    stored = 0

    def log_message(self, *_):
        pass

    def reply(self, body: bytes, kind: str = "application/json") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path == "/metrics":
            self.reply(
                f'tokendepot_load_bytes_total{{engine="0"}} {Handler.loaded}\n'
                f'tokendepot_load_seconds_total{{engine="0"}} {Handler.loaded / 1e9}\n'
                f'tokendepot_store_bytes_total{{engine="0"}} {Handler.stored}\n'.encode(),
                "text/plain",
            )
        else:
            self.reply(b"{}")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            self.reply(json.dumps({"tokens": list(body["prompt"].encode())}).encode())
        elif self.path == "/detokenize":
            self.reply(json.dumps({"prompt": bytes(body["tokens"]).decode()}).encode())
        else:
            self.complete(body["prompt"])

    def complete(self, prompt: str) -> None:
        known = list(self.store.iterdir()) if self.store else []
        cached = max((len(os.path.commonprefix([prompt, file.read_text()])) for file in known), default=0)
        cached = cached if cached >= 256 else 0
        if self.store and len(prompt) >= 256:
            (self.store / str(len(known))).write_text(prompt)
            Handler.stored += len(prompt) * BYTES_PER_TOKEN
        if FAULT != "loads nothing":
            Handler.loaded += cached * BYTES_PER_TOKEN
        slow = FAULT == "warm is slow" and cached
        time.sleep((2 * len(prompt) if slow else len(prompt) - cached) * SECONDS_PER_TOKEN)
        text = " answered"
        if FAULT == "warm differs" and cached:
            text = " wrong"
        events = [{"choices": [{"text": ""}]}, {"choices": [{"text": text}]}]
        if FAULT == "breaks off" and cached:
            events.append({"error": {"message": "engine is dead"}})
        usage = {"prompt_tokens": len(prompt), "prompt_tokens_details": {"cached_tokens": cached}}
        events.append({"choices": [], "usage": usage})
        lines = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"]
        self.reply("".join(lines).encode(), "text/event-stream")


def main() -> None:
    if FAULT == "ends at once":
        sys.exit("stub: out of luck")
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--kv-transfer-config")
    options, _ = parser.parse_known_args()
    if options.kv_transfer_config:
        root = json.loads(options.kv_transfer_config)["kv_connector_extra_config"]["roots"][0]
        Handler.store = pathlib.Path(root.split("?")[0])
        Handler.store.mkdir(exist_ok=True)
    ThreadingHTTPServer(("127.0.0.1", options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
