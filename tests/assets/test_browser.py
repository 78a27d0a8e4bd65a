"""What an ML engineer does in the UI of `make ui`, in a real browser on the tests' model.

$REFRAG_SCREENSHOTS names a folder that takes the pictures of docs/operations.md.
"""

import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from refrag_platform.dials import add_model
from refrag_platform.processes import free_port
from refrag_platform.project import Project
from refrag_platform.quality.results import DOCS_FOLDER, read_results
from refrag_platform.quality.suites import SUITES
from refrag_platform.stages import STAGES
from tests.assets.conftest import accept
from tests.conftest import ROOT, copy_project, init_repository
from tests.processes import answers, running, wait_for

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not CHROMIUM, reason="no chromium; Debian has it: apt-get install chromium"),
]
MODEL = "tiny"
SECOND = 1000
PAGE, LONGEST_RUN = 60 * SECOND, 900
ENDED = re.compile("^(Success|Failure|Canceled)$")
STATE = re.compile("^(Queued|Starting|Started|Success|Failure|Canceled)$")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A clone whose one model is tiny."""
    project = copy_project(tmp_path_factory.mktemp("ui") / "project")
    (project.root / "params.yaml").write_text("models: []\n")
    add_model(project, MODEL)
    (project.root / ".dagster_home").mkdir()
    for name in ("Makefile", ".dagster_home/dagster.yaml"):
        shutil.copy(ROOT / name, project.root / name)
    return init_repository(project)


@pytest.fixture(scope="module")
def address(project: Project) -> Iterator[str]:
    """The UI, as `make ui` starts it, the virtual environment and the ports apart."""
    ports = {"UI_PORT": free_port(), "DOCS_PORT": free_port()}
    command = ["make", "-o", "install", "ui", f"BIN={Path(sys.executable).parent}"]
    log = project.root.parent / "ui.log"
    command += [f"{name}={port}" for name, port in ports.items()]
    with running(command, log, project.root, REFRAG_ROOT=str(project.root)):
        url = f"http://127.0.0.1:{ports['UI_PORT']}"
        wait_for(lambda: answers(f"{url}/server_info"), 180, log)
        yield url


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[playwright.Page]:
    with playwright.sync_playwright() as tools:
        # Containers run as root, whom Chromium's sandbox refuses; the only pages are ours.
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1600, "height": 1000}, base_url=address)
        page.set_default_timeout(PAGE)
        playwright.expect.set_options(timeout=PAGE)
        yield page
        browser.close()


@pytest.fixture(scope="module")
def run(page: playwright.Page) -> str:
    """The address of a run of everything, started by clicks, once it is over."""
    page.goto("/")
    page.get_by_role("link", name="Jobs").click()
    page.get_by_role("link", name="retraining").first.click()
    return materialize_all(page)


def test_the_graph_shows_the_artifacts_in_order(page: playwright.Page) -> None:
    page.goto("/")
    page.get_by_role("link", name="lineage Lineage").click()
    nodes = page.locator("svg foreignObject [class*=AssetNode_assetName]")
    playwright.expect(nodes).to_have_count(len(STAGES) + 1)
    left = {node.inner_text(): node.bounding_box()["x"] for node in nodes.all()}
    assert set(left) == {*STAGES, "released"}
    assert all(left[source] < left[name] for name, stage in STAGES.items() for source in stage.inputs)
    assert left["package"] < left["released"]


def test_a_run_started_by_clicks_succeeds_and_its_checks_are_green(
    page: playwright.Page, project: Project, run: str
) -> None:
    page.goto(run)
    playwright.expect(page.get_by_text("Success", exact=True).first).to_be_visible()
    picture(page, "run")
    page.get_by_role("link", name="lineage Lineage").click()
    playwright.expect(page.get_by_role("img", name="run_success")).to_have_count(len(STAGES) + 1)
    picture(page, "graph")
    for stage in STAGES:
        results = read_results(project.stage_dir(stage, MODEL) / DOCS_FOLDER)
        assert not [result for result in results if result.blocking and not result.passed]
        page.goto(f"/assets/{stage}?view=checks")
        # A few steps on random weights need not reach what `evaluation` asks of a good model: yellow, blocks nothing.
        green = sum(result.passed for result in results) if stage == "evaluation" else len(SUITES[stage])
        playwright.expect(page.get_by_text("Succeeded", exact=True)).to_have_count(green)
    page.goto("/assets/finetuned?view=checks")
    playwright.expect(page.get_by_text("Passed", exact=True)).to_be_visible()


def test_a_check_leads_to_its_data_docs(page: playwright.Page, run: str) -> None:
    page.goto("/assets/finetuned?view=checks")
    with page.context.expect_page() as opened:
        page.get_by_role("link", name="finetuned/checks/index.html").click()
    playwright.expect(opened.value).to_have_title("Data Docs created by Great Expectations")
    opened.value.close()


def test_lineage_of_the_finetuned_model_is_one_click_away(page: playwright.Page, project: Project, run: str) -> None:
    page.goto(f"/assets/finetuned?view=partitions&partition={MODEL}")
    table = page.get_by_role("table").filter(has_text="input").last
    for source in STAGES["finetuned"].inputs:
        playwright.expect(table).to_contain_text(project.content(source, MODEL).relative_to(project.root).as_posix())
    page.get_by_role("tab", name="Lineage").or_(page.get_by_role("link", name="Lineage", exact=True)).last.click()
    shown = page.locator("svg foreignObject [class*=AssetNode_assetName]")
    for neighbour in (*STAGES["finetuned"].inputs, "finetuned", "evaluation", "package"):
        playwright.expect(shown.get_by_text(neighbour, exact=True)).to_be_visible()
    picture(page, "lineage")


def test_the_launchpad_explains_the_settings_of_a_retraining(page: playwright.Page) -> None:
    page.goto("/locations/refrag/jobs/retraining")
    page.locator("button:has([aria-label=arrow_drop_down])").last.click()
    page.get_by_text("Open launchpad").click()
    launchpad = page.get_by_role("dialog").filter(has_text="Launchpad (configure assets)")
    playwright.expect(launchpad).to_contain_text("mode: as set")
    playwright.expect(launchpad).to_contain_text("promote: true")
    playwright.expect(launchpad).to_contain_text("No errors")
    picture(page, "launchpad")


def test_schedule_and_sensor_switch_on(page: playwright.Page) -> None:
    page.goto("/automation")
    for name in ("retraining_schedule", "source_documents"):
        flip(page, name, on=True)
    picture(page, "automation")
    page.reload()
    for name in ("retraining_schedule", "source_documents"):
        flip(page, name, on=False)


def flip(page: playwright.Page, name: str, on: bool) -> None:
    """Of the automation page: a click on the switch turns it on, or off, which it was not before."""
    row = page.locator("[class*=ListItem_listItem__]").filter(has_text=name)
    state = playwright.expect(row.get_by_role("checkbox").last)
    state.to_be_checked(checked=not on)
    row.locator("[class*=formatSwitch]").click()
    state.to_be_checked(checked=on)


def test_a_planted_fault_turns_its_check_red_and_blocks_what_is_downstream(
    page: playwright.Page, project: Project, run: str
) -> None:
    facts = project.content("corpus", MODEL) / "corpus.json"
    facts.write_text(re.sub(r'"test": \d+', '"test": 1', facts.read_text()))
    accept(project, "corpus", MODEL)
    page.goto("/locations/refrag/jobs/retraining")
    page.goto(materialize_all(page))
    playwright.expect(page.get_by_text("Failure", exact=True).first).to_be_visible()
    playwright.expect(page.get_by_text(f"Not executed ({len(STAGES)})")).to_be_visible()
    page.goto("/assets/corpus?view=checks")
    page.get_by_text("counts", exact=True).first.click()
    playwright.expect(page.get_by_text("Failed", exact=True).first).to_be_visible()
    picture(page, "red")


def materialize_all(page: playwright.Page) -> str:
    """Of the job shown, for the one model; the address of the run once it is over."""
    page.get_by_role("button", name="Materialize all").click()
    page.get_by_placeholder("Select a partition").or_(page.get_by_text("Select a partition")).first.click()
    page.get_by_role("menu").last.get_by_text(MODEL, exact=True).first.click()
    # Elsewhere, so that the open menu hides nothing.
    page.get_by_text("Launch runs to materialize").click()
    page.get_by_role("button", name="Launch 1 run").click()
    page.get_by_text("View", exact=True).click()
    page.wait_for_url("**/runs/*")
    run, end = page.url, time.monotonic() + LONGEST_RUN
    while page.get_by_text(ENDED).count() == 0:
        assert time.monotonic() < end, page.get_by_role("main").inner_text()
        # A page that draws a running run takes half of the machine from it.
        page.goto("about:blank")
        time.sleep(15)
        page.goto(run)
        page.get_by_text(STATE).first.wait_for()
    return run


def picture(page: playwright.Page, name: str) -> None:
    if folder := os.environ.get("REFRAG_SCREENSHOTS"):
        # Fading notices and animated icons come to rest.
        page.wait_for_timeout(3 * SECOND)
        page.screenshot(path=Path(folder) / f"{name}.png", animations="disabled")
