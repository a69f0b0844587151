"""The driver of bench/ttft_gpu with a stand-in for vLLM: processes, phases, tables and limits, without a GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "ttft_gpu"
STAND_IN = '''
import json, os
from types import SimpleNamespace

class SamplingParams:
    def __init__(self, **values):
        pass

class LLM:
    """Finds again in a file what another process was asked, as a system that survives a restart does."""
    def __init__(self, **arguments):
        transfer = arguments.get("kv_transfer_config") or {}
        tiers = transfer.get("kv_connector_extra_config", {}).get("secondary_tiers")
        self.file = os.path.join(tiers[0]["root_dir"], "seen") if tiers else ""
        if tiers:  # vLLM's own name; an engine that is killed leaves it
            open(f"/dev/shm/vllm_offload_{transfer['engine_id']}.mmap", "x").close()
        self.kept = json.load(open(self.file)) if self.file and os.path.exists(self.file) else []
        self.transfer, self.cached = bool(transfer), []

    def apply_model(self, function):
        pass

    def reset_prefix_cache(self):
        self.cached = []
        return True

    def generate(self, requests, sampling, use_tqdm):
        ids = requests[0]["prompt_token_ids"]
        heads = self.cached + (self.kept if self.transfer else [])
        hit = len(ids) - 20 if ids[:20] in heads else 0
        self.cached.append(ids[:20])
        self.kept.append(ids[:20])
        if self.file:
            json.dump(self.kept, open(self.file, "w"))
        output = SimpleNamespace(token_ids=[sum(ids) % 1000])
        return [SimpleNamespace(outputs=[output], num_cached_tokens=hit)]
'''


def run(tmp_path: Path, *options: str) -> subprocess.CompletedProcess:
    kit = tmp_path / "kit"
    (kit / "site").mkdir(parents=True, exist_ok=True)
    (kit / "site" / "vllm.py").write_text(STAND_IN)
    (kit / "vllm_env.sh").write_text(f"export PYTHONPATH={kit}/site:$PYTHONPATH\n")
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    (out / "link.json").write_text(json.dumps({"GB_per_s": 50.0, "card": "none"}))
    fixed = ["--kit", str(kit), "--tokendepot", str(tmp_path), "--out", str(out), "--disk", str(tmp_path)]
    return subprocess.run(
        [sys.executable, str(BENCH / "run.py"), *fixed, *options],
        capture_output=True,
        text=True,
        timeout=300,
        env=dict(os.environ),
        check=False,
    )


def test_engines_run_one_after_the_other_and_runs_add_up(tmp_path: Path) -> None:
    first = run(tmp_path, "--systems", "base", "--contexts", "50,1000")
    assert first.returncode == 0, first.stdout + first.stderr
    summary = tmp_path / "summary.json"
    second = run(
        tmp_path, "--systems", "fs", "--places", "disk", "--contexts", "50,1000", "--json", str(summary)
    )
    assert second.returncode == 0, second.stdout + second.stderr
    found = {(entry["name"], entry["context"]): entry for entry in json.loads(summary.read_text())["results"]}
    assert {name for name, _ in found} == {"base", "base.restart", "fs.disk.cold", "fs.disk.restart"}
    assert found[("base.restart", 50)]["fresh_ms"] > 0 and found[("base.restart", 50)]["hit_ms"] is None
    for phase in ("cold", "restart"):
        entry = found[(f"fs.disk.{phase}", 1000)]
        assert entry["cached"] == 1000 and entry["same"] == entry["compared"] == 9
        assert entry["limit_ms"] == pytest.approx(1000 * 131072 / 50e9 * 1e3 + found[("base", 1000)]["gpu_ms"])
        assert f"RESULT ttft_fs_disk_{phase}_1000 " in second.stdout
    assert "| 1000 |" in second.stdout and "OTHER ANSWERS" not in second.stdout
    assert not (tmp_path / "ttft_gpu").exists(), "nothing is left on the disk"
    assert not list(Path("/dev/shm").glob("vllm_offload_ttft-gpu-*")), "nor in memory"


def test_wrong_names_are_refused_by_what_is_allowed(tmp_path: Path) -> None:
    done = run(tmp_path, "--systems", "base,other")
    assert done.returncode == 2 and "'other'" in done.stderr and "depot" in done.stderr


@pytest.mark.parametrize("given", ["{", "[]", "4"])
def test_options_of_the_depot_that_are_no_object_are_refused(tmp_path: Path, given: str) -> None:
    done = run(tmp_path, "--depot", given)
    assert done.returncode == 2 and f"--depot has {given!r} but must be a JSON object" in done.stderr


def test_options_of_the_depot_replace_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    import systems

    given = systems.transfer_config("depot", "/dev/shm/kv", "1GiB", {"device_threads": 4, "store_queue": "1GiB"})
    extra = given["kv_connector_extra_config"]
    assert extra["device_threads"] == 4 and extra["store_queue"] == "1GiB" and extra["on_error"] == "fail"
    assert extra["roots"] == ["/dev/shm/kv?capacity=1GiB"]


def test_what_does_not_fit_the_deadline_is_said_and_not_begun(tmp_path: Path) -> None:
    done = run(tmp_path, "--systems", "base", "--deadline", "30")
    assert done.returncode == 0 and "base cold not started" in done.stdout
    assert not (tmp_path / "out" / "base.json").exists()


def test_a_folder_that_is_no_kit_is_refused_by_name(tmp_path: Path) -> None:
    done = run(tmp_path, "--kit", str(tmp_path))
    assert done.returncode == 2 and f"--kit '{tmp_path}' has no vllm_env.sh" in done.stderr


def test_without_a_kit_vllm_is_this_pythons(tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text(STAND_IN)
    (tmp_path / "link.json").write_text(json.dumps({"GB_per_s": 50.0, "card": "none"}))
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(BENCH / "run.py"), "--out", str(tmp_path), "--systems", "base", "--contexts", "50"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=dict(os.environ, PYTHONPATH=path), check=False
    )
    assert done.returncode == 0 and "| 50 |" in done.stdout, done.stdout + done.stderr


POOL = "/dev/shm/lmcache_l1_pool_{}"  # LMCache's name of its memory, which outlives it when it is killed


@pytest.mark.parametrize(("system", "module"), [("base", "vllm.py"), ("lmcache", "lmcache/cli/main.py")])
def test_what_a_run_started_ends_when_it_is_terminated(system: str, module: str, tmp_path: Path) -> None:
    started = tmp_path / "started"
    (tmp_path / "vllm.py").touch()
    file = tmp_path / module
    file.parent.mkdir(parents=True, exist_ok=True)
    memory = f"""
with open({POOL!r}.format(os.getpid()), "w+b") as pool:
    pool.truncate(4096)
    memory = mmap.mmap(pool.fileno(), 4096)
"""
    file.write_text(f"""
import mmap, os, time
{memory if system == "lmcache" else ""}
with open({str(started)!r}, "w") as file:
    file.write(str(os.getpid()) + " ")
time.sleep(200)
""")
    (tmp_path / "link.json").write_text(json.dumps({"GB_per_s": 50.0, "card": "none"}))
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(BENCH / "run.py"), "--out", str(tmp_path), "--systems", system, "--contexts", "50"]
    command += ["--places", "disk", "--disk", str(tmp_path / "disk")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=dict(os.environ, PYTHONPATH=path))
    ends = time.monotonic() + 60
    while not (started.exists() and started.read_text().endswith(" ")) and time.monotonic() < ends:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    server = int(started.read_text())
    pool = Path(POOL.format(server))
    left = pool.exists()
    pool.unlink(missing_ok=True)
    assert not left
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)
    assert not (tmp_path / "disk/ttft_gpu").exists()


def test_a_loop_device_that_cannot_be_mounted_leaves_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, status in (("mkfs.ext4", 0), ("mount", 1), ("umount", 1)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(BENCH))
    import systems

    with pytest.raises(subprocess.CalledProcessError):
        systems.Place("loop", tmp_path, image_bytes=1 << 20)
    assert not Path("/dev/shm/ttft_gpu.img").exists() and not Path("/tmp/ttft_gpu_loop").exists()
