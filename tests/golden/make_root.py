"""Writes root-v1.tar.xz: a root as the first package with a Python module wrote it (git archive 109b2d0).

Install that commit's package, then: PYTHONPATH=ITS_SITE python tests/golden/make_root.py. The archive is never written
anew by a later package: it stands for what is on people's disks.
"""

import os
import pathlib
import sys
import tarfile
import tempfile

from golden import ARCHIVE, write

import tokendepot


def main():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        root = pathlib.Path(directory) / "root"
        write(root)
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
