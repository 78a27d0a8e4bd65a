"""Objects of a bucket, which is moto's mock of S3 on loopback, become source files: whole, once; no user's is lost."""

from collections.abc import Iterator
from pathlib import Path
from traceback import format_exception

import pytest

from refrag_platform.corpus import pull as module
from refrag_platform.corpus.bucket import ATTEMPTS, Bucket
from refrag_platform.corpus.pull import Pulled, pull
from refrag_platform.corpus.sources import source_records
from refrag_platform.errors import RefragError
from refrag_platform.files import lock_file
from refrag_platform.history.status import status
from refrag_platform.project import Project
from refrag_platform.runner import run_stage
from tests.command import refrag, refused
from tests.object_store import BUCKET, KEY, SECRET, ObjectStore, object_store

URL = f"s3://{BUCKET}/docs"


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    pytest.importorskip("botocore", reason="the extra `s3` is not installed")
    with object_store(monkeypatch) as store:
        yield store


def put(key: str, text: str) -> None:
    import boto3

    boto3.client("s3").put_object(Bucket=BUCKET, Key=key, Body=text.encode())


def remove(key: str) -> None:
    import boto3

    boto3.client("s3").delete_object(Bucket=BUCKET, Key=key)


def files(folder: Path) -> dict[str, str]:
    """What lies below a folder, but for pull's own records."""
    paths = (path for path in folder.rglob("*") if path.is_file() and ".pulled" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}


def counts(pulled: Pulled) -> tuple[int, int]:
    return len(pulled.fetched), len(pulled.unchanged)


def test_what_is_below_the_prefix_is_copied_once_and_again_if_it_changed(remote: ObjectStore, tmp_path: Path) -> None:
    for name in ("a.txt", "deep/b.md", "deep/ü 1.txt"):
        put(f"docs/{name}", name)
    put("docs-of-others/c.txt", "not asked for")
    assert pull(tmp_path, URL).fetched == ["docs/a.txt", "docs/deep/b.md", "docs/deep/ü 1.txt"]
    there = {f"docs/{name}": name for name in ("a.txt", "deep/b.md", "deep/ü 1.txt")}
    assert files(tmp_path / BUCKET) == there
    remote.requests.clear()
    assert counts(pull(tmp_path, f"{URL}/")) == (0, 3)
    assert not remote.gets("/docs/"), "what is there is not read again"
    put("docs/a.txt", "A.TXT")  # of as many bytes, and within the same second
    assert pull(tmp_path, URL).fetched == ["docs/a.txt"]
    assert files(tmp_path / BUCKET) == {**there, "docs/a.txt": "A.TXT"}
    assert pull(tmp_path, f"{URL}-of-others/c.txt").fetched == ["docs-of-others/c.txt"], "an object by its own URL"


def test_a_bucket_of_several_pages_is_listed_whole(remote: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "2")
    for number in (3, 1, 4, 0, 2):
        put(f"docs/{number}", "x")
    assert list(Bucket(BUCKET).objects("docs")) == [f"docs/{number}" for number in range(5)]
    assert len(remote.gets(f"^/{BUCKET}$")) == 3


def test_a_changed_object_makes_the_corpus_stale_once_it_is_pulled(
    planted_project: Project, remote: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(planted_project.root)

    def state() -> str:
        return next(entry.state for entry in status(planted_project, "tiny") if entry.stage == "corpus")

    put("docs/a.txt", "The sea is deep.")
    assert "1 pulled, 0 unchanged" in refrag("sources", "pull", URL, "--model", "tiny").output
    run_stage(planted_project, "corpus", "tiny")
    refrag("sources", "pull", URL, "--model", "tiny")
    assert state() == "current"
    records = {record.path for record in source_records(planted_project, planted_project.recipe("tiny"))}
    pulled = {path for path in records if BUCKET in path}
    assert pulled == {f"data/sources/tiny/{BUCKET}/docs/a.txt"}, "what lineage names, and not pull's own records"
    put("docs/a.txt", "The sea is blue.")
    assert "1 pulled, 0 unchanged" in refrag("sources", "pull", URL, "--model", "tiny").output
    assert state() == "stale"


def test_faults_on_the_way_are_tried_again_and_nothing_half_is_taken(remote: ObjectStore, tmp_path: Path) -> None:
    put("docs/a.txt", "a" * 3_000_000)
    put("docs/b.txt", "b" * 1000)
    remote.fail("/docs/b.txt", method="GET")
    remote.cut("/docs/a.txt", times=2)
    assert counts(pull(tmp_path, URL)) == (2, 0)
    assert files(tmp_path / BUCKET) == {"docs/a.txt": "a" * 3_000_000, "docs/b.txt": "b" * 1000}
    assert len(remote.gets("/docs/a.txt")) == 3
    etag = Bucket(BUCKET).objects("docs")["docs/b.txt"].etag
    put("docs/b.txt", "c" * 1000)
    with pytest.raises(RefragError, match=rf"^{URL}/b\.txt can't be read: PreconditionFailed; pull again"):
        Bucket(BUCKET).download("docs/b.txt", etag, tmp_path / "b.txt", lambda count: None)
    put("docs/a.txt", "c" * 3_000_000)
    remote.cut("/docs/a.txt", times=99)
    with pytest.raises(RefragError, match=rf"^{URL}/a\.txt can't be read: IncompleteReadError; "):
        pull(tmp_path, URL)
    assert files(tmp_path / BUCKET)["docs/a.txt"] == "a" * 3_000_000, "the former one, and no part of another"


def test_a_pull_that_was_stopped_goes_on(remote: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DOWNLOADS", 1)
    for name in "abc":
        put(f"docs/{name}.txt", name)
    remote.cut("/docs/c.txt", times=ATTEMPTS)
    with pytest.raises(RefragError, match="IncompleteReadError"):
        pull(tmp_path, URL)
    assert set(files(tmp_path / BUCKET)) == {"docs/a.txt", "docs/b.txt"}
    # SIGKILL leaves the last line unwritten, or half of it.
    records = tmp_path / BUCKET / ".pulled" / "objects.jsonl"
    records.write_text(records.read_text()[:-20])
    assert counts(pull(tmp_path, URL)) == (2, 1)
    assert counts(pull(tmp_path, URL)) == (0, 3)


def test_one_pull_of_a_bucket_runs_at_a_time(remote: ObjectStore, tmp_path: Path) -> None:
    put("docs/a.txt", "a")
    with (
        lock_file(tmp_path / BUCKET / ".pulled" / "lock"),
        pytest.raises(RefragError, match=r"another pull into .* is running"),
    ):
        pull(tmp_path, URL)


def test_files_of_the_user_stay(remote: ObjectStore, tmp_path: Path) -> None:
    for name in ("changed", "mine", "same", "folder", "file/below"):
        put(f"docs/{name}", name)
    folder = tmp_path / BUCKET / "docs"
    (folder / "folder").mkdir(parents=True)
    (folder / "folder" / "note.txt").write_text("mine")
    for name, text in (("mine", "my own"), ("same", "same"), ("file", "mine")):
        (folder / name).write_text(text)
    pulled = pull(tmp_path, URL)
    assert pulled.kept == ["docs/file/below", "docs/folder", "docs/mine"]
    assert pulled.fetched == ["docs/changed", "docs/same"]
    (folder / "changed").write_text("by hand")
    put("docs/changed", "anew")
    assert "docs/changed" in pull(tmp_path, URL).kept
    here = {"changed": "by hand", "mine": "my own", "same": "same", "file": "mine", "folder/note.txt": "mine"}
    assert files(folder) == here
    (folder / "changed").unlink()
    assert pull(tmp_path, URL).fetched == ["docs/changed"]


def test_objects_that_are_gone_are_reported_and_removed_if_asked(
    project: Project, remote: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.root)
    for name in ("docs/a", "docs/b", "docs/edited", "other/c"):
        put(name, name)
    command = ("sources", "pull", f"s3://{BUCKET}", "--model", "tiny")
    refrag(*command)
    folder = project.source_dir("tiny") / BUCKET
    (folder / "docs" / "edited").write_text("by hand")
    for name in ("docs/b", "docs/edited", "other/c"):
        remove(name)
    said = refrag("sources", "pull", URL, "--model", "tiny").output
    assert "still here (--delete removes them): docs/b\n" in said and len(files(folder)) == 4
    said = refrag(*command, "--delete").output
    assert "removed: docs/b, other/c\n" in said
    assert files(folder) == {"docs/a": "docs/a", "docs/edited": "by hand"}
    remove("docs/a")
    assert "there are no objects in s3://refrag" in refused(*command, "--delete")
    assert "docs/a" in files(folder)


def test_keys_that_are_no_names_of_source_files_are_left_out(remote: ObjectStore, tmp_path: Path) -> None:
    odd = ["docs//two", "docs/../../out", "docs/.hidden", f"docs/{'x' * 241}", "docs/both"]
    for key in (*odd, "docs/both/below", "docs/marker/"):
        put(key, "text")
    pulled = pull(tmp_path / "sources", URL)
    assert pulled.left_out == sorted(odd) and pulled.fetched == ["docs/both/below"]
    assert [path.name for path in tmp_path.iterdir()] == ["sources"]


def test_errors_name_bucket_and_code_and_no_key(
    remote: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(url: str) -> str:
        with pytest.raises(RefragError) as refusal:
            pull(tmp_path, url)
        text = "".join(format_exception(refusal.value))
        assert SECRET not in text and KEY not in text
        return str(refusal.value)

    assert said("s3://no-such-bucket/x").startswith("s3://no-such-bucket can't be read: NoSuchBucket; ")
    assert said(f"s3://{KEY}:{SECRET}@{BUCKET}/x").startswith("the URL must be s3://BUCKET or")
    assert said(f"{URL}/typo") == f"there are no objects in {URL}/typo"
    remote.refuse(f"<Error><Code>ExpiredToken</Code><Message>{KEY}</Message><Token>{SECRET}</Token></Error>")
    assert said(URL).startswith(f"s3://{BUCKET} can't be read: ExpiredToken; ")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert said(URL).startswith(f"s3://{BUCKET} can't be read: NoCredentialsError; ")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "minio:9000")
    assert said(URL).startswith(f"s3://{BUCKET} can't be read: ValueError; look at AWS_ENDPOINT_URL")
    assert list(tmp_path.iterdir()) == [], "nothing is made where nothing can be read"
