"""Each process sees what the others store within a second."""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from paged import MANIFEST, WANT, config, keys_of

from tokendepot import Depot

STORES = 20
WRITER = """
import sys, time
from paged import MANIFEST, Cache, config, keys_of, store
from tokendepot import Depot

depot = Depot.open(config(sys.argv[1]))
namespace = depot.register_namespace(MANIFEST)
cache = Cache(4, seed=1)
cache.lend_to(depot)
for prompt in range(int(sys.argv[2])):
    while not store(depot, namespace, keys_of(namespace, 1, prompt * 1000), job=prompt + 1)["items_ok"]:
        time.sleep(0.01)  # dropped while the next segment is made ready
    print(time.monotonic(), flush=True)
    time.sleep(0.05)
sys.stdin.readline()
depot.close()
"""


def test_a_store_is_found_by_another_process_within_a_second(root):
    """The median of single stores, from the writer's word, with the reader's default of how often it looks."""
    options = json.loads(config(root))
    del options["poll_ms"]
    reader = Depot.open(json.dumps(options))
    namespace = reader.register_namespace(MANIFEST)
    command = [sys.executable, "-c", WRITER, str(root), str(STORES)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    writer = subprocess.Popen(command, cwd=Path(__file__).parent, text=True, **pipes)
    late = []
    for prompt in range(STORES):
        key = keys_of(namespace, 1, prompt * 1000)
        stored_at = float(writer.stdout.readline())
        while not reader.longest_prefix(key, [WANT]):
            assert time.monotonic() < stored_at + 20, f"prompt {prompt} is not seen"
            time.sleep(0.005)
        late.append(time.monotonic() - stored_at)
    writer.communicate("\n", timeout=60)
    assert writer.returncode == 0
    reader.close()
    assert median(late) <= 1.0, late
