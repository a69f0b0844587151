"""The documents say what is there: links, commands, paths, functions, metrics, keys, words."""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tokendepot import DepotError, parse_options
from tokendepot.engines import metrics as engine

TREE = Path(__file__).resolve().parents[2]
DOCUMENTS = [TREE / "README.md", TREE / "CONTRIBUTING.md", TREE / "CHANGELOG.md", *sorted((TREE / "docs").rglob("*.md"))]
README, OPERATIONS, ARCHITECTURE, GLOSSARY, BENCHMARKS = (
    TREE / name for name in ("README.md", "docs/operations.md", "docs/architecture.md", "docs/glossary.md", "docs/benchmarks.md")
)
VLLM = TREE / "python/tokendepot/engines/vllm"
ROOTS = ["/dev/shm/depot?capacity=8GiB"]

documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def prose(document: Path) -> str:
    """The text without fenced code."""
    return re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def code(document: Path) -> Iterator[str]:
    """Fenced lines and inline pieces."""
    text = document.read_text(encoding="utf-8")
    for block in re.findall(r"^```\w*\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        yield from block.splitlines()
    yield from re.findall(r"`([^`\n]+)`", prose(document))


def section(document: Path, heading: str) -> str:
    text = document.read_text(encoding="utf-8")
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", text, flags=re.DOTALL | re.MULTILINE)
    assert found, f"{document.name} has no section {heading}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """Cells of the tables' rows, headings left out."""
    found = []
    lines = text.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("|") and not line.startswith("|--") and not following.startswith("|--"):
            found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def table(heading: str) -> dict[str, str]:
    """Key -> default of a table of keys."""
    return {cells[0].strip("`"): cells[1].strip("`") for cells in rows(section(OPERATIONS, heading))}


def literal(file: Path, name: str):
    """The value of a module's constant, without importing the module (it needs a vLLM)."""
    for statement in ast.parse(file.read_text(encoding="utf-8")).body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return ast.literal_eval(statement.value)
    raise AssertionError(f"{file} has no constant {name}")


def known_keys(name: str) -> set[str]:
    source = (TREE / "src/options.cc").read_text(encoding="utf-8")
    found = re.search(rf"{name}\{{(.*?)\}};", source, flags=re.DOTALL)
    assert found, f"src/options.cc has no list {name}"
    return set(re.findall(r'"(\w+)"', found[1]))


def slug(heading: str) -> str:
    """The anchor that forges give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


# --- links, paths, commands --------------------------------------------------------------------------------------


@documents
def test_relative_links_resolve(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), f"{document.name} links to {target}"
        if anchor:
            text = file.read_text(encoding="utf-8")
            anchors = {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)}
            anchors |= set(re.findall(r'<a id="([\w-]+)"></a>', text))
            assert anchor in anchors, f"{document.name} links to {target}"


@documents
def test_paths_and_functions_that_are_named_exist(document: Path) -> None:
    for piece in re.findall(r"`([^`\n]+)`", prose(document)):
        found = re.fullmatch(r"((?:src|include|python|tests|scripts|bench|docs|cmake|deploy)/[\w./*-]*)(?::([\w:]+))?", piece)
        if found is None:
            continue
        path, function = found.groups()
        files = list(TREE.glob(path))
        assert files, f"{document.name} names {path}"
        if function:
            name = function.split("::")[-1]
            text = files[0].read_text(encoding="utf-8")
            assert re.search(rf"\b{name}\(", text), f"{document.name} names {name}() in {path}"


@documents
def test_scripts_that_are_named_can_be_run(document: Path) -> None:
    for line in code(document):
        for script in re.findall(r"(?<![\w/])scripts/[\w-]+(?![\w.])", line):
            file = TREE / script
            assert file.is_file() and os.access(file, os.X_OK), f"{document.name} names {script}"
            for option in re.findall(rf"{script}[^#|]*?(--[a-z][\w-]*)", line):
                assert option in file.read_text(encoding="utf-8"), f"{document.name} names {script} {option}"


@documents
def test_commands_and_options_of_the_cli_that_are_named_exist(document: Path) -> None:
    import typer.main
    from tokendepot.cli.commands import app

    commands = typer.main.get_command(app).commands
    for line in code(document):
        found = re.match(r"tokendepot ([a-z]+)\b(.*)", line)
        if found is None:
            continue
        name, rest = found.groups()
        assert name in commands, f"{document.name} names tokendepot {name}"
        command = commands[name]
        if hasattr(command, "commands"):  # a group: its subcommand has the options
            inner = re.match(r" ([a-z]+)\b(.*)", rest)
            if inner is None:
                continue
            assert inner[1] in command.commands, f"{document.name} names tokendepot {name} {inner[1]}"
            command, rest = command.commands[inner[1]], inner[2]
        options = {option for parameter in command.params for option in parameter.opts}
        for option in re.findall(r"--[a-z][\w-]*", rest.partition("#")[0]):
            assert option in options, f"{document.name} names tokendepot {name} {option}"


def test_the_command_line_table_has_every_command() -> None:
    import typer.main
    from tokendepot.cli.commands import app

    listed = {cells[0].strip("`").split()[1] for cells in rows(section(OPERATIONS, "Command line")) if "tokendepot " in cells[0]}
    assert listed == set(typer.main.get_command(app).commands)


@pytest.mark.parametrize("name", ["bench io", "bench ttft", "report"])
def test_the_table_of_a_benchmark_has_every_option_and_its_default(name: str) -> None:
    import typer.main
    from tokendepot.cli.commands import app

    command = typer.main.get_command(app)
    for word in name.split():
        command = command.commands[word]
    options = {parameter.opts[0]: parameter for parameter in command.params if parameter.opts[0].startswith("--")}
    listed = {cells[0].strip("`"): cells[1].strip("`") for cells in rows(section(TREE / "docs/bench.md", name))}
    assert {option for option in listed if option.startswith("--")} == options.keys() - {"--help"}
    for option in options.keys() - {"--help"}:
        known = options[option]
        default = known.show_default if isinstance(known.show_default, str) else known.default
        if known.show_default is False:
            shown = "required"
        elif default is False:
            shown = "off"
        elif default is None or default == "":
            shown = "none"
        else:
            shown = f"{default:g}" if isinstance(default, float) else str(default)
        assert listed[option] == shown, option


def test_the_table_of_exit_codes_has_every_code() -> None:
    from tokendepot import cli

    listed = {int(cells[0]) for cells in rows(section(OPERATIONS, "Command line")) if cells[0].isdigit()}
    assert listed == {0, cli.DAMAGED, cli.USAGE, cli.NOT_DONE, 130}


@documents
def test_no_path_of_somebody_s_machine_is_named(document: Path) -> None:
    places = re.findall(r"(?<![\w.*])/(?:tmp|work|home|root|mnt|Users)/\S*", document.read_text(encoding="utf-8"))
    assert places == []


# --- configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", [README, OPERATIONS], ids=lambda path: path.name)
def test_the_one_json_string_is_accepted(document: Path) -> None:
    strings = re.findall(r"--kv-transfer-config '([^'\n]+)'", document.read_text(encoding="utf-8"))
    assert strings
    for text in strings:
        config = json.loads(text)
        assert config["kv_load_failure_policy"] == "recompute"
        assert (TREE / "python" / config["kv_connector_module_path"].replace(".", "/")).is_dir()
        assert f"class {config['kv_connector']}(" in (VLLM / "connector.py").read_text(encoding="utf-8")
        connector_keys = literal(VLLM / "settings.py", "DEFAULTS")
        extra = {key: value for key, value in config["kv_connector_extra_config"].items() if key not in connector_keys}
        assert parse_options(json.dumps(extra))["roots"]


def test_the_table_of_engine_keys_is_what_the_engine_knows() -> None:
    assert set(table("Engine keys")) == known_keys("kTopKeys")


def test_the_table_of_root_keys_is_what_the_engine_knows() -> None:
    assert set(table("Root keys")) == known_keys("kRootKeys")


def test_the_table_of_connector_keys_is_what_the_connector_knows() -> None:
    listed = {key: json.loads(default) for key, default in table("Connector keys").items()}
    assert listed == literal(VLLM / "settings.py", "DEFAULTS")


def test_the_table_of_threads_names_those_of_a_depot() -> None:
    files = [*(TREE / "src").rglob("*.cc"), *(TREE / "src").rglob("*.h"), *(TREE / "python/src").glob("*.cc")]
    sources = "".join(file.read_text() for file in files if file.parent.name != "workload")
    started = set(re.findall(r'"(td-[^"]+)"', sources))
    assert len(started) > 10 and all(len(name) < 16 for name in started), "the system cuts longer ones off"
    assert set(re.findall(r"`(td-[^`]+)`", section(ARCHITECTURE, "Threads and ownership"))) == started


def test_choices_of_the_connector_are_all_listed() -> None:
    allowed = {cells[0].strip("`"): cells[2] for cells in rows(section(OPERATIONS, "Connector keys"))}
    for key, choices in literal(VLLM / "settings.py", "CHOICES").items():
        assert set(re.findall(r'"(\w+)"', allowed[key])) == set(choices), key


def test_engine_keys_are_accepted_and_default_to_what_the_table_says() -> None:
    effective = parse_options(json.dumps({"roots": ROOTS}))
    for key, default in table("Engine keys").items():
        if default != "required":
            assert parse_options(json.dumps({"roots": ROOTS, key: json.loads(default)})) == effective, key


def test_root_keys_are_accepted_and_default_to_what_the_table_says() -> None:
    root = {"path": "/dev/shm/depot", "capacity": "8GiB"}
    effective = parse_options(json.dumps({"roots": [root]}))
    for key, default in table("Root keys").items():
        if default != "required":
            assert parse_options(json.dumps({"roots": [{**root, key: json.loads(default)}]})) == effective, key
            continue
        assert key in root
        with pytest.raises(DepotError):
            parse_options(json.dumps({"roots": [{name: value for name, value in root.items() if name != key}]}))


def test_ranges_of_whole_numbers_are_those_of_the_engine() -> None:
    for cells in rows(section(OPERATIONS, "Engine keys")):
        bounds = re.fullmatch(r"(\d+) to (\d+)", cells[2])
        if bounds is None:
            continue
        least, most = map(int, bounds.groups())
        for value in (least, most):
            parse_options(json.dumps({"roots": ROOTS, cells[0].strip("`"): value}))
        for value in (least - 1, most + 1):
            with pytest.raises(DepotError):
                parse_options(json.dumps({"roots": ROOTS, cells[0].strip("`"): value}))


# --- metrics, messages, figures, words ---------------------------------------------------------------------------


def metrics() -> set[str]:
    kinds = (engine.COUNTERS.values(), engine.LABELLED.values(), engine.ROOT_METRICS.values())
    return {name for kind in kinds for name, *_ in kind}


def other_metrics() -> set[str]:
    """Histograms and gauges, whose names get nothing appended."""
    kinds = (engine.HISTOGRAMS, engine.GAUGES, engine.ROOT_GAUGES)
    return {name for kind in kinds for name, _ in kind.values()}


def metrics_of_roots() -> set[str]:
    return set(literal(TREE / "python/tokendepot/exporter.py", "METRICS"))


def metrics_of_events() -> set[str]:
    file = TREE / "python/tokendepot/publisher_metrics.py"
    prefix, counters, gauges = (literal(file, name) for name in ("PREFIX", "COUNTERS", "GAUGES"))
    return {f"{prefix}{name}_total" for name in counters} | {prefix + name for name in gauges}


@documents
def test_metrics_that_are_named_exist(document: Path) -> None:
    named = set(re.findall(r"\btokendepot_\w+", document.read_text(encoding="utf-8")))
    named -= {"tokendepot_root_", "tokendepot_sim"}  # a prefix, and a program
    counters = {f"{name}_total" for name in metrics()}
    # The log line of vLLM and the prose have counters without their ending, too.
    assert named <= counters | metrics() | other_metrics() | metrics_of_roots() | metrics_of_events()


def test_the_tables_of_metrics_and_reasons_are_complete() -> None:
    first = [cells[0].strip("`") for cells in rows(section(OPERATIONS, "Metrics"))]
    assert {name for name in first if name.startswith("tokendepot_")} == (
        {f"{name}_total" for name in metrics()} | other_metrics()
    )
    explained = {name for name in first if not name.startswith("tokendepot_")}
    assert explained == {*engine.REASONS, *engine.CAUSES}
    assert set(table("Metrics of roots")) == metrics_of_roots()
    of_events = {key for key in table("KV events") if key.startswith("tokendepot_")}
    assert of_events == metrics_of_events()


@pytest.mark.parametrize(
    "heading, column, least", [("When something is wrong", 1, 20), ("What is kept, and what is not", 2, 12)]
)
def test_log_lines_that_tables_quote_are_in_the_code(heading: str, column: int, least: int) -> None:
    """Each quotation is cut at what varies ("...", N, punctuation); every longer piece must be in some source."""
    sources = [*(TREE / "src").rglob("*.cc"), *(TREE / "python").rglob("*.py")]
    text = "\n".join(source.read_text(encoding="utf-8") for source in sources).replace('\\"', '"')
    text = re.sub(r'''["']\s*\n\s*f?["']''', "", text)  # joins literals that were broken over lines
    checked = 0
    for cells in rows(section(OPERATIONS, heading)):
        for quotation in re.findall(r"`([^`]+)`", cells[column]):
            for piece in re.split(r'"?\.\.\."?|N of M extents|\bN\b|[;()]|: ?', quotation):
                if len(piece.strip()) >= 10 and not piece.startswith("tokendepot_"):
                    checked += 1
                    assert piece.strip() in text, f"no source has the words {piece.strip()!r} of {quotation!r}"
    assert checked > least


def test_figures_of_the_benchmarks_are_printed_by_them() -> None:
    source = "".join(file.read_text(encoding="utf-8") for file in (TREE / "bench").glob("*_bench.cc"))
    source += "".join(file.read_text(encoding="utf-8") for file in (TREE / "bench/connector").glob("*.py"))
    printed = set(re.findall(r'print_result\("(\w+)"', source))
    assert '"disk_load_" + ' in source and '"disk_store_" + ' in source
    listed = {re.sub(r"`(.+?)`.*", r"\1", cells[0]) for cells in rows(BENCHMARKS.read_text(encoding="utf-8")) if cells[0].startswith("`")}
    disk = {name for name in listed if re.fullmatch(r"disk_(load_(1|2\.5|10)MiB_(1|8|32)|store_(1|2\.5|10)MiB_(8|32))", name)}
    assert listed - disk == printed
    assert len(disk) == 15


def test_terms_of_the_glossary_are_used_elsewhere_and_explained_once() -> None:
    terms = [cells[0].strip("*") for cells in rows(GLOSSARY.read_text(encoding="utf-8"))]
    assert len(terms) > 30 and len(terms) == len(set(terms))
    files = [*(TREE / "src").rglob("*.[hc]*"), *(TREE / "include").rglob("*.h"), *(TREE / "python").rglob("*.py"), *DOCUMENTS]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files if file != GLOSSARY)
    unused = [term for term in terms if not re.search(rf"(?<![A-Za-z]){term}(?![a-z])|(?<![A-Za-z]){term}(s|d|ed)\b", text, re.IGNORECASE)]
    assert unused == []


@pytest.mark.parametrize("command", ["replay", "plan"])
def test_the_tables_of_options_are_what_the_command_takes(command: str) -> None:
    import typer.main
    from tokendepot.cli.commands import app

    parameters = typer.main.get_command(app).commands[command].params
    known = {option for parameter in parameters for option in parameter.opts if option.startswith("--")} - {"--help"}
    bench = TREE / "docs/bench.md"
    listed = [cells[0].strip("`") for heading in (f"Options of {command}", "Options of both") for cells in rows(section(bench, heading))]
    assert sorted(listed) == sorted(known)
