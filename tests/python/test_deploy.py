"""What is in deploy/: accepted by Kubernetes' own schemas, by hadolint and by promtool, and true to what the package takes."""

import copy
import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import kubernetes_validate
import pytest
import typer.main
import yaml

from tokendepot import _core
from tokendepot.cli.commands import app

TREE = pathlib.Path(__file__).resolve().parents[2]
MANIFESTS = sorted((TREE / "deploy/kubernetes").glob("*.yaml"))
ENGINES = [file for file in MANIFESTS if file.name != "service.yaml"]
DOCKERFILE = TREE / "deploy/docker/Dockerfile"
SCRAPE = TREE / "deploy/prometheus/kubernetes-scrape.yml"
RELEASES = ("1.29", "1.37")  # the oldest that the pods' fields are tried with, and the newest that the validator has
ENGINE_MEMORY = 16 << 30  # of a vLLM without a depot: weights on their way to the GPU, tokenizer, page-locked slabs

manifests = pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
engines = pytest.mark.parametrize("file", ENGINES, ids=lambda file: file.name)


def documents(file):
    return list(yaml.safe_load_all(file.read_text(encoding="utf-8")))


def pod_of(file):
    (deployment,) = (document for document in documents(file) if document["kind"] == "Deployment")
    return deployment["spec"]["template"]["spec"]


def containers(pod):
    return {container["name"]: container for container in pod["containers"]}


def connector_config(container):
    args = container["args"]
    return json.loads(args[args.index("--kv-transfer-config") + 1])


def read_settings(extra):
    """The connector's own check of its configuration, without importing the connector (it needs a vLLM)."""
    file = TREE / "python/tokendepot/engines/vllm/settings.py"
    spec = importlib.util.spec_from_file_location("connector_settings", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass asks for it
    spec.loader.exec_module(module)
    return module.read_settings(extra)


def quantity(text):
    """Bytes of a Kubernetes quantity; its units are binary where they end in i."""
    return _core.parse_size(f"{text}B") if re.fullmatch(r"\d+[KMGT]i", text) else int(text)


def program(name):
    folders = [pathlib.Path(sys.executable).parent, pathlib.Path(sys.executable).parents[1] / "prometheus/usr/bin"]
    found = shutil.which(name, path=os.pathsep.join([os.environ["PATH"], *map(str, folders)]))
    if not found:
        pytest.skip(f"no {name} here: scripts/setup test")
    return found


# --- Kubernetes ---


@manifests
@pytest.mark.parametrize("release", RELEASES)
def test_manifests_have_only_fields_that_kubernetes_knows(file, release):
    for document in documents(file):
        kubernetes_validate.validate(document, release, strict=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda pod: pod["volumes"][0].update(emptydir={}),
        lambda pod: pod["containers"][0].update(livenesProbe={}),
        lambda pod: pod.update(terminationGracePeriodSeconds="90s"),
        lambda pod: pod["containers"][0].pop("name"),
        lambda pod: pod["containers"][0]["securityContext"].update(capabilities={"drop": "ALL"}),
    ],
    ids=["misspelt volume", "misspelt probe", "wrong type", "missing name", "no list"],
)
def test_a_wrong_field_of_a_pod_is_found(change):
    (deployment,) = copy.deepcopy(documents(TREE / "deploy/kubernetes/memory.yaml"))
    change(deployment["spec"]["template"]["spec"])
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, RELEASES[0], strict=True)


@engines
def test_the_connector_takes_the_configuration_and_its_roots_lie_on_the_volume(file):
    pod = pod_of(file)
    engine = containers(pod)["vllm"]
    config = connector_config(engine)
    assert config["kv_load_failure_policy"] == "recompute"
    assert config["kv_connector"] == "TokendepotConnector"
    (mount,) = (mount["mountPath"] for mount in engine["volumeMounts"] if mount["name"] == "depot")
    paths = read_settings(config["kv_connector_extra_config"]).root_paths
    assert paths and all(pathlib.PurePath(mount) in pathlib.PurePath(path).parents for path in paths)


@engines
def test_sizes_fit_together(file):
    pod = pod_of(file)
    engine = containers(pod)["vllm"]
    options = _core.parse_options(json.dumps(connector_config(engine)["kv_connector_extra_config"]))
    needed = sum(root["capacity"] for root in options["roots"]) + options["free_space_reserve"]
    memory_volumes = 0
    for volume in pod["volumes"]:
        empty = volume.get("emptyDir", {})
        if volume["name"] == "depot" and empty:
            assert needed < quantity(empty["sizeLimit"])
        if empty.get("medium") == "Memory":
            memory_volumes += quantity(empty["sizeLimit"])
    for claim in (document for document in documents(file) if document["kind"] == "PersistentVolumeClaim"):
        assert needed < quantity(claim["spec"]["resources"]["requests"]["storage"])
    for container in pod["containers"]:
        resources = container["resources"]
        assert resources["requests"]["memory"] == resources["limits"]["memory"]
    assert memory_volumes + ENGINE_MEMORY <= quantity(engine["resources"]["limits"]["memory"])


@engines
def test_the_exporter_is_started_by_options_that_exist_on_the_root_of_the_engine(file):
    pod = pod_of(file)
    exporter = containers(pod)["depot-metrics"]
    (script,) = exporter["args"]
    words = shlex.split(script.partition("exec ")[2])
    assert words[:2] == ["tokendepot", "metrics"]
    command = typer.main.get_command(app).commands["metrics"]
    parsed = command.make_context("metrics", words[2:]).params
    assert parsed["roots"] == connector_config(containers(pod)["vllm"])["kv_connector_extra_config"]["roots"]
    assert [parsed["port"]] == [port["containerPort"] for port in exporter["ports"]]
    assert f"[ -e {parsed['roots'][0].partition('?')[0]}/DEPOT ]" in script


@engines
def test_both_containers_run_as_the_user_whom_the_image_has_a_name_for(file):
    pod = pod_of(file)
    uid = pod["securityContext"]["runAsUser"]
    assert f"useradd --uid {uid} " in DOCKERFILE.read_text(encoding="utf-8")
    assert pod["securityContext"]["runAsNonRoot"]
    for container in pod["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["image"] in DOCKERFILE.read_text(encoding="utf-8")


@engines
def test_ports_are_those_of_the_service_the_probes_and_the_scrape_configuration(file):
    pod = pod_of(file)
    names = {port["name"] for container in pod["containers"] for port in container["ports"]}
    (service,) = documents(TREE / "deploy/kubernetes/service.yaml")
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= names
    engine = containers(pod)["vllm"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert engine[probe]["httpGet"]["port"] in names
    rules = yaml.safe_load(SCRAPE.read_text(encoding="utf-8"))["scrape_configs"][0]["relabel_configs"]
    kept = {rule["source_labels"][0]: rule["regex"] for rule in rules if rule.get("action") == "keep"}
    assert set(kept["__meta_kubernetes_pod_container_port_name"].split("|")) == names
    (deployment,) = (document for document in documents(file) if document["kind"] == "Deployment")
    label = deployment["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/name"]
    assert label == kept["__meta_kubernetes_pod_label_app_kubernetes_io_name"]
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]


def test_the_scrape_configuration_is_one_for_prometheus(tmp_path):
    """All but its discovery, which Debian's Prometheus is built without."""
    config = yaml.safe_load(SCRAPE.read_text(encoding="utf-8"))
    (job,) = config["scrape_configs"]
    assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    check = [program("promtool"), "check", "config", tmp_path / "prometheus.yml"]
    done = subprocess.run(check, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# --- the image ---


def lint(text):
    return subprocess.run([program("hadolint"), "-"], input=text, capture_output=True, text=True, timeout=60)


def test_hadolint_finds_nothing_in_the_dockerfile():
    done = lint(DOCKERFILE.read_text(encoding="utf-8"))
    assert done.returncode == 0, done.stdout


def test_hadolint_finds_what_is_wrong():
    assert lint(DOCKERFILE.read_text(encoding="utf-8").replace("COPY . .", "CPOY . .")).returncode != 0


def test_the_build_has_every_library_that_setup_installs():
    setup = (TREE / "scripts/setup").read_text(encoding="utf-8")
    libraries = set(re.findall(r"\b(?:lib|nlohmann)[\w.-]+-dev\b", re.search(r"apt_build=\((.*?)\)", setup, re.DOTALL)[1]))
    assert len(libraries) >= 5
    build = DOCKERFILE.read_text(encoding="utf-8").partition("AS build")[2].partition("FROM")[0]
    assert libraries <= set(build.split())
