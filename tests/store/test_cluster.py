"""A store that a real Ray cluster of this machine encodes: whoever is killed, the bytes are those of one process."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from refrag_platform.artifacts.digest import folder_digest
from refrag_platform.bench.encoding import bench_encoding
from refrag_platform.cli import app
from refrag_platform.errors import ArtifactError, Paused, RefragError
from refrag_platform.processes import stopped_after
from refrag_platform.project import Project
from refrag_platform.runner import run_stage
from refrag_platform.stages import StageContext
from refrag_platform.store.build import PartWriter, build_chunks, passage_batches, write_store
from refrag_platform.store.cluster import build_chunks_on_ray, cluster, write_parts
from refrag_platform.store.content import PASSAGES_FILE
from tests.planted import MODEL, planted
from tests.processes import wait_for
from tests.store.conftest import PASSAGES, Made

needs_ray = pytest.mark.skipif(not find_spec("ray"), reason="Ray is not installed")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two CPUs; a worker has one, and one thread on it: sums in another order may differ in the last bit."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 2}')
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def reference(made: Made, tmp_path: Path) -> str:
    """The hash of what one process makes."""
    context = made.context(tmp_path / "reference")
    build_chunks(context)
    return folder_digest(context.out)


def parts(context: StageContext) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in context.work.glob("part-*")}


def connect(hook: Callable[[], None]) -> None:
    """A cluster of two CPUs, each of whose workers runs the hook first."""
    import ray

    ray.init("local", num_cpus=2, log_to_driver=False, runtime_env={"worker_process_setup_hook": hook})


@needs_ray
@pytest.mark.slow
def test_workers_that_are_killed_while_they_write_and_before_they_answer_change_no_byte(
    made: Made, tmp_path: Path, reference: str
) -> None:
    context, killed = made.context(tmp_path / "ray"), tmp_path / "killed"
    killed.mkdir()

    def hook() -> None:
        import os
        import signal

        from refrag_platform.store import build

        save, save_file = build._save, build.save_file

        def first(what: str) -> bool:
            try:
                (killed / what).touch(exist_ok=False)
            except FileExistsError:
                return False
            return True

        def half(arrays: Any, path: Path, metadata: dict[str, str]) -> None:
            save_file(arrays, path, metadata)
            if first("writing"):
                os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        def unanswered(arrays: Any, path: Path, made_from: str) -> None:
            save(arrays, path, made_from)
            if first("answering"):
                os.kill(os.getpid(), signal.SIGKILL)

        build.save_file, build._save = half, unanswered

    connect(hook)
    try:
        writer = write_parts(context)
    finally:
        import ray

        ray.shutdown()
    assert {path.name for path in killed.iterdir()} == {"writing", "answering"}
    there = parts(context)
    assert sorted(there) == [f"part-{number:06}.safetensors" for number in range(3)]
    write_store(writer, context.inputs["corpus"] / PASSAGES_FILE, context.out)
    assert parts(context) == there
    assert folder_digest(context.out) == reference


@needs_ray
@pytest.mark.slow
def test_a_part_that_kills_every_worker_ends_the_run_and_says_so(made: Made, tmp_path: Path) -> None:
    def hook() -> None:
        import os
        import signal

        from refrag_platform.store import build

        build._encode = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)

    import ray

    connect(hook)
    try:
        with pytest.raises(RefragError, match="a part's worker died 4 times"):
            write_parts(made.context(tmp_path / "ray"))
    finally:
        ray.shutdown()


@needs_ray
@pytest.mark.slow
def test_a_driver_that_is_killed_goes_on_with_the_parts_that_are_there(
    made: Made, tmp_path: Path, reference: str
) -> None:
    folder = tmp_path / "ray"
    context, log = made.context(folder), tmp_path / "log"
    command = made.command("cluster", "build_chunks_on_ray", folder)
    with log.open("wb") as output:
        driver = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=output, stderr=output)
    wait_for(lambda: bool(parts(context)), 120, log)
    driver.send_signal(signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL
    there = parts(context)
    assert not (context.out / "store.json").exists()
    build_chunks_on_ray(context)
    assert parts(context).items() >= there.items()
    assert folder_digest(context.out) == reference


@needs_ray
@pytest.mark.slow
def test_a_machine_that_is_lost_ends_the_run_which_goes_on_without_it(
    made: Made, tmp_path: Path, reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray.cluster_utils import Cluster

    context = made.context(tmp_path / "ray")
    with monkeypatch.context() as two_machines:
        two_machines.delenv("RAY_OVERRIDE_RESOURCES")
        machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        lost = machines.add_node(num_cpus=1)
        name = lost.node_id

        def hook() -> None:
            import signal

            import ray

            from refrag_platform.store import build

            if ray.get_runtime_context().get_node_id() == name:
                build._encode = lambda *arguments: signal.pause()

        def lose() -> None:
            wait_for(lambda: bool(parts(context)), 120)
            machines.remove_node(lost, allow_graceful=False)

        ray.init(machines.address, log_to_driver=False, runtime_env={"worker_process_setup_hook": hook})
        losing = threading.Thread(target=lose)
        losing.start()
        try:
            with pytest.raises(RefragError, match=r"machine is gone.* the same command goes on"):
                write_parts(context)
        finally:
            losing.join()
            ray.shutdown()
            machines.shutdown()
    there = parts(context)
    build_chunks_on_ray(context)
    assert parts(context).items() >= there.items()
    assert folder_digest(context.out) == reference


@needs_ray
@pytest.mark.slow
def test_what_a_worker_refuses_is_said_as_one_process_says_it(made: Made, tmp_path: Path) -> None:
    context = made.context(tmp_path / "ray")
    context.work.rmdir()  # as on a machine that does not share the checkout
    with pytest.raises(RefragError, match="all machines must share the checkout"):
        build_chunks_on_ray(context)


@needs_ray
@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere"])
def test_a_cluster_that_is_not_there_is_refused(made: Made, tmp_path: Path, address: str) -> None:
    with pytest.raises(RefragError, match=f"no Ray cluster at {address}"):
        build_chunks_on_ray(made.context(tmp_path / "ray"), address)


@needs_ray
@pytest.mark.slow
def test_a_signal_stops_the_driver_as_any_run_while_it_waits_for_workers() -> None:
    import ray

    def signals(driver: int) -> None:
        import os
        import signal

        os.kill(driver, signal.SIGTERM)
        signal.pause()

    with pytest.raises(Paused, match="run it again"), stopped_after(1000), cluster(None):
        ray.wait([ray.remote(signals).remote(os.getpid())])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["corpus", "--engine", "ray"], "--engine ray encodes the stage chunks, which is not among corpus"),
        (["chunks", "--address", "auto"], "--address auto is that of a Ray cluster; give --engine ray too"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options: list[str], why: str) -> None:
    refused = CliRunner().invoke(app, ["run", *options, "--model", "tiny"])
    assert refused.exit_code == 2
    assert why in " ".join(refused.output.split())


def test_an_artifact_made_in_another_way_is_current_for_the_stage_itself(planted_project: Project) -> None:
    assert not run_stage(planted_project, "corpus", MODEL, function=planted).cached
    assert run_stage(planted_project, "corpus", MODEL).cached


def test_a_part_of_other_passages_or_another_encoder_is_made_again(made: Made, tmp_path: Path) -> None:
    context = made.context(tmp_path / "run")
    writer = PartWriter.of(context)
    first, second, _ = passage_batches(context.inputs["corpus"] / PASSAGES_FILE)
    assert writer.write(0, first) == first.num_rows
    assert writer.write(0, first) == 0
    assert not writer.has(0, second)
    with pytest.raises(ArtifactError, match=r"part-000000\.safetensors was replaced or removed"):
        writer.read(0, second)
    other = replace(writer, wanted=replace(writer.wanted, encoder_digest="other"))
    assert other.write(0, first) == first.num_rows
    assert not writer.has(0, first)


def test_a_machine_without_ray_is_told_what_to_install(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RefragError, match=r"pip install 'refrag-platform\[ray\]'"):
        build_chunks_on_ray(made.context(tmp_path / "ray"))


@needs_ray
@pytest.mark.slow
def test_the_benchmark_encodes_the_same_passages_on_both_and_leaves_nothing_behind(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 1}')
    result = bench_encoding(made.project, "tiny", PASSAGES - 1)
    assert result["passages"] == PASSAGES - 1
    assert result["same_bytes"]
    assert [row["engine"] for row in result["rows"]] == ["process", "ray"]
    assert all(row["passages_per_second"] > 0 for row in result["rows"])
    assert not list(made.project.work_dir("chunks", "tiny").iterdir())
