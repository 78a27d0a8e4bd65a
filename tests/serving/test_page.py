"""The page at /, in a real browser: a question, its passages and their price, a key, a document, by keyboard alone."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from refrag_platform.project import Project
from refrag_platform.serving.engine import Engine
from refrag_platform.serving.settings import ApiSettings
from tests.serving.conftest import Server

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium; Debian has it: apt-get install chromium")
PATIENCE = 60_000  # milliseconds, on a busy machine; what is there at once isn't waited for
KEPT, COMPRESSED = "#passages .chunk.kept", "#passages .chunk:not(.kept)"


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as tools:
        # Containers run as root, whom Chromium's sandbox refuses; the only page is ours.
        started = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        playwright.expect.set_options(timeout=PATIENCE)
        yield started
        started.close()


@pytest.fixture
def page(browser: playwright.Browser) -> Iterator[playwright.Page]:
    """A page that says nothing on its console: no error of a script, nothing that its policy refused."""
    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    # Answers other than 200 are written there by the browser itself.
    page.on("console", lambda said: "status of" in said.text or faults.append(said.text))
    yield page
    context.close()
    assert faults == []


def ask(page: playwright.Page, question: str) -> None:
    page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Ask").click()
    playwright.expect(page.get_by_role("button", name="Ask")).to_be_enabled()


def figures(page: playwright.Page, name: str) -> list[str]:
    return page.get_by_role("row").filter(has_text=name).get_by_role("cell").all_inner_texts()


def test_a_question_is_answered_over_passages_that_show_each_chunk_s_fate(page: playwright.Page, url: str) -> None:
    page.goto(url)
    playwright.expect(page.locator("#model")).to_have_text("tiny")
    ask(page, "What is the capital of Peru?")
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "What is the capital of Peru?"}]}
    told = httpx.post(f"{url}/v1/chat/completions", json=asked).json()
    refrag = told["refrag"]
    assert page.locator("#answer").inner_text().strip() == told["choices"][0]["message"]["content"].strip()
    chunks = [chunk for one in refrag["citations"] + refrag["retrieved"] for chunk in one["selection"]]
    assert page.locator(KEPT).count() == sum(chunk["kept"] for chunk in chunks) > 0
    assert page.locator(COMPRESSED).count() == sum(not chunk["kept"] for chunk in chunks) > 0
    scores = [f"{chunk['score']:.2f}" for chunk in chunks]
    assert page.locator("#passages .chunk sub").all_inner_texts() == scores
    [first, *_] = page.locator("#passages article p").all()
    whole = httpx.post(f"{url}/v1/retrieve", json={"query": "What is the capital of Peru?", "k": 1}).json()["data"][0]
    assert re.sub(r"-?\d+\.\d\d", "", first.inner_text()) == whole["text"]
    assert page.locator("#shown").inner_text() == f"{refrag['share_kept']} (the model’s own)"


def test_it_stands_beside_full_context(page: playwright.Page, url: str) -> None:
    page.goto(url)
    page.get_by_label("p", exact=True).fill("0.5")
    ask(page, "What is the capital of Peru?")
    fewer, all_of_them = (int(figure.replace(",", "")) for figure in figures(page, "positions that"))
    assert 0 < fewer < all_of_them and all(figures(page, "first token")) and "–" not in figures(page, "first token")
    playwright.expect(page.locator("#full-answer")).not_to_be_empty()
    page.get_by_label("beside full context").uncheck()
    ask(page, "What is the capital of Peru?")
    assert figures(page, "positions that") == [str(fewer), str(all_of_them)]
    assert figures(page, "first token")[1] == "–" and not page.locator("#full").is_visible()


def test_a_fault_is_told(page: playwright.Page, url: str) -> None:
    page.goto(url)
    ask(page, "a " * 1900 + " ".join(f"word{number}" for number in range(20)))
    playwright.expect(page.get_by_role("alert")).to_contain_text("the limit of tiny is 1024")


def test_the_keyboard_is_enough(page: playwright.Page, url: str) -> None:
    page.goto(url)
    page.get_by_label("Question").press_sequentially("Capital of Malta?")
    page.keyboard.press("Tab")
    page.keyboard.press("End")
    playwright.expect(page.locator("#shown")).to_have_text("1")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#shown")).to_have_text("the model’s own")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#passages article").first).to_contain_text("Malta")


def test_only_its_holder_gets_data_with_a_key(page: playwright.Page, server: Server) -> None:
    with server(ApiSettings(api_key="secret")) as url:
        for path in ("/", "/page.js"):
            assert httpx.get(url + path).status_code == 200
        page.goto(url)
        playwright.expect(page.get_by_role("alert")).to_contain_text("no API key")
        page.get_by_label("Key").fill("secret")
        page.keyboard.press("Tab")
        playwright.expect(page.locator("#model")).to_have_text("tiny")
        playwright.expect(page.get_by_role("alert")).to_be_empty()
        ask(page, "Capital of Nepal?")
        playwright.expect(page.locator("#passages article").first).to_contain_text("Nepal")
        page.reload()
        playwright.expect(page.locator("#model")).to_have_text("tiny")


def test_a_document_is_added_and_found(
    page: playwright.Page, server: Server, packaged_project: Project, url: str, tmp_path: Path
) -> None:
    page.goto(url)
    playwright.expect(page.locator("#model")).to_have_text("tiny")
    playwright.expect(page.locator("#documents")).to_be_hidden()
    live = Engine.load(packaged_project, "tiny", tmp_path / "live")
    try:
        with server(engine=live) as served:
            page.goto(served)
            page.get_by_label("Id", exact=True).fill("<b>oman</b>")
            page.get_by_label("Title").fill("<i>Oman</i>")
            page.get_by_label("Text", exact=True).fill(
                "Oman's capital is Muscat. \U0001f1f4\U0001f1f2 <script>alert(1)</script> It is hot."
            )
            page.get_by_role("button", name="Add").click()
            playwright.expect(page.locator("#added")).to_contain_text("<b>oman</b> is in the store, passages: 1")
            ask(page, "Oman's capital is Muscat.")
            shown = page.locator("article").filter(has_text="Muscat")
            playwright.expect(shown).to_contain_text("<i>Oman</i>")
            text = re.sub(r"-?\d+\.\d\d", "", shown.locator("p").inner_text())
            assert text == "Oman's capital is Muscat. \U0001f1f4\U0001f1f2 <script>alert(1)</script> It is hot."
    finally:
        live.close()


def test_neither_key_nor_question_gets_into_an_address(page: playwright.Page, url: str) -> None:
    """Nor is anybody else asked, whatever the page does."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    page.get_by_label("Key").fill("secret-key")
    ask(page, "Capital of Chad?")
    assert len(asked) > 4 and all(one.startswith((url, "data:")) for one in asked)
    assert not any("secret" in one or "Chad" in one for one in [*asked, page.url])


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_text_stands_out_from_what_is_behind_it(browser: playwright.Browser, url: str, scheme: str) -> None:
    """WCAG 2.1 AA: a contrast of 4.5 at least, chunks included."""
    page = browser.new_page(color_scheme=scheme)
    page.goto(url)
    page.get_by_label("p", exact=True).fill("0.5")
    ask(page, "What is the capital of Peru?")
    for selector in ("body", ".dim", "#send", "#passages small", KEPT, COMPRESSED, ".dim .kept"):
        assert contrast(page, selector) >= 4.5, selector
    page.close()


CONTRAST = """element => {
    const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
    const light = (color) => color.slice(0, 3).map((part) => part / 255).map(
        (part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4
    ).reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0);
    let behind = element;
    while (rgb(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
    const both = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
    const [low, high] = both.map((one) => light(rgb(one))).sort((one, other) => one - other);
    return (high + 0.05) / (low + 0.05);
}"""


def contrast(page: playwright.Page, selector: str) -> float:
    return float(page.locator(selector).first.evaluate(CONTRAST))
