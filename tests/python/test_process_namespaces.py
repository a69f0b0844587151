"""Trials E3, X1 and R9: engines in containers or on hosts of which each calls itself process 1, on one directory.

Whoever told the living from the dead by process id would take a dead owner's lock for its own, or a living owner for dead.
"""

import json
import os
import queue
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from paged import config
from tokendepot import Depot

UNSHARE = ["unshare", "--map-root-user", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]
CHUNKS = 4  # of a prompt
REOPEN_S = 5.0
ENGINE = """
import json, os, random, socket, sys, time
import numpy as np
from paged import BLOCKS_PER_CHUNK, CHUNK_TOKENS, MANIFEST, WANT, Cache, config, keys_of, load, store
from tokendepot import Depot

root, name, chunks = sys.argv[1], sys.argv[2], int(sys.argv[3])
socket.sethostname(name)
begin = time.monotonic()
depot = Depot.open(config(root, roots=[{"path": root, "capacity": "256MiB", "segment": "1MiB"}]))
opened = time.monotonic() - begin
namespace = depot.register_namespace(MANIFEST)
cache = Cache(chunks * BLOCKS_PER_CHUNK)
cache.lend_to(depot)
jobs = iter(range(1, 10**9))
say = lambda what: print(json.dumps(what), flush=True)
bytes_of = lambda prompt: np.random.default_rng(prompt).integers(0, 256, cache.data.shape, np.uint8)
keys_of_prompt = lambda prompt: keys_of(namespace, chunks, first_token=prompt * chunks * CHUNK_TOKENS)

def stored(prompt):
    cache.data[:] = bytes_of(prompt)
    while store(depot, namespace, keys_of_prompt(prompt), next(jobs))["items_ok"] < chunks:
        time.sleep(0.01)  # dropped while the next segment is made ready
    return prompt

def exact(prompt):
    cache.data[:] = 0
    keys = keys_of_prompt(prompt)
    if depot.longest_prefix(keys, [WANT]) < chunks or load(depot, namespace, keys, next(jobs))["items_ok"] < chunks:
        return False
    return bool((cache.data == bytes_of(prompt)).all())

def race(prompts):  # puts each once, and gets another after each: how many came back with other bytes
    wrong = 0
    for prompt in random.sample(prompts, len(prompts)):
        cache.data[:] = bytes_of(prompt)
        store(depot, namespace, keys_of_prompt(prompt), next(jobs))
        other = random.choice(prompts)
        cache.data[:] = 0
        keys = keys_of_prompt(other)
        if depot.longest_prefix(keys, [WANT]) == chunks and load(depot, namespace, keys, next(jobs))["items_ok"] == chunks:
            wrong += not (cache.data == bytes_of(other)).all()
    return wrong

say([os.getpid(), socket.gethostname(), opened])
for line in sys.stdin:
    what, *prompts = json.loads(line)
    if what == "store":
        for prompt in prompts:
            say(stored(prompt))
    elif what == "race":
        say(race(prompts))
    else:
        depot.refresh()
        say([prompt for prompt in prompts if not exact(prompt)])
depot.close()
"""


def refusal():
    """Why no such processes can be started here, or None."""
    if shutil.which("unshare") is None:
        return "no unshare"
    probe = subprocess.run([*UNSHARE, "true"], capture_output=True, text=True)
    return None if probe.returncode == 0 else f"namespaces are refused: {probe.stderr.strip()}"


pytestmark = pytest.mark.skipif(refusal() is not None, reason=str(refusal()))


class Engine:
    """One that says how long its depot took to open, then does what it is told line by line."""

    def __init__(self, root, host_name, chunks=CHUNKS):
        command = [*UNSHARE, sys.executable, "-c", ENGINE, str(root), host_name, str(chunks)]
        self.process = subprocess.Popen(
            command, cwd=Path(__file__).parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.answers = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.pid, self.host_name, self.opened_s = self.answer()

    def _read(self):
        for line in self.process.stdout:
            self.answers.put(json.loads(line))
        self.answers.put(None)

    def answer(self):
        """None: it has ended. `queue.Empty`: it hangs."""
        return self.answers.get(timeout=60)

    def tell(self, what, prompts):
        self.process.stdin.write(json.dumps([what, *prompts]) + "\n")
        self.process.stdin.flush()

    def not_exact(self, prompts):
        self.tell("load", prompts)
        return self.answer()

    def kill(self):
        """kill -9 of the engine itself, which goes with its parent; returns what it had still said."""
        self.process.kill()
        return list(iter(self.answer, None))

    def close(self):
        self.process.stdin.close()
        return self.process.wait(timeout=60)


@pytest.fixture
def start():
    engines = []

    def start_one(*arguments):
        engines.append(Engine(*arguments))
        return engines[-1]

    yield start_one
    for engine in engines:
        engine.process.kill()
        engine.process.wait()


@pytest.mark.parametrize("heir_name", ["other-host", "killed-host"])
def test_of_processes_that_are_all_number_one_the_dead_hold_nothing_up_and_the_living_are_left_alone(root, start, heir_name):
    killed, living = start(root, "killed-host"), start(root, "living-host")
    assert (killed.pid, killed.host_name) == (1, "killed-host")
    assert (living.pid, living.host_name) == (1, "living-host")
    killed.tell("store", range(500))
    living.tell("store", range(1000, 1008))
    acknowledged = [killed.answer() for _ in range(12)] + [living.answer() for _ in range(8)]
    acknowledged += killed.kill()

    heir = start(root, heir_name)
    assert heir.pid == 1 and heir.opened_s < REOPEN_S
    assert heir.not_exact(acknowledged) == [], "acknowledged and lost"
    assert living.not_exact(acknowledged) == []
    for engine, first in ((heir, 2000), (living, 3000)):
        engine.tell("store", range(first, first + 4))
        assert [engine.answer() for _ in range(4)] == list(range(first, first + 4)), "nobody is stuck"
        acknowledged += range(first, first + 4)

    assert living.close() == 0
    reopened = start(root, "living-host")
    assert reopened.opened_s < REOPEN_S
    assert reopened.not_exact(acknowledged) == []


def test_writers_of_one_key_with_equal_process_ids_never_mix_what_they_write(root, start):
    """X1: four hosts put and get the same 32 keys, round after round, and one of them is killed in each."""
    rounds = 50 if os.environ.get("TOKENDEPOT_LONG_TESTS") else 6
    keys = list(range(32))
    engines = {f"host-{n}": start(root, f"host-{n}", 1) for n in range(4)}
    for number in range(rounds):
        for engine in engines.values():
            engine.tell("race", keys)
        victim = random.Random(number).choice(sorted(engines))
        said = {name: engine.answer() for name, engine in engines.items() if name != victim}
        assert said == dict.fromkeys(said, 0), f"round {number}: an error, or other bytes than were put"
        assert set(engines[victim].kill()) <= {0}, "it may have ended its round"
        engines[victim] = start(root, victim, 1)
        assert engines[victim].pid == 1 and engines[victim].opened_s < REOPEN_S

    for engine in engines.values():
        assert engine.close() == 0
    last = start(root, "another-host", 1)
    last.tell("store", keys)
    assert [last.answer() for _ in keys] == keys
    assert last.not_exact(keys) == []
    assert last.close() == 0
    assert not [path for path in root.rglob("*") if path.name.startswith(".tmp-")]
    depot = Depot.open(config(root))
    assert depot.stats()["entries"] == len(keys)
    depot.close()
