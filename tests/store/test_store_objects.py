"""Search tables in an object store, which is moto's mock of S3 on loopback: built once, whole or not there."""

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from traceback import format_exception

import lancedb
import numpy as np
import pyarrow as pa
import pytest

from refrag_platform.errors import RefragError
from refrag_platform.serving.settings import ApiSettings
from refrag_platform.store import objects
from refrag_platform.store.table import ChunkStore, _build, open_tables
from tests.command import refrag
from tests.object_store import BUCKET, KEY, SECRET, ObjectStore, object_store
from tests.store.conftest import Made, text_of

URL = f"s3://{BUCKET}/stores"
PLAIN = {"allow_http": "true"}
QUERY = text_of(7)


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    with object_store(monkeypatch) as store:
        yield store


def open_there(made: Made) -> ChunkStore:
    return ChunkStore.open(made.content, made.model.encoder_digest(), tables=URL)


def folders(remote: ObjectStore) -> set[str]:
    """Folders of tables that hold anything."""
    return {name.split("/")[2] for name in remote.objects()} - {"published.lance"}


def test_a_store_is_searched_there_as_on_this_disk(made: Made, remote: ObjectStore, tmp_path: Path) -> None:
    here, there = ChunkStore.open(made.content, tables=tmp_path), open_there(made)
    wanted, hits = here.search(QUERY, 5), there.search(QUERY, 5)
    assert [(hit.id, hit.score) for hit in hits] == [(hit.id, hit.score) for hit in wanted] and len(hits) == 5
    assert all(np.array_equal(one.vectors, other.vectors) for one, other in zip(hits, wanted, strict=True))
    assert there.passage(hits[0].id).text == hits[0].text
    written = len(remote.puts(""))
    assert open_there(made).search(QUERY, 1)[0].id == hits[0].id
    assert len(remote.puts("")) == written, "what is there is only read"


def test_of_two_who_build_at_once_one_is_published_and_the_other_removed(made: Made, remote: ObjectStore) -> None:
    both = threading.Barrier(2)

    def build(tables: lancedb.DBConnection) -> None:
        _build(made.content, tables)
        both.wait(60)

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: objects.open_or_build(f"{URL}/store", build), range(2))
    assert one.uri == other.uri and one.open_table("passages").count_rows() == 600
    assert folders(remote) == {one.uri.rsplit("/", 1)[-1]}
    # Lance lets a create that meets another's table write a second version of it; the first one counts.
    published = lancedb.connect(f"{URL}/store", storage_options=PLAIN)
    published.create_table("published", data=[{"folder": "later"}], mode="overwrite")
    assert objects.open_or_build(f"{URL}/store", build).uri == one.uri


def test_versions_are_put_only_if_they_are_not_there_so_that_no_commit_is_lost(remote: ObjectStore) -> None:
    url = f"s3://{BUCKET}/commits"
    lancedb.connect(url, storage_options=PLAIN).create_table("rows", data=pa.table({"number": [0]}))

    def add(numbers: range) -> None:
        table = lancedb.connect(url, storage_options=PLAIN).open_table("rows")
        for number in numbers:
            table.add(pa.table({"number": [number]}))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(add, (range(1, 6), range(6, 11))))
    rows = lancedb.connect(url, storage_options=PLAIN).open_table("rows").to_arrow()
    assert sorted(rows["number"].to_pylist()) == list(range(11))
    versions = remote.puts(r"_versions/.*\.manifest$")
    assert len(versions) >= 11 and all(put.only_new for put in versions)


def test_a_put_that_fails_is_tried_again(made: Made, remote: ObjectStore) -> None:
    remote.fail(r"passages\.lance/data/", times=2)
    remote.fail(r"published\.lance/_versions/")
    assert open_there(made).search(QUERY, 1)
    data = [put.path for put in remote.puts(r"passages\.lance/data/")]
    assert max(data.count(path) for path in data) >= 3 and len(remote.puts(r"published\.lance/_versions/")) >= 2


def test_a_put_whose_answer_was_lost_is_not_taken_for_another_s(made: Made, remote: ObjectStore) -> None:
    remote.fail(r"published\.lance/_versions/", done=True)
    store = open_there(made)
    assert store.search(QUERY, 1) and folders(remote) == {store.place.rsplit("/", 1)[-1]}


def test_what_a_killed_build_left_is_not_taken_for_tables(made: Made, remote: ObjectStore) -> None:
    def killed(tables: lancedb.DBConnection) -> None:
        tables.create_table("passages", data=pa.table({"id": ["half"]}))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        objects.open_or_build(f"{URL}/store", killed)
    tables = objects.open_or_build(f"{URL}/store", partial(_build, made.content))
    assert tables.open_table("passages").count_rows() == 600


def test_credentials_are_nowhere_but_in_the_environment(
    made: Made, remote: ObjectStore, capfd: pytest.CaptureFixture[str]
) -> None:
    open_there(made).search(QUERY, 1)
    assert not any(SECRET.encode() in data or KEY.encode() in data for data in remote.objects().values())
    with pytest.raises(RefragError, match=r"search tables of s3://no-such-bucket/.* can't be read") as refused:
        ChunkStore.open(made.content, tables="s3://no-such-bucket/x")
    with pytest.raises(RefragError, match=r"must be s3://BUCKET or .* never by the URL") as wrong:
        objects.object_url(f"s3://{KEY}:{SECRET}@{BUCKET}/x", "the URL")
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err + str(refused.value) + str(wrong.value)


def test_of_a_store_s_refusal_its_code_and_message_are_told_and_no_token(remote: ObjectStore) -> None:
    beside = f"<Token-0>{SECRET}</Token-0><AWSAccessKeyId>{KEY}</AWSAccessKeyId>"
    remote.refuse(f"<Error><Code>ExpiredToken</Code><Message>Not now.</Message>{beside}</Error>")
    with pytest.raises(RefragError, match=r"credentials: ExpiredToken: Not now\.$") as refused:
        objects.open_or_build(f"{URL}/store", lambda tables: None)
    assert not any(text in "".join(format_exception(refused.value)) for text in (SECRET, KEY))


@pytest.mark.parametrize(
    "body", [f"<Error><Code>ExpiredToken</Code><Message>{KEY}</Message>{SECRET}</Error>", f'{{"{KEY}": "{SECRET}"}}']
)
def test_of_a_refused_search_its_kind_and_code_are_told(made: Made, remote: ObjectStore, body: str) -> None:
    opened = open_tables(made.content, tables=URL)
    store = ChunkStore(*opened)
    remote.refuse(body)
    for ask in (lambda: store.search(QUERY, 1), lambda: store.passage("c7/0"), lambda: ChunkStore(*opened)):
        # A HEAD is answered without a body, and so without a code.
        says = rf"^the search tables of {store.place} can't be read: RuntimeError, (ExpiredToken|403 Forbidden)$"
        with pytest.raises(RefragError, match=says) as refused:
            ask()
        assert not any(text in "".join(format_exception(refused.value)) for text in (SECRET, KEY))
    with pytest.raises(RefragError, match="can't be read or built") as unopened:
        open_there(made)
    assert SECRET not in "".join(format_exception(unopened.value))


def test_a_store_is_published_from_a_shell(made: Made, remote: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFRAG_ROOT", str(made.project.root))
    result = refrag("store", "publish", f"{URL}/", "--model", "tiny")
    assert re.search(rf"{URL}/[0-9a-f]{{32}}/[0-9a-f]{{32}}: 600 passages", result.output)


def test_a_server_reads_either_a_working_copy_or_published_tables() -> None:
    assert ApiSettings.from_environment({"REFRAG_TABLES": f"{URL}/"}).tables == URL
    with pytest.raises(RefragError, match="REFRAG_TABLES must be s3://BUCKET"):
        ApiSettings.from_environment({"REFRAG_TABLES": "/srv/tables"})
    with pytest.raises(RefragError, match="both set"):
        ApiSettings.from_environment({"REFRAG_TABLES": URL, "REFRAG_STORE": "/srv/live"})
