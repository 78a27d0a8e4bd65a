"""Shards hold a split back to back, are read through memory maps, and a damaged one is never taken for whole."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from refrag_platform.corpus.shards import ShardWriter, TokenShards, token_dtype
from refrag_platform.errors import ArtifactError
from tests.conftest import ROOT

LENGTHS = [3, 10, 1, 25, 8]


def write(content: Path, vocabulary: int = 1000, lengths: list[int] = LENGTHS) -> np.ndarray:
    """A split with shards of ten tokens; returns all its ids."""
    dtype = token_dtype(vocabulary)
    ids = np.arange(sum(lengths)) % vocabulary + (vocabulary - 1000)
    places = []
    with ShardWriter(content / "train", dtype, shard_tokens=10) as writer:
        for document in np.split(ids, np.cumsum(lengths)[:-1]):
            places.append(writer.add(document))
    starts = np.cumsum([0, *lengths[:-1]])
    assert places == [divmod(start, 10) for start in starts]
    (content / "corpus.json").write_text(json.dumps({"dtype": dtype.name, "shard_tokens": 10}))
    return ids


@pytest.mark.parametrize(("vocabulary", "bytes_each"), [(65_536, 2), (65_537, 4)])
def test_what_was_written_is_read(tmp_path: Path, vocabulary: int, bytes_each: int) -> None:
    ids = write(tmp_path, vocabulary)
    shards = TokenShards(tmp_path, "train")
    sizes = [path.stat().st_size for path in sorted((tmp_path / "train").glob("*.bin"))]
    assert sizes == [10 * bytes_each] * 4 + [7 * bytes_each]
    assert shards.total == 47 and len(shards) == 5
    assert shards.documents.length.tolist() == LENGTHS
    assert shards.tokens(0, 47).tolist() == ids.tolist()
    assert shards.tokens(8, 25).dtype == np.int64
    assert shards.document(3).tolist() == ids[14:39].tolist()


def test_a_split_that_fills_its_last_shard_has_no_empty_one(tmp_path: Path) -> None:
    write(tmp_path, lengths=[15, 5])
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == [
        "documents.npy", "tokens-00000.bin", "tokens-00001.bin",
    ]  # fmt: skip
    assert TokenShards(tmp_path, "train").total == 20


def test_a_range_outside_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(IndexError, match="which has 47"):
        TokenShards(tmp_path, "train").tokens(40, 8)


def test_many_windows_at_once_are_those_read_one_by_one(tmp_path: Path) -> None:
    write(tmp_path)
    shards = TokenShards(tmp_path, "train")
    # Within a shard, over the end of one, over two ends, up to the very end.
    for length, starts in [(4, [0, 6, 7, 40, 43]), (15, [0, 8, 19, 32]), (3, [])]:
        found = shards.windows(np.array(starts, dtype=np.int64), length)
        assert found.tolist() == [shards.tokens(start, length).tolist() for start in starts]
    with pytest.raises(IndexError, match="which has 47"):
        shards.windows(np.array([3, 44]), 4)


def test_workers_map_the_files_anew(tmp_path: Path) -> None:
    ids = write(tmp_path)
    pickled = pickle.dumps(TokenShards(tmp_path, "train"))
    assert len(pickled) < 500
    assert pickle.loads(pickled).tokens(5, 30).tolist() == ids[5:35].tolist()


def test_missing_and_cut_shards_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    last = tmp_path / "train/tokens-00004.bin"
    last.write_bytes(last.read_bytes()[:-2])
    with pytest.raises(ArtifactError, match="holds 46 tokens, its index says 47"):
        TokenShards(tmp_path, "train")
    last.unlink()
    with pytest.raises(ArtifactError, match=r"tokens-00004.bin"):
        TokenShards(tmp_path, "train")
    with pytest.raises(ArtifactError, match="not a split"):
        TokenShards(tmp_path, "test")


def test_a_failed_writer_leaves_no_index_and_no_partial_shard(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, token_dtype(10), 10) as writer:
        writer.add(np.arange(13))
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["tokens-00000.bin"]


def test_reading_needs_numpy_alone(tmp_path: Path) -> None:
    write(tmp_path)
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from refrag_platform.corpus.shards import TokenShards\n"
        "TokenShards(Path(sys.argv[1]), 'train').tokens(0, 5)\n"
        "assert not {'pyarrow', 'torch', 'tokenizers', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)
