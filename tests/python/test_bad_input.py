"""Every command on what it cannot use: one sentence, exit code 2, nothing changed."""

import json
import os
import pathlib

import pytest
from command_line import call, call_as_nobody
from paged import filled_root
from test_compatibility import COMMANDS, content

# The doctor says what a directory would be as a root, and is right to use any; bench io works in any that is no depot.
LOOKS_AT_ANY_DIRECTORY = {"doctor", "bench"}
TRACE = pathlib.Path(__file__).resolve().parents[1] / "traces/synthetic_trace.jsonl.gz"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What the arguments in COMMANDS stand for; all may be read by anybody but the root."""
    directory = tmp_path_factory.mktemp("input")
    for parent in (directory, *directory.parents[:2]):
        os.chmod(parent, 0o755)
    namespace, _, _ = filled_root(directory / "root", chunks=2)
    arguments = ["export", directory / "root", "--namespace", namespace.hex()[:12], "--out", directory / "export"]
    assert call(*arguments).returncode == 0
    (directory / "prompt").write_text(json.dumps(list(range(64))))
    (directory / "other").mkdir(mode=0o755)
    (directory / "other" / "thesis.txt").write_text("not the depot's")
    for file in ("export", "prompt"):
        os.chmod(directory / file, 0o644)
    return {"ROOT": directory / "root", "FILE": directory / "export", "PROMPT": directory / "prompt",
            "FRESH": directory / "fresh", "TRACE": TRACE}  # fmt: skip


def arguments_of(command, places, **others):
    return [command, *({**places, **others}.get(text, text) for text in COMMANDS[command])]


def assert_refused(code, said, places, before):
    assert code == 2, said
    assert said.startswith("tokendepot: ") and said.count("\n") == 1 and said.endswith("\n"), said
    assert content(places["ROOT"].parent) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_is_refused(places, command):
    before = content(places["ROOT"].parent)
    result = call(*arguments_of(command, places), "--frobnicate")
    assert_refused(result.returncode, result.stderr, places, before)
    assert "--frobnicate" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["metrics", "ROOT", "--once", "--port", "70000"], ("--port", "70000", "65535")),
        (["ls", "ROOT", "--limit", "few"], ("--limit", "few", "integer")),
        (["ls", "ROOT", "--limit", "-1"], ("--limit", "-1", "0")),
        (["events", "ROOT", "--form", "list"], ("--form", "list", "array")),
        (["evict", "ROOT", "--bytes", "8G"], ("--bytes", "8G", "GiB")),
        (["evict", "ROOT"], ("--bytes",)),
        (["stat"], ("ROOT",)),
        (["frobnicate"], ("frobnicate",)),
        (["ls", "ROOT", "--namespace", "zz"], ("--namespace", "zz", "hex")),
        (["stat", "/nowhere?capacity=1GiB"], ("ROOT", "/nowhere?capacity=1GiB", "directory alone")),
        (["import", "PROMPT", "ROOT", "--capacity", "16MiB"], ("PROMPT", "no export file")),
        (["doctor", "ROOT?capcity=1GiB"], ("capcity",)),
    ],
)
def test_a_refusal_is_one_line_that_names_the_thing_the_value_and_what_was_expected(places, arguments, named):
    before = content(places["ROOT"].parent)
    result = call(*(str(places.get(text, text)).replace("ROOT?", f"{places['ROOT']}?") for text in arguments))
    assert_refused(result.returncode, result.stderr, places, before)
    assert result.stdout == ""
    assert [word for word in named if str(places.get(word, word) if word == "PROMPT" else word) not in result.stderr] == []


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (command, name)
        for command in sorted(COMMANDS.keys() - LOOKS_AT_ANY_DIRECTORY)
        for name in ("other", "missing")
        if (command, name) != ("replay", "missing")  # it makes that one
    ],
)
def test_what_is_no_root_is_refused(places, command, name):
    before = content(places["ROOT"].parent)
    result = call(*arguments_of(command, places, ROOT=places["ROOT"].with_name(name)))
    assert_refused(result.returncode, result.stderr, places, before)


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - LOOKS_AT_ANY_DIRECTORY))
def test_a_root_of_somebody_else_is_refused(places, command):
    before = content(places["ROOT"].parent)
    code, said = call_as_nobody(*arguments_of(command, places))
    assert_refused(code, said, places, before)
