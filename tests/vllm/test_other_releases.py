"""vLLM releases that the connector was not made for: one sentence, and the engine runs without the depot."""

from __future__ import annotations

import os
import subprocess
import sys
from abc import abstractmethod
from pathlib import Path

import pytest
import vllm
from tokendepot.engines.vllm import bystander, connector

from tiny_model import write_configuration

HERE = Path(__file__).parent
V1 = "distributed/kv_transfer/kv_connector/v1"
NAMES = {"base": ("SupportsHMA", "KVConnectorWorkerMetadata"), "metrics": ("KVConnectorPromMetrics",)}
ENGINE = """
import json, sys
from harness import Engine, Options  # before vLLM: it sets the environment
from lab import LENGTH, PROMPTS
model, root = sys.argv[1:]
print("TEXT " + json.dumps(Engine(model, Options(root=root, hybrid=True)).run(PROMPTS, LENGTH)))
try:
    Engine(model, Options(root=root, hybrid=True, extra={"on_error": "fail"}))
except Exception as error:
    print(f"FAIL {type(error).__name__}: {error}")
"""


def release(tree: Path, version: str, modules: dict[str, str]) -> Path:
    """The installed vLLM under another version and with other modules, as links; returns what belongs on PYTHONPATH."""
    modules = {"_version.py": f"__version__ = '{version}'\n__version_tuple__ = (9, 9)\n", **modules}
    installed = Path(vllm.__file__).parent
    for name in modules:
        for folder in [Path(name).parent, *Path(name).parent.parents]:
            (tree / "vllm" / folder).mkdir(parents=True, exist_ok=True)
    for folder in [path for path in (tree / "vllm").rglob("*") if path.is_dir()] + [tree / "vllm"]:
        for entry in (installed / folder.relative_to(tree / "vllm")).iterdir():
            if entry.name != "__pycache__" and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    for name, text in modules.items():
        (tree / "vllm" / name).unlink(missing_ok=True)
        (tree / "vllm" / name).write_text(text)
    return tree


def moved(names: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """Modules of v1 that have these names elsewhere; vLLM itself knows where."""
    modules = {}
    for file in (Path(vllm.__file__).parent / V1).glob("*.py"):
        text = file.read_text()
        for module in names:
            text = text.replace(f"v1.{module} import", f"v1.new_{module} import")
        modules[f"{V1}/{file.name}"] = text
    for module, gone in names.items():
        modules[f"{V1}/new_{module}.py"] = modules[f"{V1}/{module}.py"]
        modules[f"{V1}/{module}.py"] = (
            f"from vllm.{V1.replace('/', '.')} import new_{module} as new\n"
            f"globals().update((k, v) for k, v in vars(new).items() if k[:2] != '__' and k not in {gone!r})\n"
        )
    return modules


def python(tree: Path | None, code: str, *arguments: str) -> str:
    """What it prints on both streams."""
    path = [str(tree)] if tree else []
    known = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join([*path, str(HERE), *known])),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def of(kind: str, output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith(kind)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return write_configuration(tmp_path_factory.mktemp("other-releases") / "model")


@pytest.fixture(scope="module")
def text(model, tmp_path_factory) -> str:
    """What an engine of the installed vLLM writes, with a depot."""
    output = python(None, ENGINE, model, str(tmp_path_factory.mktemp("roots") / "root"))
    assert "not used" not in output, output
    return of("TEXT", output)[0]


@pytest.mark.parametrize(
    "version, reason",
    [
        ("0.19.1", "vLLM 0.19.1 is not supported: tokendepot serves 0.20 to 0.33"),
        (
            "0.47.0",
            "vLLM 0.47.0 does not fit tokendepot, which serves 0.20 to 0.33: cannot import name "
            "'KVConnectorWorkerMetadata'",
        ),
    ],
)
def test_a_release_that_lacks_names_of_the_connector_runs_without_the_depot(version, reason, model, text, tmp_path) -> None:
    tree = release(tmp_path / "site", version, moved(NAMES))
    output = python(tree, ENGINE, model, str(tmp_path / "root"))
    assert of("TEXT", output) == [text], output
    said = [line for line in output.splitlines() if "tokendepot: not used" in line]
    assert len(said) == 2 and all(reason in line for line in said), output  # scheduler and worker
    (failed,) = of("FAIL", output)
    assert failed.startswith(f"FAIL RefusedError: tokendepot cannot serve this engine: {reason}"), failed
    assert "Traceback" not in output and not (tmp_path / "root").exists(), output


def test_a_release_without_any_base_class_gets_one_sentence(tmp_path) -> None:
    base, gone = "distributed/kv_transfer/kv_connector/base.py", "raise ImportError('went away')\n"
    tree = release(tmp_path, "0.47.0", {f"{V1}/base.py": gone, f"{V1}/__init__.py": "", base: gone})
    (said,) = of(
        "SAID",
        python(
            tree,
            "try:\n    import tokendepot.engines.vllm\nexcept ImportError as error:\n    print('SAID', error)",
        ),
    )
    assert "vLLM 0.47.0 does not fit tokendepot, which serves 0.20 to 0.33: went away; nor can the engine run" in said


def test_without_vllm_the_package_says_what_it_is_for() -> None:
    code = (
        "import sys\nsys.modules['vllm'] = None\n"
        "try:\n    import tokendepot.engines.vllm\nexcept ImportError as error:\n    print('SAID', error)"
    )
    assert of("SAID", python(None, code)) == ["SAID tokendepot.engines.vllm needs vLLM 0.20 to 0.33; none is installed"]


def test_a_newer_release_is_used_as_long_as_it_fits(monkeypatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.47.0")
    assert bystander.connector_class() is connector.TokendepotConnector

    class Wanting(connector.TokendepotConnector):
        @abstractmethod
        def a_new_hook(self) -> None: ...

    monkeypatch.setattr(connector, "TokendepotConnector", Wanting)
    stands_in = bystander.connector_class()
    assert not issubclass(stands_in, Wanting)
    reasons: list[str] = []
    monkeypatch.setattr(bystander, "bystander", reasons.append)
    bystander.connector_class()
    assert reasons == [
        "vLLM 0.47.0 does not fit tokendepot, which serves 0.20 to 0.33: "
        "it wants hooks that the connector does not have: a_new_hook"
    ]


def test_a_base_class_of_another_shape_is_stood_in_for(monkeypatch) -> None:
    """Two arguments, hooks of other names, no interface for several groups."""

    class Old(bystander.abc.ABC):
        def __init__(self, vllm_config, role) -> None:
            self.role = role

        @abstractmethod
        def some_hook(self, blocks) -> int: ...

        @property
        @abstractmethod
        def some_value(self) -> int: ...

    monkeypatch.setattr(bystander, "_found", lambda *names: Old if "KVConnectorBase_V1" in names else None)
    transfer = type("Transfer", (), {"kv_connector_extra_config": None})
    made = bystander.bystander("because")(type("Config", (), {"kv_transfer_config": transfer}), "a role")
    assert made.role == "a role" and made.some_hook([1]) is None and made.some_value is None
    assert made.get_num_new_matched_tokens(None, 0) == (0, False) and made.request_finished(None, []) == (False, None)
