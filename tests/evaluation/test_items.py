"""Items: what names a held-out set."""

from refrag_platform.corpus.question import Question
from refrag_platform.evaluation.items import questions_digest, windows_digest
from refrag_platform.evaluation.windows import Windows


def test_digests_name_the_items(windows: Windows) -> None:
    same = Windows(windows.tokens.clone(), ["x"] * len(windows), windows.context_tokens)
    assert windows_digest(same) == windows_digest(windows)
    moved = Windows(windows.tokens, windows.documents, windows.context_tokens + 4)
    assert windows_digest(moved) != windows_digest(windows)
    asked = Question("1", "What?", ("x",), (("T", "a"), ("U", "b")), gold=(1,))
    further = Question("1", "What?", ("x",), (("T", "other"), ("U", "b")), gold=(1,))
    assert questions_digest([asked], 1, 8) == questions_digest([further], 1, 8), "the passage that differs is not read"
    assert questions_digest([asked], 2, 8) != questions_digest([further], 2, 8)
    assert questions_digest([asked], 1, 8) != questions_digest([asked], 1, 9)
    assert questions_digest([asked], 2, 8) != questions_digest([asked], 2, 8, "nearest")
