"""`refrag ask` says what is wrong with what a shell gave it, and with what another program answered."""

from collections.abc import Iterator
from http.server import ThreadingHTTPServer

import pytest

from tests.command import refused
from tests.web import Silent, served

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def another_program() -> Iterator[str]:
    """A server that is not this program's: a page at every path."""

    class Page(Silent):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>Hello</html>")

    with served(ThreadingHTTPServer(("127.0.0.1", 0), Page)) as url:
        yield url


def test_bytes_that_are_not_utf8_are_refused_before_anything_is_loaded() -> None:
    # What a shell's byte 0xE9 becomes in an argument.
    for more in ([], ["--url", NOWHERE]):
        said = refused("ask", "caf\udce9?", *more)
        assert "the question is not valid Unicode" in said and r"caf\udce9?" in said
    assert "the question is empty" in refused("ask", "\u200b\u3164")


@pytest.mark.parametrize(
    ("url", "key", "said"),
    [
        (f"{NOWHERE}/\udce9", "", "the server's address is not valid Unicode"),
        ("http://a:b", "", "Invalid port"),
        (NOWHERE, "schlüssel", "the key ($REFRAG_API_KEY)"),
        (NOWHERE, "a\nb", "the key ($REFRAG_API_KEY)"),
    ],
)
def test_an_address_or_key_that_cannot_be_used_is_one_line(
    url: str, key: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFRAG_API_KEY", key)
    assert said in refused("ask", "What?", "--url", url)


def test_another_program_at_the_address_is_said_to_be_that(another_program: str) -> None:
    assert "another program serves there ('<html>Hello</html>')" in refused("ask", "What?", "--url", another_program)
