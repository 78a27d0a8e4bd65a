"""What deploy/ holds: the instance on a real PostgreSQL, one device for all runs, pinned images, no secrets."""

import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from dagster import AssetKey, DagsterInstance, DagsterRunStatus
from dagster_graphql import DagsterGraphQLClient

from assets.materialize import materialize_all
from refrag_platform.artifacts.manifest import published
from refrag_platform.processes import free_port
from refrag_platform.project import Project
from refrag_platform.quality.results import DOCS_FOLDER
from tests.assets.conftest import FIRST_TWO, MODEL, plant_stage
from tests.conftest import ROOT
from tests.processes import answers, running, wait_for

DEPLOY = ROOT / "deploy"
SQLITE = ROOT / ".dagster_home" / "dagster.yaml"
SECRETS = {
    "REFRAG_PG_HOST": "127.0.0.1",
    "REFRAG_PG_USER": "refrag",
    "REFRAG_PG_PASSWORD": "not-so-secret",
    "REFRAG_PG_DATABASE": "postgres",
}


def programs() -> Path | None:
    """The folder of initdb and pg_ctl: on the path, else Debian's newest."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    folders = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    return max((path.parent for path in folders), key=lambda path: int(path.parent.name), default=None)


def as_postgres(*command: str | Path) -> None:
    """Run a program as a user whom PostgreSQL accepts, which root is not."""
    prefix = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    # A server that inherits a pipe keeps it open.
    with tempfile.TemporaryFile("w+") as output:
        status = subprocess.call([*prefix, *map(str, command)], cwd="/", stdout=output, stderr=subprocess.STDOUT)
        output.seek(0)
        assert status == 0, output.read()


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    """A PostgreSQL of this test's own; yields its port."""
    folder = programs()
    if folder is None:
        pytest.skip("no PostgreSQL on this machine: initdb is neither on the path nor in /usr/lib/postgresql/*/bin")
    pytest.importorskip("dagster_postgres", reason="the extra `postgres` is not installed")
    # Not among pytest's own folders, which only root may enter if root runs the tests.
    with tempfile.TemporaryDirectory(prefix="refrag-postgres-") as home:
        Path(home).chmod(0o755)
        data, password = Path(home) / "data", Path(home) / "password"
        data.mkdir()
        password.write_text(SECRETS["REFRAG_PG_PASSWORD"])
        if os.geteuid() == 0:
            try:
                owner = pwd.getpwnam("postgres")
            except KeyError:
                pytest.skip("this is root, whom PostgreSQL refuses, and there is no user `postgres`")
            os.chown(data, owner.pw_uid, owner.pw_gid)
        port = free_port()
        user = f"--username={SECRETS['REFRAG_PG_USER']}"
        as_postgres(folder / "initdb", user, "--auth=scram-sha-256", f"--pwfile={password}", "--no-sync", "-D", data)
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
        as_postgres(folder / "pg_ctl", "-D", data, "-w", "-o", options, "-l", data / "log", "start")
        try:
            yield port
        finally:
            as_postgres(folder / "pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")


@pytest.fixture
def team(server: int, planted: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[DagsterInstance]:
    """The instance of deploy/dagster.postgres.yaml."""
    shutil.copy(DEPLOY / "dagster.postgres.yaml", planted.root / ".dagster_home" / "dagster.yaml")
    for name, value in {**SECRETS, "REFRAG_PG_PORT": str(server)}.items():
        monkeypatch.setenv(name, value)
    with DagsterInstance.get() as instance:
        yield instance


@pytest.mark.slow
def test_runs_and_their_events_are_kept_in_postgresql(planted: Project, team: DagsterInstance) -> None:
    assert "Postgres" in type(team.event_log_storage).__name__ and "Postgres" in type(team.run_storage).__name__
    assert materialize_all(MODEL, ["corpus"])
    plant_stage(planted, "corpus", "raise ValueError('no such text')")
    assert not materialize_all(MODEL, ["corpus"])
    with DagsterInstance.get() as another:
        statuses = [run.status for run in another.get_runs()]
        assert statuses == [DagsterRunStatus.FAILURE, DagsterRunStatus.SUCCESS]
        event = another.get_latest_materialization_event(AssetKey("corpus"))
    assert event is not None and event.asset_materialization is not None
    assert event.asset_materialization.partition == MODEL
    assert not list((planted.root / ".dagster_home").rglob("*.db")), "nothing is in SQLite"


@pytest.fixture
def composed(planted: Project, team: DagsterInstance, tmp_path: Path) -> Iterator[dict[str, int]]:
    """What the compose file starts of this program, by its own commands, on ports of this machine; yields these."""
    ports = {name: free_port() for name in ("code", "webserver", "docs")}
    workspace = yaml.safe_load((DEPLOY / "workspace.yaml").read_text())
    workspace["load_from"][0]["grpc_server"] |= {"host": "127.0.0.1", "port": ports["code"]}
    (tmp_path / "workspace.yaml").write_text(yaml.safe_dump(workspace))
    here = {"4000": str(ports["code"]), "3001": str(ports["webserver"]), "3002": str(ports["docs"])}
    here |= {"deploy/workspace.yaml": str(tmp_path / "workspace.yaml"), "0.0.0.0": "127.0.0.1"}
    folder = Path(sys.executable).parent

    def as_here(words: list[str]) -> list[str]:
        return [str(folder / words[0]), *(here.get(word, word) for word in words[1:])]

    with ExitStack() as started:

        def start(name: str) -> None:
            command, log = as_here(services()[name]["command"].split()), tmp_path / f"{name}.log"
            started.enter_context(running(command, log, planted.root, PYTHONPATH=str(planted.root)))

        start("code")
        healthy = as_here(services()["code"]["healthcheck"]["test"][1:])
        wait_for(lambda: not subprocess.run(healthy, capture_output=True).returncode, 180, tmp_path / "code.log")
        for name in ("webserver", "daemon", "docs"):
            start(name)
        url = f"http://127.0.0.1:{ports['webserver']}/server_info"
        wait_for(lambda: answers(url), 180, tmp_path / "webserver.log")
        yield ports


@pytest.mark.slow
def test_the_commands_of_the_compose_file_make_a_deployment(
    planted: Project, team: DagsterInstance, composed: dict[str, int]
) -> None:
    client = DagsterGraphQLClient("127.0.0.1", port_number=composed["webserver"])
    run = client.submit_job_execution(
        "refrag_pipeline", tags={"dagster/partition": MODEL}, asset_selection=list(FIRST_TWO)
    )
    ended = {DagsterRunStatus.SUCCESS, DagsterRunStatus.FAILURE}
    wait_for(lambda: team.get_run_by_id(run).status in ended, 300)  # type: ignore[union-attr]
    found = team.get_run_by_id(run)
    assert found is not None and found.status is DagsterRunStatus.SUCCESS
    assert all(published(planted, stage, MODEL) for stage in FIRST_TWO)
    page = (planted.stage_dir("corpus", MODEL) / DOCS_FOLDER / "index.html").relative_to(planted.root)
    assert answers(f"http://127.0.0.1:{composed['docs']}/{page.as_posix()}")


def test_one_device_is_given_to_one_stage_at_a_time_on_postgresql(team: DagsterInstance) -> None:
    take_turns(team)


def test_one_device_is_given_to_one_stage_at_a_time(planted: Project, instance: DagsterInstance) -> None:
    take_turns(instance)


def take_turns(instance: DagsterInstance) -> None:
    """Two runs want the pool's one slot: the second has it as soon as the first is gone, however it went."""
    storage = instance.event_log_storage
    storage.initialize_concurrency_limit_to_default("gpu")
    first, second = (storage.claim_concurrency_slot("gpu", run, "cpt") for run in ("first", "second"))
    assert (first.is_claimed, second.is_claimed) == (True, False)
    storage.free_concurrency_slots_for_run("first")
    assert storage.claim_concurrency_slot("gpu", "second", "cpt").is_claimed
    storage.free_concurrency_slots_for_run("second")


def test_a_model_has_one_run_at_a_time_and_others_wait(planted: Project, instance: DagsterInstance) -> None:
    queue = instance.get_concurrency_config().run_queue_config
    assert queue is not None and queue.max_concurrent_runs == 2
    assert queue.tag_concurrency_limits == [
        {"key": "dagster/partition", "value": {"applyLimitPerUniqueValue": True}, "limit": 1}
    ]


def test_both_instances_differ_in_their_storage_alone() -> None:
    one, team = (yaml.safe_load(path.read_text()) for path in (SQLITE, DEPLOY / "dagster.postgres.yaml"))
    assert list(team.pop("storage")) == ["postgres"]
    assert team == one


def services() -> dict[str, dict[str, Any]]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]


def test_images_are_pinned_and_secrets_come_from_the_environment() -> None:
    found = services()
    assert set(found) == {"webserver", "daemon", "docs", "code", "postgres", "minio", "bucket"}
    images = [service["image"] for service in found.values() if service["image"] != "refrag-platform:local"]
    stages = re.findall(r"^FROM (\S+) AS (\S+)", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    images += [image for image, _ in stages if image not in {name for _, name in stages}]
    assert all(re.search(r":[^:/]*\d+[.-]\d+", image) for image in images), images
    for service in found.values():
        for name, value in service["environment"].items():
            assert "PASSWORD" not in name or str(value).startswith("${"), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_every_file_that_compose_mounts_or_builds_from_is_there() -> None:
    for name in ("dagster.postgres.yaml", "workspace.yaml", "Dockerfile", "env.example"):
        assert (DEPLOY / name).is_file()
    (location,) = yaml.safe_load((DEPLOY / "workspace.yaml").read_text())["load_from"]
    assert location["grpc_server"]["host"] in services()
    assert f"-p {location['grpc_server']['port']}" in services()["code"]["command"]
    wanted = {name for name in SECRETS if name != "REFRAG_PG_PORT"} | {"REFRAG_PG_PORT"}
    assert wanted <= set(services()["webserver"]["environment"])
