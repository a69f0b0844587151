"""Time to first token of a long prompt on a GPU: recomputed, from the depot, and from what else vLLM's users have.

usage: run.py --out DIR [--kit KIT] [--tokendepot SITE] [--systems base,depot] [--places shm] [--contexts 50,1000]

On a host without a network, KIT is an unpacked folder with vLLM (site/ and vllm_env.sh) and SITE where the tokendepot
package was installed (bench/ttft_gpu/install); without them both are those of the Python that runs this. Each engine runs in a process of its own; results of earlier runs in --out
are kept and shown with the new ones, so that several short runs make one table. Systems: base (no connector), depot,
offload (vLLM's CPU offload), fs (its file-system tier), lmcache (multi-process mode), lmcache-depot (the same on a
depot). Places: shm, disk, loop.
--decode --systems depot measures what loads and stores cost requests that decode meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import environment
import report
import workload
from systems import PLACES, SYSTEMS, LMCacheServer, Place, end_engine, end_session, lmcache_storage, transfer_config

HERE = Path(__file__).parent
LINK = """
import torch, time
size, piece, best = 1 << 30, 64 << 20, 0.0
pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
device = torch.empty(size, dtype=torch.uint8, device="cuda")
for _ in range(5):
    torch.cuda.synchronize()
    began = time.perf_counter()
    for at in range(0, size, piece):
        device[at : at + piece].copy_(pinned[at : at + piece], non_blocking=True)
    torch.cuda.synchronize()
    best = max(best, size / (time.perf_counter() - began) / 1e9)
print("LINK", best, torch.cuda.get_device_name(0))
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    environment.add_options(parser)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--systems", default="base,depot")
    parser.add_argument("--places", default="shm")
    parser.add_argument("--contexts", default=",".join(map(str, workload.CONTEXTS)))
    parser.add_argument("--model", default="llama-3.1-8b", help="shape: " + " or ".join(workload.MODELS))
    parser.add_argument("--rest", type=float, default=0, help="seconds between an engine's start and the first question")
    parser.add_argument("--deadline", type=float, default=470, help="seconds for this run, all engines together")
    parser.add_argument("--capacity", default="72GiB", help="of the depot's root")
    parser.add_argument("--depot", default="{}", metavar="JSON", help='options of the system depot, as \'{"device_threads": 4}\'')
    parser.add_argument("--disk", type=Path, default=Path("/tmp"), help="folder on a disk, for the place disk")
    parser.add_argument("--utilization", type=float, default=0.9)
    parser.add_argument("--compiled", action="store_true", help="with CUDA graphs; about 30 s more for each engine")
    parser.add_argument("--v1-runner", action="store_true")
    parser.add_argument("--decode", action="store_true", help="instead: what loads and stores cost a decoding engine")
    parser.add_argument("--json", type=Path, help="also write the summary here")
    chosen = parser.parse_args()
    environment.check(parser, chosen)
    for option, allowed in (("systems", SYSTEMS), ("places", PLACES), ("model", workload.MODELS)):
        for name in getattr(chosen, option).split(","):
            if name not in allowed:
                parser.error(f"--{option} has {name!r} but must be some of {', '.join(allowed)}")
    try:
        depot = json.loads(chosen.depot)
    except ValueError:
        depot = None
    if not isinstance(depot, dict):
        parser.error(f"--depot has {chosen.depot!r} but must be a JSON object with options of the depot")
    chosen.depot = depot
    return chosen


class Run:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.ends = time.monotonic() + options.deadline
        options.out.mkdir(parents=True, exist_ok=True)
        self.model = workload.write_model(options.out / "model", options.model)
        # vLLM's own hashes of blocks survive a restart under one seed only.
        self.environment = {"PYTHONHASHSEED": "0", **os.environ, "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
        if options.v1_runner:
            self.environment["VLLM_USE_V2_MODEL_RUNNER"] = "0"

    def left(self) -> float:
        return self.ends - time.monotonic()

    def start(self, command: list[str], log: Path) -> subprocess.Popen:
        """In a session of its own."""
        with open(log, "wb") as out:
            return subprocess.Popen(
                environment.inside(self.options, command),
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )

    def link(self) -> float:
        known = self.options.out / "link.json"
        if not known.exists():
            log = self.options.out / "link.log"
            process = self.start([sys.executable, "-c", LINK], log)
            try:
                process.wait(timeout=120)
            finally:
                end_session(process)
            line = next((line for line in log.read_text().splitlines() if line.startswith("LINK ")), "")
            if not line:
                raise SystemExit(f"the link was not measured, see {log}")
            _, rate, card = line.split(" ", 2)
            known.write_text(json.dumps({"GB_per_s": float(rate), "card": card}))
        measured = json.loads(known.read_text())
        print(f"# {measured['card']}, link {measured['GB_per_s']:.1f} GB/s", flush=True)
        return measured["GB_per_s"]

    def engine(self, system: str, place: Place | None, phase: str) -> bool:
        if self.left() < 60:
            print(f"# {system} {phase} not started: {self.left():.0f} s left", flush=True)
            return False
        first = system == "base" and phase == "cold"
        name = ".".join(filter(None, (system, place.kind if place else "", "" if first else phase)))
        folder = str(place.root) if place else ""
        limit = self.left() - 5
        order = {
            "name": name,
            "system": system,
            "phase": phase,
            "folder": folder,
            "model": self.model,
            "token_bytes": workload.token_bytes(self.options.model),
            "rest_s": self.options.rest,
            "eager": not self.options.compiled,
            "utilization": self.options.utilization,
            "contexts": [int(context) for context in self.options.contexts.split(",")],
            "transfer": transfer_config(system, folder, self.options.capacity, self.options.depot),
            "out": str(self.options.out / f"{name}.json"),
            "budget_s": max(10.0, limit - 60),
        }
        log = self.options.out / f"{name}.log"
        began = time.monotonic()
        process = self.start([sys.executable, str(HERE / "engine.py"), json.dumps(order)], log)
        try:
            ended: int | str = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            ended = "nothing: stopped at the deadline"
        finally:
            end_engine(process)
        said = log.read_text(errors="replace").splitlines()
        wanted = [line for line in said if line.startswith(("ROW ", "RESULT ", "# ")) or "tokendepot" in line or "Error" in line]
        print("\n".join(line[:240] for line in wanted[-60:]), flush=True)
        print(f"# {name}: ended with {ended} after {time.monotonic() - began:.0f} s", flush=True)
        if ended != 0:
            print("\n".join(line[:300] for line in said[-15:]), flush=True)
        return ended == 0

    def system(self, system: str, place: Place | None) -> None:
        servers: list[LMCacheServer] = []

        def serve() -> None:
            while servers:
                servers.pop().stop()
            if system.startswith("lmcache") and place is not None:
                adapter = lmcache_storage(system, str(place.root), self.options.capacity)
                servers.append(LMCacheServer(adapter, self.options.out / f"{system}.server.log", self.start))

        try:
            serve()
            if self.options.decode:
                self.engine(system, place, "decode")
            elif self.engine(system, place, "cold") and SYSTEMS[system].restarts:
                if place is not None:
                    place.forget_page_cache()
                serve()
                self.engine(system, place, "restart")
        except RuntimeError as error:
            print(f"# {system}: {error}", flush=True)
        finally:
            for server in servers:
                server.stop()

    def all(self) -> list[dict[str, Any]]:
        for system in self.options.systems.split(","):
            if not SYSTEMS[system].needs_place:
                self.system(system, None)
                continue
            for kind in self.options.places.split(","):
                place = Place(kind, self.options.disk, image_bytes=60 << 30)
                try:
                    self.system(system, place)
                finally:
                    place.close()
        files = sorted(self.options.out.glob("*.json"), key=lambda file: file.stat().st_mtime)
        return [found for file in files if "rows" in (found := json.loads(file.read_text()))]


def main() -> None:
    options = arguments()
    environment.end_in_order()
    run = Run(options)
    link = run.link()
    results = run.all()
    report.show(results, link)
    if options.json:
        summary = {"link_GB_per_s": link, "results": report.summary(results, link)}
        options.json.write_text(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
