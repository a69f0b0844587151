"""A small paged KV cache in host memory, a depot on a directory, and the few steps that most tests need."""

import json
import time

import numpy as np

from tokendepot import Depot, GroupWant, KeyChain, plan_store

LAYERS, HEADS, BLOCK_TOKENS, CHUNK_TOKENS, ROW_BYTES = 2, 2, 8, 32, 256
BLOCKS_PER_CHUNK = CHUNK_TOKENS // BLOCK_TOKENS
PART = (0, LAYERS, 0, HEADS)
MANIFEST = json.dumps({"model": "test/model", "kv_dtype": "bf16"})
WANT = GroupWant(0, "canonical", PART, CHUNK_TOKENS)


def config(root, **more):
    return json.dumps(
        {
            "roots": [{"path": str(root), "capacity": "16MiB", "segment": "1MiB"}],
            "slab": "8MiB",
            "free_space_reserve": 0,
            "poll_ms": 20,
            "scrub_rate": 0,  # it would find planted damage before a load does
            **more,
        }
    )


class Cache:
    """[layer][plane][block][head][token][byte]"""

    def __init__(self, blocks=64, seed=None):
        shape = (LAYERS, 2, blocks, HEADS, BLOCK_TOKENS, ROW_BYTES)
        self.blocks = blocks
        self.data = np.zeros(shape, np.uint8)
        if seed is not None:
            self.data = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)

    def lend_to(self, depot, group=0):
        _, _, block, head, token, _ = self.data.strides
        layers = [[(plane.ctypes.data, block, head, token, 0) for plane in layer] for layer in self.data]
        depot.attach(
            group=group,
            kind="canonical",
            part=PART,
            tokens=CHUNK_TOKENS,
            block_tokens=BLOCK_TOKENS,
            block_count=self.blocks,
            row_bytes=ROW_BYTES,
            layers=layers,
        )


def wait_for(depot, job, timeout=20.0):
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        for done in depot.poll():
            assert done["job"] == job
            return done
        time.sleep(0.001)
    raise AssertionError(f"job {job} was not reported in {timeout} s")


def keys_of(namespace, chunks, first_token=0, **owner):
    chain = KeyChain(namespace, CHUNK_TOKENS, **owner)
    chain.append(range_of(first_token, chunks * CHUNK_TOKENS))
    return chain.keys()


def range_of(first, count):
    return list(range(first, first + count))


def split(keys):
    return [keys[i : i + 32] for i in range(0, len(keys), 32)]


def store(depot, namespace, keys, job=1, first_block=0):
    items = [
        (key, i, 0, range_of(first_block + i * BLOCKS_PER_CHUNK, BLOCKS_PER_CHUNK)) for i, key in enumerate(split(keys))
    ]
    depot.submit_store(job, plan_store(namespace, items))
    assert depot.flush(20.0)
    return wait_for(depot, job)


def load(depot, namespace, keys, job=2, first_block=0):
    blocks = range_of(first_block, len(keys) // 32 * BLOCKS_PER_CHUNK)
    depot.submit_load(job, depot.plan_load(namespace, keys, [(WANT, 0, BLOCKS_PER_CHUNK, blocks)], 10.0))
    return wait_for(depot, job)


def filled_root(root, chunks=8, manifest=MANIFEST, seed=7, first_token=0):
    """A root that an engine has filled and closed: (namespace, keys, cache that was stored)."""
    depot = Depot.open(config(root))
    namespace = depot.register_namespace(manifest)
    cache = Cache(chunks * BLOCKS_PER_CHUNK, seed)
    cache.lend_to(depot)
    keys = keys_of(namespace, chunks, first_token)
    assert store(depot, namespace, keys)["items_ok"] == chunks
    depot.close()
    return namespace, keys, cache
