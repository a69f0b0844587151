"""One process of one host: opens a depot on a shared root, does what it reads line by line, answers line by line.

Started by gluster.py. A prompt is a number: its token ids and its KV bytes are made from it, so that every process can
check what every other one stored. Commands and answers are JSON; an answer has "ok" and what the command says.
"""

import fcntl
import json
import os
import struct
import sys
import time

import numpy as np

from tokendepot import Depot, DepotError, GroupWant, KeyChain, plan_store

LAYERS, HEADS, BLOCK_TOKENS, CHUNK_TOKENS, ROW_BYTES = 2, 2, 16, 64, 256
CHUNKS = 8  # of a prompt; 128 KiB of payload each
BLOCKS_PER_CHUNK = CHUNK_TOKENS // BLOCK_TOKENS
BLOCKS = CHUNKS * BLOCKS_PER_CHUNK
PART = (0, LAYERS, 0, HEADS)
WANT = GroupWant(0, "canonical", PART, CHUNK_TOKENS)
SHAPE = (LAYERS, 2, BLOCKS, HEADS, BLOCK_TOKENS, ROW_BYTES)


def bytes_of(prompt):
    return np.random.default_rng(prompt).integers(0, 256, SHAPE, np.uint8)


def locked(file):
    """Takes the lock of an open file, as the depot does; False while another one has it."""
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except BlockingIOError:
        return False
    return True


class Host:
    def __init__(self, root, capacity, load_timeout, eviction_grace_ms):
        begin = time.monotonic()
        self.root = root
        self.depot = Depot.open(
            json.dumps(
                {
                    "roots": [{"path": root, "capacity": capacity, "segment": "8MiB"}],
                    "slab": "16MiB",
                    "io_depth": 4,
                    "free_space_reserve": 0,
                    "eviction_grace_ms": eviction_grace_ms,
                }
            )
        )
        self.open_s = time.monotonic() - begin
        self.load_timeout = load_timeout
        self.namespace = self.depot.register_namespace(json.dumps({"model": "hosts/trial"}))
        self.data = np.zeros(SHAPE, np.uint8)
        _, _, block, head, token, _ = self.data.strides
        layers = [[(plane.ctypes.data, block, head, token, 0) for plane in layer] for layer in self.data]
        self.depot.attach(
            group=0,
            kind="canonical",
            part=PART,
            tokens=CHUNK_TOKENS,
            block_tokens=BLOCK_TOKENS,
            block_count=BLOCKS,
            row_bytes=ROW_BYTES,
            layers=layers,
        )
        self.jobs = 0
        self.gathered_s = 0.0  # the longest that a store has held up its caller

    def keys(self, prompt):
        chain = KeyChain(self.namespace, CHUNK_TOKENS)
        first = prompt * CHUNKS * CHUNK_TOKENS
        chain.append(list(range(first, first + CHUNKS * CHUNK_TOKENS)))
        return chain.keys()

    def ended(self, job, timeout):
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            for done in self.depot.poll():
                if done["job"] == job:
                    return done
            time.sleep(0.001)
        return None

    def store(self, prompt, timeout=60.0):
        """Chunks acknowledged."""
        self.data[:] = bytes_of(prompt)
        keys = self.keys(prompt)
        items = [
            (keys[i * 32 : i * 32 + 32], i, 0, list(range(i * BLOCKS_PER_CHUNK, (i + 1) * BLOCKS_PER_CHUNK)))
            for i in range(CHUNKS)
        ]
        self.jobs += 1
        self.depot.submit_store(self.jobs, plan_store(self.namespace, items))
        begin = time.monotonic()
        gathered = self.depot.wait_gathered(timeout)
        self.gathered_s = max(self.gathered_s, time.monotonic() - begin)
        done = self.ended(self.jobs, timeout)
        return done["items_ok"] if gathered and done else 0

    def store_all(self, prompt):
        """The same, again and again for a second: a store is dropped while the next segment is not ready in time."""
        for _ in range(100):
            if (stored := self.store(prompt)) == CHUNKS:
                break
            time.sleep(0.01)
        return stored

    def load(self, prompt):
        """(chunks found, chunks loaded, chunks that came with other bytes)."""
        keys = self.keys(prompt)
        found = self.depot.longest_prefix(keys, [WANT])
        if found == 0:
            return 0, 0, 0
        self.data[:] = 0
        blocks = list(range(found * BLOCKS_PER_CHUNK))
        self.jobs += 1
        try:
            plan = self.depot.plan_load(
                self.namespace, keys, [(WANT, 0, BLOCKS_PER_CHUNK, blocks)], self.load_timeout
            )
        except DepotError:
            return found, 0, 0
        self.depot.submit_load(self.jobs, plan)
        done = self.ended(self.jobs, self.load_timeout + 60)
        if done is None:
            return found, 0, 0
        failed = {chunk for _, chunk, _, _ in done["failures"]}
        for chunk in failed:
            self.depot.forget(keys[chunk * 32 : chunk * 32 + 32], 0)
        expected = bytes_of(prompt)
        wrong = 0
        for chunk in range(found):
            at = slice(chunk * BLOCKS_PER_CHUNK, (chunk + 1) * BLOCKS_PER_CHUNK)
            if chunk not in failed and not np.array_equal(self.data[:, :, at], expected[:, :, at]):
                wrong += 1
        return found, found - len(failed), wrong

    def answer(self, command):
        what, prompts = command["do"], command.get("prompts", [])
        begin = time.monotonic()
        if what in ("store", "store_all"):
            self.gathered_s = 0.0
            store = self.store_all if what == "store_all" else self.store
            acknowledged = [store(prompt) for prompt in prompts]
            return {"acknowledged": acknowledged, "s": time.monotonic() - begin, "gathered_s": self.gathered_s}
        if what == "load":
            longest, totals = 0.0, np.zeros(3, int)
            for prompt in prompts:
                one = time.monotonic()
                totals += self.load(prompt)
                longest = max(longest, time.monotonic() - one)
            found, loaded, wrong = (int(n) for n in totals)
            return {"found": found, "loaded": loaded, "wrong": wrong, "longest_s": longest}
        if what == "await":  # until the last prompt can be looked up: a chunk is seen
            keys = self.keys(prompts[-1])
            while self.depot.longest_prefix(keys, [WANT]) < CHUNKS and time.monotonic() - begin < command["s"]:
                time.sleep(0.002)
            return {"at": time.time(), "seen": self.depot.longest_prefix(keys, [WANT])}
        if what == "lookup":
            found = [self.depot.longest_prefix(self.keys(prompt), [WANT]) for prompt in prompts]
            return {"found": found, "s": time.monotonic() - begin}
        if what == "hold_keeper_lock":  # until this process or its host dies
            self.keeper_lock = open(f"{self.root}/keeper.lock", "r+b")
            while not locked(self.keeper_lock):
                time.sleep(0.001)
            return {"s": time.monotonic() - begin}
        if what == "stats":
            return {"stats": self.depot.stats()}
        raise ValueError(what)


def main():
    root, capacity, load_timeout, grace_ms = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
    host = Host(root, capacity, load_timeout, grace_ms)
    print(json.dumps({"ok": True, "open_s": host.open_s, "transport": host.depot.stats()["roots"][0]["transport"]}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "close":
            begin = time.monotonic()
            host.depot.close()
            print(json.dumps({"ok": True, "s": time.monotonic() - begin}), flush=True)
            return
        print(json.dumps({"ok": True, **host.answer(command)}), flush=True)


if __name__ == "__main__":
    main()
