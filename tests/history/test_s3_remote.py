"""DVC's remote on S3, which is moto's mock of it on loopback: what is pushed comes back, and keys stay out of files."""

import shutil
from collections.abc import Iterator

import pytest

from refrag_platform.artifacts.digest import folder_digest
from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.corpus.pull import pull
from refrag_platform.errors import RefragError
from refrag_platform.history import dvc
from refrag_platform.project import Project
from refrag_platform.runner import run_stage
from refrag_platform.stages import STAGES
from tests.command import refrag
from tests.object_store import BUCKET, KEY, SECRET, ObjectStore, object_store
from tests.planted import MODEL, run

pytestmark = pytest.mark.slow
URL = f"s3://{BUCKET}/dvc"


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    pytest.importorskip("dvc_s3", reason="the extra `s3` is not installed")
    with object_store(monkeypatch) as store:
        yield store


def test_artifacts_come_back_from_an_object_store_and_keys_stay_out_of_files(
    recorded: Project, remote: ObjectStore
) -> None:
    project, content = recorded, recorded.content("corpus", MODEL)
    dvc.set_remote(project, URL)
    assert dvc.remote_url(project) == URL
    remote.fail("/refrag/dvc/files/md5/")
    dvc.push(project, MODEL)
    for lost in (content, dvc.cache_folder(project)):
        shutil.rmtree(lost)
    dvc.pull(project, MODEL)
    assert folder_digest(content) == Manifest.read(content.parent).hash == dvc.recorded_hash(project, "corpus", MODEL)
    puts = [put.path for put in remote.puts("/refrag/dvc/files/md5/")]
    assert max(map(puts.count, puts)) == 2, "the put that failed was tried again"
    written = [path for path in project.root.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(written) > 20
    assert not any(text.encode() in path.read_bytes() for path in written for text in (KEY, SECRET))


def test_checkpoints_come_from_an_object_store_into_another_clone(
    recorded: Project, remote: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands of docs/operations.md."""
    monkeypatch.chdir(recorded.root)
    refrag("remote", "set", URL)
    refrag("commit", "--model", MODEL)
    refrag("push", "--model", MODEL)
    clone = Project(recorded.root.parent / "clone")
    run(recorded.root, "git", "clone", "--quiet", "--branch", f"runs/{MODEL}", str(recorded.root), str(clone.root))
    monkeypatch.chdir(clone.root)
    refrag("remote", "set", URL)
    run(clone.root, "dvc", "pull", dvc.target("cpt", MODEL))
    assert {stage for stage in STAGES if clone.content(stage, MODEL).is_dir()} == {"cpt"}
    refrag("pull", "--model", MODEL)
    for stage in STAGES:
        manifest = Manifest.read(recorded.stage_dir(stage, MODEL))
        assert folder_digest(clone.content(stage, MODEL)) == manifest.hash
        assert Manifest.read(clone.stage_dir(stage, MODEL)).hash == manifest.hash


def test_records_of_pulled_objects_are_no_source(recorded: Project, remote: ObjectStore) -> None:
    import boto3

    boto3.client("s3").put_object(Bucket=BUCKET, Key="docs/a.txt", Body=b"The sea is deep.")
    folder = pull(recorded.source_dir(MODEL), f"s3://{BUCKET}/docs").folder
    run_stage(recorded, "corpus", MODEL)
    dvc.record(recorded, "corpus", MODEL)
    shutil.rmtree(folder / ".pulled")
    assert dvc.is_recorded(recorded, "corpus", MODEL)


def test_a_bucket_that_is_not_there_is_named_and_no_key(recorded: Project, remote: ObjectStore) -> None:
    dvc.set_remote(recorded, "s3://no-such-bucket/dvc")
    with pytest.raises(RefragError, match=r"dvc push with the remote s3://no-such-bucket/dvc failed") as refused:
        dvc.push(recorded, MODEL)
    assert SECRET not in str(refused.value)
