"""Normalization: one form for every way to write the same text."""

import pytest

from refrag_platform.corpus.text import normalize, strip_markup


@pytest.mark.parametrize(
    ("written", "normal"),
    [
        ("Cafe\u0301", "Café"),
        ("one\r\ntwo\rthree\u2028four", "one\ntwo\nthree\nfour"),
        ("  a \t b\u00a0c  \n  d ", "a b c\nd"),
        ("a\n\n\n\n\nb", "a\n\nb"),
        ("\ufeffso\u00adft\u200b\x00", "soft"),
    ],
)
def test_equal_texts_get_one_form(written: str, normal: str) -> None:
    assert normalize(written) == normal
    assert normalize(normal) == normal


def test_markup_becomes_plain_text() -> None:
    html = "<strong>note:</strong> Proven&ccedil;al &amp; Breton<br><br>Tom&amp;eacute;<p>less &lt; more</p>"
    assert strip_markup(html) == "note: Provençal & Breton\nTomé\nless < more"
