"""deploy/kubernetes: valid for Kubernetes' own schemas, whole in itself, and true about what the containers run.

No cluster is here: what a cluster makes of it isn't tested.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dagster import DagsterRun
from dagster._core.code_pointer import CodePointer
from dagster._core.instance.ref import InstanceRef
from dagster._core.origin import JobPythonOrigin, RepositoryPythonOrigin

from assets.metadata import DOCS_URL
from assets.webhook import UI, WEBHOOK
from refrag_platform.processes import free_port
from refrag_platform.project import Project
from refrag_platform.serving import bento
from refrag_platform.serving.guard import OnlyHealth
from refrag_platform.serving.settings import VARIABLES
from tests.conftest import ROOT
from tests.kustomize import Resource, containers, render
from tests.planted import run
from tests.processes import running, wait_for

DEPLOY = ROOT / "deploy"
OVERLAYS = DEPLOY / "kubernetes" / "overlays"
PAGE = ROOT / "docs" / "kubernetes.md"
OLDEST, NEWEST = "1.29", "1.37"
WORKLOADS = {"Deployment", "StatefulSet"}


@pytest.fixture(params=["cpu", "gpu"])
def overlay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def resources(overlay: str) -> list[Resource]:
    return render(OVERLAYS / overlay)


def one(resources: list[Resource], kind: str, name: str) -> Resource:
    (resource,) = (each for each in resources if (each["kind"], each["metadata"]["name"]) == (kind, name))
    return resource


def pod_of(workload: Resource) -> Resource:
    pod: Resource = workload["spec"]["template"]["spec"]
    return pod


def container(resources: list[Resource], name: str) -> Resource:
    (match,) = (each for each in containers(resources) if each["name"] == name)
    return match


def instance_file(resources: list[Resource]) -> dict[str, Any]:
    return yaml.safe_load(one(resources, "ConfigMap", "dagster-instance")["data"]["dagster.yaml"])


def values(tree: Any, key: str) -> Iterator[Any]:
    """All values of a key, however deep."""
    if isinstance(tree, dict):
        yield from ([tree[key]] if key in tree else [])
        tree = list(tree.values())
    if isinstance(tree, list):
        for each in tree:
            yield from values(each, key)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_resource_is_valid_for_kubernetes(resources: list[Resource], version: str) -> None:
    schemas = pytest.importorskip("kubernetes_validate", reason="the extra `dev` is not installed")
    for resource in resources:
        assert schemas.validate(resource, version, strict=True) == version
        assert resource["kind"] == "Namespace" or resource["metadata"]["namespace"] == "refrag"
    with pytest.raises(schemas.ValidationError):
        schemas.validate({**resources[-1], "spce": {}}, version, strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl on this machine")
def test_kubectl_renders_the_same(resources: list[Resource], overlay: str) -> None:
    result = subprocess.run(["kubectl", "kustomize", OVERLAYS / overlay], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"kubectl can't be used here: {result.stderr}")

    def ordered(rendered: list[Resource]) -> list[Resource]:
        return sorted(rendered, key=lambda resource: (resource["kind"], resource["metadata"]["name"]))

    assert ordered(list(yaml.safe_load_all(result.stdout))) == ordered(resources)


def test_what_resources_name_is_there_or_made_as_the_page_says(resources: list[Resource]) -> None:
    there = {(each["kind"], each["metadata"]["name"]) for each in resources}
    there |= {("Secret", name) for name in re.findall(r"create secret generic (\S+)", PAGE.read_text())}
    named = {("ServiceAccount", name) for name in values(resources, "serviceAccountName")}
    named |= {("PersistentVolumeClaim", each["claimName"]) for each in values(resources, "persistentVolumeClaim")}
    for key in ("configMap", "configMapRef"):
        named |= {("ConfigMap", each["name"]) for each in values(resources, key)}
    named |= {("Secret", each["secretName"]) for each in values(resources, "secret")}
    for key in ("secretRef", "secretKeyRef"):
        named |= {("Secret", each["name"]) for each in values(resources, key)}
    launcher = instance_file(resources)["run_launcher"]["config"]
    named |= {("Secret", name) for name in launcher["env_secrets"]}
    named |= {("ConfigMap", name) for name in [*launcher["env_config_maps"], launcher["instance_config_map"]]}
    named |= {("PersistentVolumeClaim", each["claimName"]) for each in values(launcher, "persistentVolumeClaim")}
    named.add(("ServiceAccount", launcher["service_account_name"]))
    assert launcher["job_namespace"] == "refrag"
    assert named <= there, sorted(named - there)
    assert not [each for each in resources if each["kind"] == "Secret"], "secrets are nowhere in the repository"


def test_services_and_their_like_find_their_pods(resources: list[Resource]) -> None:
    workloads = [each for each in resources if each["kind"] in WORKLOADS]
    labels = {each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"] for each in workloads}
    for workload in workloads:
        assert workload["spec"]["selector"]["matchLabels"].items() <= labels[workload["metadata"]["name"]].items()
    services = [each for each in resources if each["kind"] == "Service"]
    for service in services:
        (pod,) = (
            pod_of(each)
            for each in workloads
            if service["spec"]["selector"].items() <= labels[each["metadata"]["name"]].items()
        )
        ports = {port["name"]: port["containerPort"] for each in pod["containers"] for port in each["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} == set(ports)
    budget = one(resources, "PodDisruptionBudget", "refrag")["spec"]
    assert budget["selector"]["matchLabels"].items() <= labels["refrag"].items()
    scaler = one(resources, "HorizontalPodAutoscaler", "refrag")["spec"]
    assert scaler["minReplicas"] > budget["minAvailable"], "a node could never be emptied"
    (location,) = yaml.safe_load(one(resources, "ConfigMap", "dagster-instance")["data"]["workspace.yaml"])["load_from"]
    code = one(resources, "Service", location["grpc_server"]["host"])
    assert [port["port"] for port in code["spec"]["ports"]] == [location["grpc_server"]["port"]]


def test_commands_are_those_of_the_compose_file_which_other_tests_run(resources: list[Resource]) -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    mounted = {"deploy/workspace.yaml": "/etc/dagster/workspace.yaml"}
    for name in ("webserver", "daemon", "docs", "code"):
        words = compose[name]["command"].split()
        assert container(resources, name)["args"] == [mounted.get(word, word) for word in words]
    commands = [each["args"] for each in containers(resources) if "args" in each]
    commands += [each["command"] for each in values(resources, "exec")]
    for program, *words in commands:
        assert (Path(sys.executable).parent / program).exists() or shutil.which(program), program
        assert program != "python" or importlib.util.find_spec(words[1])
    names = {each["image"] for each in containers(resources)}
    runs = one(resources, "ConfigMap", "dagster-runs")["data"]["DAGSTER_CONTAINER_IMAGE"]
    assert names == {runs} and ":" in runs


def test_the_checkout_is_cloned_once_whole_and_beside_what_lies_in_the_volume(
    resources: list[Resource], repository: Project, tmp_path: Path
) -> None:
    *shell, script = container(resources, "checkout")["command"]
    volume = tmp_path / "volume"
    # Of the service's pods, which may be first, and of a clone that was killed.
    for folder in (".bentoml/bentos", ".clone/.git/objects"):
        (volume / folder).mkdir(parents=True)

    def clone() -> str:
        environment = os.environ | {"GIT_URL": str(repository.root)}
        subprocess.run([*shell, script.replace("/project", str(volume))], env=environment, check=True)
        return run(volume, "git", "status", "--porcelain", "--untracked-files=no", "--branch")

    assert clone().count("\n") == 1 and not (volume / ".clone").exists()
    assert (volume / "params.yaml").read_text() == (repository.root / "params.yaml").read_text()
    run(volume, "git", "pull")
    (volume / "params.yaml").write_text("changed")
    assert " M params.yaml" in clone()


def test_the_service_s_pods_run_the_service_as_it_is(resources: list[Resource]) -> None:
    served, live = pod_of(one(resources, "Deployment", "refrag")), pod_of(one(resources, "StatefulSet", "refrag-live"))
    (each,) = served["containers"]
    assert each["args"][1:] == bento.serve_command("$(BENTO)", each["ports"][0]["containerPort"], "0.0.0.0")[3:]
    paths = {each[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert paths == {"/readyz", "/livez"} <= OnlyHealth.PATHS
    environment = {variable["name"]: variable["value"] for variable in each["env"]}
    assert re.fullmatch(r"refrag-[a-z0-9.-]+:[0-9a-f]{16}", environment["BENTO"])
    mounts = {mount["mountPath"]: mount for mount in each["volumeMounts"]}
    home = environment["BENTOML_HOME"]
    assert all(mounts[f"{home}/{kind}"]["readOnly"] for kind in ("bentos", "models"))
    assert any(environment["REFRAG_API_KEYS_FILE"].startswith(f"{path}/") for path in mounts)
    assert "REFRAG_STORE" not in environment, "a working copy has one process"
    assert served["terminationGracePeriodSeconds"] >= 315  # the deadline, and preStop

    (writer,) = live["containers"]
    assert {variable["name"] for variable in writer["env"]} - set(environment) == {"REFRAG_STORE"}
    writer["env"] = [variable for variable in writer["env"] if variable["name"] != "REFRAG_STORE"]
    writer["volumeMounts"] = [mount for mount in writer["volumeMounts"] if mount["name"] != "live"]
    del served["topologySpreadConstraints"]
    assert served == live
    one_writer = one(resources, "StatefulSet", "refrag-live")["spec"]
    assert one_writer["replicas"] == 1
    assert one_writer["volumeClaimTemplates"][0]["spec"]["accessModes"] == ["ReadWriteOncePod"]


def test_variables_are_those_that_programs_read(resources: list[Resource]) -> None:
    from dagster._cli.code_server import start_command

    known = VARIABLES | {"REFRAG_LOG", UI, DOCS_URL, WEBHOOK}
    known |= {str(parameter.envvar) for parameter in start_command.params if getattr(parameter, "envvar", None)}
    # Of BentoML, Python and the two containers that name their own in their command.
    known |= {"BENTOML_HOME", "PYTHONPATH", "BENTO", "GIT_URL"}
    names = {variable["name"] for each in containers(resources) for variable in each.get("env", ())}
    for name in ("dagster-addresses", "dagster-runs"):
        names |= set(one(resources, "ConfigMap", name)["data"])
    assert names <= known, sorted(names - known)
    assert 'environ.get("REFRAG_LOG")' in (ROOT / "refrag_platform" / "serving" / "site.py").read_text()
    asked = {name for name in values(instance_file(resources)["storage"], "env")}
    assert asked == set(re.findall(r"^ *(REFRAG_PG_[A-Z]+)=", PAGE.read_text(), re.MULTILINE))


def test_the_instance_is_the_team_s_with_another_launcher(resources: list[Resource]) -> None:
    team, here = yaml.safe_load((DEPLOY / "dagster.postgres.yaml").read_text()), instance_file(resources)
    assert (here["run_launcher"].pop("class"), team.pop("run_launcher")["class"]) == (
        "K8sRunLauncher",
        "WatchedRunLauncher",
    )
    del here["run_launcher"]
    assert here["run_monitoring"].pop("start_timeout_seconds") > 600
    assert here == team


def test_a_run_s_job_has_the_device_and_the_project(
    resources: list[Resource], overlay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schemas = pytest.importorskip("kubernetes_validate", reason="the extra `dev` is not installed")
    launcher_module = pytest.importorskip("dagster_k8s.launcher", reason="the extra `kubernetes` is not installed")
    from kubernetes.client import ApiClient

    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump(instance_file(resources)))
    monkeypatch.setattr(launcher_module, "load_kubernetes_config", lambda **where: None)  # no cluster is here
    launcher = InstanceRef.from_dir(str(tmp_path)).run_launcher
    code = one(resources, "ConfigMap", "dagster-runs")["data"]
    image, context = code["DAGSTER_CONTAINER_IMAGE"], json.loads(code["DAGSTER_CONTAINER_CONTEXT"])
    pointer = CodePointer.from_module("assets.definitions", "defs", None)
    origin = RepositoryPythonOrigin("python", pointer, container_image=image, container_context=context)
    container_context = launcher.get_container_context_for_run(
        DagsterRun(job_name="retraining", job_code_origin=JobPythonOrigin("retraining", origin))
    )
    made = launcher_module.construct_dagster_k8s_job(
        job_config=container_context.get_k8s_job_config(job_image=image, run_launcher=launcher),
        args=["dagster", "api", "execute_run"],
        job_name="run",
        pod_name="run",
        component="run_worker",
        user_defined_k8s_config=container_context.run_k8s_config,
    )
    job = ApiClient().sanitize_for_serialization(made)
    assert schemas.validate(job, NEWEST, strict=True)
    pod = pod_of(job)
    (run,) = pod["containers"]
    assert run["image"] == image and run["resources"]["requests"]["cpu"]
    assert run["resources"]["limits"].get("nvidia.com/gpu") == ("1" if overlay == "gpu" else None)
    assert bool(pod.get("tolerations")) == (overlay == "gpu")
    mounts = {mount["mountPath"] for mount in run["volumeMounts"]}
    assert mounts == {"/project", "/dagster", "/dagster/dagster.yaml", "/dev/shm"}
    assert {each["secretRef"]["name"] for each in run["envFrom"] if "secretRef" in each} == {
        "refrag-postgres",
        "refrag-s3",
    }
    assert pod["terminationGracePeriodSeconds"] > 120 and pod["securityContext"]["runAsUser"] == 1000


def test_service_pods_ask_for_the_device_of_their_overlay(resources: list[Resource], overlay: str) -> None:
    asked = {name: container(resources, name)["resources"]["limits"] for name in ("code", "webserver", "daemon")}
    assert not any("nvidia.com/gpu" in limits for limits in asked.values()), "stages run in Jobs"
    for kind, name in (("Deployment", "refrag"), ("StatefulSet", "refrag-live")):
        (each,) = pod_of(one(resources, kind, name))["containers"]
        assert each["resources"]["limits"].get("nvidia.com/gpu") == ("1" if overlay == "gpu" else None)


def test_no_pod_may_do_more_than_it_must(resources: list[Resource]) -> None:
    for workload in (each for each in resources if each["kind"] in WORKLOADS):
        assert pod_of(workload)["securityContext"]["runAsNonRoot"]
    for each in containers(resources):
        assert each["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    (rules,) = (each["rules"] for each in resources if each["kind"] == "Role")
    assert not any("*" in rule["verbs"] + rule["resources"] or "secrets" in rule["resources"] for rule in rules)


@pytest.mark.slow
def test_the_code_location_answers_its_probe_and_tells_what_runs_ask_for(planted: Project, tmp_path: Path) -> None:
    grpc = pytest.importorskip("grpc")
    from dagster._grpc.client import DagsterGrpcClient
    from dagster._grpc.types import ListRepositoriesResponse
    from dagster._serdes import deserialize_value
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    resources = render(OVERLAYS / "gpu")
    code, port = container(resources, "code"), free_port()
    probe = code["startupProbe"]["grpc"]
    program, *words = (str(port) if word == str(probe["port"]) else word for word in code["args"])
    command, log = [str(Path(sys.executable).parent / program), *words], tmp_path / "code.log"
    runs = one(resources, "ConfigMap", "dagster-runs")["data"]

    def healthy() -> bool:
        request = health_pb2.HealthCheckRequest(service=probe["service"])
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
            except grpc.RpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    with running(command, log, planted.root, PYTHONPATH=str(planted.root), **runs):
        wait_for(healthy, 180, log)
        client = DagsterGrpcClient(host="127.0.0.1", port=port)
        told = deserialize_value(client.list_repositories(), ListRepositoriesResponse)
    assert told.container_image == runs["DAGSTER_CONTAINER_IMAGE"]
    assert told.container_context == json.loads(runs["DAGSTER_CONTAINER_CONTEXT"])
