"""Writes root-v1.tar.xz: a root as the first package with a Python module wrote it (git archive 109b2d0).

Install that commit's package, then: PYTHONPATH=ITS_SITE python tests/golden/make_root.py. The archive is never written
anew by a later package: it stands for what is on people's disks.
"""

import os
import pathlib
import sys
import tarfile
import tempfile

from golden import ARCHIVE, MANIFEST, PROMPTS, REMOVED, pattern
from paged import config, keys_of, split, store

import tokendepot
from tokendepot import Depot


def main():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        root = pathlib.Path(directory) / "root"
        for prompt, (first_token, chunks, owner) in enumerate(PROMPTS):
            depot = Depot.open(config(root))
            namespace = depot.register_namespace(MANIFEST)
            cache = pattern(prompt)
            cache.lend_to(depot)
            keys = keys_of(namespace, chunks, first_token, **owner)
            assert store(depot, namespace, keys)["items_ok"] == chunks
            depot.close()
        removed = split(keys_of(namespace, PROMPTS[0][1]))[REMOVED]
        extents = [extent for extent in tokendepot.list_extents(str(root)) if extent["key"] == removed]
        assert tokendepot.remove_extents(str(root), extents) == 1
        with tarfile.open(ARCHIVE, "w:xz", preset=9) as archive:
            for file in sorted(root.rglob("*")):
                archive.add(file, file.relative_to(root), recursive=False, filter=_anonymous)
    print(f"{ARCHIVE.name}: {os.path.getsize(ARCHIVE)} bytes, by {tokendepot.__version__}", file=sys.stderr)


def _anonymous(member):
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    main()
