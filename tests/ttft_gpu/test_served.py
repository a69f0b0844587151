"""The client's run of bench/ttft_gpu with a stand-in for vLLM's server, which is killed between the turns."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("tokenizers", reason="the vocabulary is written with the package tokenizers")

ROOT = Path(__file__).parents[2]
SERVED = ROOT / "bench" / "ttft_gpu" / "served.py"
STAND_IN = '''
import asyncio, os, socket, sys
from scripted_server import ScriptedServer

def after(option):
    return sys.argv[sys.argv.index(option) + 1]

class OneOfVllm(ScriptedServer):
    model = after("--served-model-name")

    def answer(self, path, body):
        return (200, {}) if path == "/health" else super().answer(path, body)

with open(os.environ["STARTS"], "a") as starts:
    mode = "eager" if "--enforce-eager" in sys.argv else after("--compilation-config")
    print("depot" if "--kv-transfer-config" in sys.argv else "none", mode, file=starts)
asyncio.run(OneOfVllm().serve(socket.create_server(("127.0.0.1", int(after("--port"))))))
'''


@pytest.fixture
def served(tmp_path: Path):
    package = tmp_path / "kit" / "site" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, *package.parents[:2]):
        (folder / "__init__.py").touch()  # goes before a real vLLM of the environment
    (package / "api_server.py").write_text(STAND_IN)
    paths = [f"{tmp_path}/kit/site", str(ROOT / "tests" / "bench")]
    (tmp_path / "kit" / "vllm_env.sh").write_text(f"export PYTHONPATH={':'.join(paths)}:$PYTHONPATH\n")

    def run(
        *options: str, kit: bool = True, terminated: bool = False
    ) -> tuple[subprocess.CompletedProcess, list[str]]:
        starts = tmp_path / "starts"
        starts.unlink(missing_ok=True)
        command = [sys.executable, str(SERVED)]
        command += ["--kit", str(tmp_path / "kit"), "--tokendepot", str(tmp_path)] if kit else []
        command += ["--out", str(tmp_path / "out"), *options, "--", "--contexts", "50,200", "--repeats", "1"]
        environment = {**os.environ, "STARTS": str(starts)}
        if not kit:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (*paths, os.environ.get("PYTHONPATH"))))
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        if terminated:
            ends = time.monotonic() + 60
            while not (starts.exists() and starts.read_text()) and time.monotonic() < ends:
                time.sleep(0.05)
            process.terminate()
        stdout, stderr = process.communicate(timeout=300)
        done = subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
        return done, starts.read_text().splitlines() if starts.exists() else []

    return run


def test_a_server_is_killed_before_turn_two_with_a_depot_and_without(served, tmp_path: Path) -> None:
    root = tmp_path / "root"
    with_depot, starts = served("--root", str(root))
    # The stand-in has no prefix cache that could be emptied, which the client reports.
    assert "Turn 2" in with_depot.stdout, with_depot.stdout + with_depot.stderr
    assert starts == ["depot eager", "depot eager"] and not root.exists()
    without, starts = served("--compiled")
    assert [line.split()[0] for line in starts] == ["none", "none"] and all("cudagraph_capture_sizes" in line for line in starts)
    for name, done in (("on", with_depot), ("off", without)):
        result = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert result["complete"] and len(result["requests"]) == 4
        assert result["server"]["model"] == "llama-3.1-8b"
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "out" / f"{name}.pid").read_text()), 0)


def test_the_server_ends_with_a_run_that_is_terminated(served, tmp_path: Path) -> None:
    root = tmp_path / "root"
    done, starts = served("--root", str(root), terminated=True)
    assert starts == ["depot eager"]
    assert done.returncode == 128 + signal.SIGTERM, done.stdout + done.stderr
    assert not root.exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(int((tmp_path / "out" / "on.pid").read_text()), 0)


def test_without_a_kit_vllm_and_the_package_are_this_pythons(served, tmp_path: Path) -> None:
    done, starts = served(kit=False)
    assert "Turn 2" in done.stdout, done.stdout + done.stderr
    assert starts == ["none eager", "none eager"]
    assert json.loads((tmp_path / "out" / "off.json").read_text())["complete"]


def test_every_token_of_the_vocabulary_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tokenizers

    monkeypatch.syspath_prepend(str(SERVED.parent))
    import workload

    workload.write_vocabulary(tmp_path, 4000)
    vocabulary = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert vocabulary.get_vocab_size() == 4000
    assert all(vocabulary.decode([token]) for token in range(4000))
    for text in (" able about above", " run 7f3a: Ünder", "\n"):
        assert vocabulary.decode(vocabulary.encode(text).ids) == text
    assert len(vocabulary.encode(" able about above").ids) == 3


def test_a_root_with_something_in_it_is_refused_and_left_alone(served, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "precious").touch()
    done, starts = served("--root", str(root))
    assert done.returncode != 0 and "expected an empty or missing folder" in done.stderr
    assert (root / "precious").exists() and not starts
