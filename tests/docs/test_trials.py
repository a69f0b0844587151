"""The table of trials: failures that people met with systems like this one. Each has a row, and what a row names is there."""

from __future__ import annotations

import re

from test_docs import TREE, rows, section

RELIABILITY = TREE / "docs/reliability.md"
TRIALS = """I1 I2 I3 I5 I6 I7 I9 I10 D1 D2 D3 D4 D5 D7 D8 P1 P2 P4 P5 P6 E1 E2 E3 E5 E6 E8 E9 C1 C2 C3 C4 C5 C6 X1 X3 X4 X5
N1 N3 N4 N6 N7 N8 N9 G1 G2 G4 G5 S1 S2 S4 T1 T2 T3 T5 T6 T7 T8 T10 T11 T12 O1 O2 O4""".split()
CPP = "\n".join(file.read_text() for folder in ("unit", "gpu") for file in sorted((TREE / "tests" / folder).glob("*.cc")))
PYTHON = "\n".join(file.read_text() for file in sorted((TREE / "tests").rglob("*.py")))
FILES = {file.name for file in (TREE / "tests").rglob("*.py")}


def is_there(name: str) -> bool:
    if name.endswith((".py", ".cc")):
        return (TREE / name).is_file() or name in FILES
    stem = re.escape(name.rstrip("*"))
    if suite := re.fullmatch(r"(\w+)\.(\w*)\*", name):
        return re.search(rf"TEST(_F|_P)?\(\s*{suite[1]},\s*{suite[2]}", CPP) is not None
    return re.search(rf"^def (test_)?{stem}", PYTHON, re.MULTILINE) is not None


def named(text: str) -> list[str]:
    """Tests and files of tests; not commands, paths of the system or names of errors."""
    return [name for name in re.findall(r"`([^`]+)`", text) if name.endswith((".py", ".cc")) or re.fullmatch(r"\w+(\.\w*)?\*", name)]


def test_every_trial_is_told() -> None:
    text = section(RELIABILITY, "Trials")
    told = {trial for cells in rows(text) for trial in re.findall(r"\b[A-Z]\d+\b", cells[0])}
    assert told == set(TRIALS)


def test_what_tries_a_trial_exists() -> None:
    found = [(cells[0], name) for cells in rows(section(RELIABILITY, "Trials")) for name in named(cells[1])]
    assert len(found) > 100
    assert [pair for pair in found if not is_there(pair[1])] == []
