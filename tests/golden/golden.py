"""What lies in the golden root, for the script that made it and for the tests that read it: see make_root.py."""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "python"))

from paged import (  # noqa: E402 found by the line above
    BLOCK_TOKENS,
    BLOCKS_PER_CHUNK,
    HEADS,
    LAYERS,
    ROW_BYTES,
    Cache,
    config,
    keys_of,
    split,
    store,
)

import tokendepot  # noqa: E402

ARCHIVE = pathlib.Path(__file__).parent / "root-v1.tar.xz"
CHUNKS = 20  # more than one segment
REMOVED = 3  # of the first prompt
MANIFEST = json.dumps({"model": "golden", "kv_dtype": "bf16", "rope": {"theta": 10000.0}})
# First token, chunks and owner of each prompt.
PROMPTS = [(0, CHUNKS, {}), (50_000, 2, {"salt": "tenant", "lora": b"adapter"})]


def pattern(prompt):
    """A cache whose every cell says where it is, so that it packs small and nothing can be in another's place."""
    cache = Cache(CHUNKS * BLOCKS_PER_CHUNK)
    for layer in range(LAYERS):
        for plane in range(2):
            for block in range(cache.blocks):
                for head in range(HEADS):
                    for token in range(BLOCK_TOKENS):
                        cell = prompt + 3 * layer + 5 * plane + 7 * block + 11 * head + 13 * token
                        cache.data[layer, plane, block, head, token] = [(cell + byte) % 251 for byte in range(ROW_BYTES)]
    return cache


def write(root):
    """Makes that root with the package that is installed."""
    for prompt, (first_token, chunks, owner) in enumerate(PROMPTS):
        depot = tokendepot.Depot.open(config(root))
        namespace = depot.register_namespace(MANIFEST)
        cache = pattern(prompt)
        cache.lend_to(depot)
        keys = keys_of(namespace, chunks, first_token, **owner)
        assert store(depot, namespace, keys)["items_ok"] == chunks
        depot.close()
    removed = split(keys_of(namespace, PROMPTS[0][1]))[REMOVED]
    extents = [extent for extent in tokendepot.list_extents(str(root)) if extent["key"] == removed]
    assert tokendepot.remove_extents(str(root), extents) == 1
