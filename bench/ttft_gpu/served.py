"""Time to first token as a client sees it: `tokendepot bench ttft` on vLLM's OpenAI server, with a depot or without.

usage: served.py --out DIR [--kit KIT] [--tokendepot SITE] [--root ROOT] [--model SHAPE] [-- OPTION of bench ttft...]

KIT and SITE are those of run.py. The server has the shape of a Llama with random weights, and a vocabulary in which every
token is text. It is killed (-9) and started again before each later turn. With --root it keeps KV there; without, nothing
is kept and each turn is computed: the base. The result of bench ttft is DIR/NAME.json, the server's log DIR/NAME.log,
NAME being "on" or "off".
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import environment
import workload
from systems import end_session, transfer_config

START_LIMIT_S = 300.0
CLIENT = "from tokendepot.cli import main; main()"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    environment.add_options(parser)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--root", type=Path, help="empty or missing folder of the depot; it is removed at the end")
    parser.add_argument("--model", default="llama-3.1-8b", choices=workload.MODELS, help="shape")
    parser.add_argument("--capacity", default="72GiB", help="of the depot's root")
    parser.add_argument("--utilization", type=float, default=0.9, help="share of the GPU's memory that vLLM takes")
    parser.add_argument("--compiled", action="store_true", help="with CUDA graphs; about a minute more for each start")
    parser.add_argument("client", nargs="*", metavar="OPTION", help="of bench ttft, after --")
    chosen = parser.parse_args()
    environment.check(parser, chosen)
    return chosen


class Server:
    """vLLM's server, started again whenever it ends, as a service is; in a session of its own each time."""

    def __init__(self, options: argparse.Namespace, name: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = options.out / f"{name}.log"
        self.pid_file = options.out / f"{name}.pid"
        model = workload.write_model(options.out / f"{name}-model", options.model)
        workload.write_vocabulary(Path(model), workload.MODELS[options.model]["vocab_size"])
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name"]
        command += [options.model, "--host", "127.0.0.1", "--port", str(port), "--load-format", "dummy", "--seed", "0"]
        command += ["--max-model-len", "131072", "--max-num-seqs", "64", "--enable-prompt-tokens-details"]
        command += ["--compilation-config", json.dumps(workload.COMPILATION)] if options.compiled else ["--enforce-eager"]
        command += ["--gpu-memory-utilization", str(options.utilization)]
        if options.root:
            transfer = transfer_config("depot", str(options.root), options.capacity, {})
            command += ["--kv-transfer-config", json.dumps(transfer)]
        self._command = environment.inside(options, command)
        self._stopping = False
        self._lock = threading.Lock()  # nothing is started once it is stopping
        self._process = self._start()
        self._keeper = threading.Thread(target=self._keep_running, daemon=True)
        self._keeper.start()

    def _start(self) -> subprocess.Popen:
        with open(self.log, "ab") as log:
            process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(os.environ, VLLM_SERVER_DEV_MODE="1"),  # for /reset_prefix_cache
                start_new_session=True,
            )
        self.pid_file.write_text(str(process.pid))
        return process

    def _keep_running(self) -> None:
        while True:
            self._process.wait()
            end_session(self._process)
            with self._lock:
                if self._stopping:
                    return
                self._process = self._start()
            time.sleep(1)

    def wait_ready(self) -> None:
        ends = time.monotonic() + START_LIMIT_S
        while time.monotonic() < ends:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise SystemExit(f"the server does not answer after {START_LIMIT_S:.0f} s, see {self.log}")

    def stop(self) -> None:
        with self._lock:
            self._stopping = True
        end_session(self._process)
        self._keeper.join()


def main() -> None:
    options = arguments()
    environment.end_in_order()
    options.out.mkdir(parents=True, exist_ok=True)
    name = "on" if options.root else "off"
    if options.root and options.root.exists() and any(options.root.iterdir()):
        raise SystemExit(f"--root is {str(options.root)!r}, expected an empty or missing folder")
    if options.root:
        options.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if options.tokendepot:
        sys.path.insert(0, str(options.tokendepot))  # the words of its prompts are this vocabulary's
    server = Server(options, name)
    try:
        server.wait_ready()
        command = [sys.executable, "-c", CLIENT, "bench", "ttft", "--url", server.url, "--cold-gpu"]
        command += ["--out", str(options.out / f"{name}.json"), *options.client]
        command += ["--between", f"kill -9 -$(cat {shlex.quote(str(server.pid_file))})"]
        path = os.pathsep.join(filter(None, (options.tokendepot and str(options.tokendepot), os.environ.get("PYTHONPATH"))))
        ended = subprocess.run(command, env=dict(os.environ, PYTHONPATH=path), check=False)
    finally:
        server.stop()
        if options.root:
            shutil.rmtree(options.root, ignore_errors=True)
    sys.exit(ended.returncode)


if __name__ == "__main__":
    main()
