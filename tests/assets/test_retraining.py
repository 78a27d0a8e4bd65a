"""When retraining starts by itself: the schedule, new documents, and what is told when a run fails."""

import http.server
import json
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from dagster import (
    DagsterEventType,
    DagsterInstance,
    RunRequest,
    build_run_status_sensor_context,
    build_schedule_context,
    build_sensor_context,
)

from assets.definitions import defs
from assets.jobs import retraining_schedule, source_documents
from assets.materialize import materialize_all
from assets.settings import retraining_settings
from assets.webhook import WEBHOOK, failure_webhook, post
from refrag_platform.errors import RefragError
from refrag_platform.project import Project
from tests.assets.conftest import MODEL, plant_stage
from tests.conftest import ROOT
from tests.web import Silent, served

SUNDAY = datetime(2030, 1, 6, 3, tzinfo=UTC)
REPOSITORY = defs.get_repository_def()


def configure(project: Project, text: str) -> None:
    with (project.root / "params.yaml").open("a") as stream:
        stream.write(f"\nretraining: {text}\n")


def look(cursor: str | None, instance: DagsterInstance) -> tuple[list[RunRequest], str]:
    """One evaluation of the sensor: what it starts, and its new cursor."""
    context = build_sensor_context(instance, cursor=cursor, repository_def=REPOSITORY)
    tick = source_documents.evaluate_tick(context)
    assert tick.cursor is not None
    return list(tick.run_requests or []), tick.cursor


def test_the_schedule_runs_every_model_with_the_settings_and_is_off(planted: Project) -> None:
    configure(planted, "{mode: continue, promote: false}")
    with DagsterInstance.ephemeral() as instance:
        context = build_schedule_context(instance, scheduled_execution_time=SUNDAY, repository_def=REPOSITORY)
        requests = retraining_schedule.evaluate_tick(context).run_requests or []
    assert [request.partition_key for request in requests] == Project(ROOT).models()
    config = requests[0].run_config["ops"]
    assert config["reconstruction"]["config"] == {"mode": "continue"}
    assert config["released"]["config"] == {"promote": False}
    assert retraining_schedule.default_status.value == "STOPPED"
    assert (retraining_schedule.cron_schedule, retraining_schedule.execution_timezone) == ("0 3 * * 0", "UTC")


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ("{cron: weekly}", r"retraining.cron is 'weekly'; not a cron string"),
        ("{timezone: Mars/Base}", r"retraining.timezone is 'Mars/Base'; no time zone"),
        ("{mode: quick}", r"retraining.mode is 'quick'"),
        ("{when: never}", r"retraining.when is .never.; unknown key, allowed here: cron, timezone"),
    ],
)
def test_wrong_settings_are_named(planted: Project, settings: str, why: str) -> None:
    configure(planted, settings)
    with pytest.raises(RefragError, match=why):
        retraining_settings(planted)


def test_the_launchpad_offers_typed_settings_with_help() -> None:
    schema = defs.resolve_job_def("retraining").run_config_schema.config_type.fields["ops"].config_type.fields
    fields = {
        name: schema[name].config_type.fields["config"].config_type.fields for name in ("reconstruction", "released")
    }
    mode, promote = fields["reconstruction"]["mode"], fields["released"]["promote"]
    assert [value.config_value for value in mode.config_type.enum_values] == ["as set", "full", "continue"]
    assert "encoder frozen" in str(mode.description) and "release.tolerances" in str(promote.description)


@pytest.mark.slow
def test_documents_start_one_run_per_change_however_many_files(planted: Project, instance: DagsterInstance) -> None:
    assert source_documents.default_status.value == "STOPPED"
    folder = planted.source_dir(MODEL)
    assert materialize_all(MODEL, ["corpus"])
    started, cursor = look(None, instance)
    assert started == [] and look(cursor, instance) == ([], cursor), "the corpus holds what is there"
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"Document {number}.")
    started, cursor = look(cursor, instance)
    assert started == [], "files may still be arriving"
    started, cursor = look(cursor, instance)
    assert [request.partition_key for request in started] == [MODEL]
    keys = [request.run_key for request in started]
    assert look(cursor, instance) == ([], cursor)
    for text in ("Changed.", "Document 3."):  # back to what it was is a change too
        (folder / "3.txt").write_text(text)
        _, cursor = look(cursor, instance)
        started, cursor = look(cursor, instance)
        keys += [request.run_key for request in started]
    assert len(set(keys)) == 3


def test_documents_that_no_corpus_holds_yet_are_new(planted: Project, instance: DagsterInstance) -> None:
    _, cursor = look(None, instance)
    started, _ = look(cursor, instance)
    assert [request.partition_key for request in started] == [MODEL]


class Hook(Silent):
    """Takes messages as Slack does; /refuse does not."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.messages.append(json.loads(body))  # type: ignore[attr-defined]
        self.send_response(403 if self.path == "/refuse" else 200)
        self.end_headers()


@pytest.fixture
def hook() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    server.messages = []  # type: ignore[attr-defined]
    with served(server):
        yield server


def test_a_failed_run_is_told_to_the_webhook(
    planted: Project,
    instance: DagsterInstance,
    hook: http.server.ThreadingHTTPServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant_stage(planted, "corpus", "raise ValueError('no such text')")
    assert not materialize_all(MODEL, ["corpus"])
    (run,) = instance.get_runs()
    events = [entry.dagster_event for entry in instance.all_logs(run.run_id) if entry.dagster_event]
    (failure,) = [event for event in events if event.event_type is DagsterEventType.RUN_FAILURE]
    context = build_run_status_sensor_context("failure_webhook", failure, instance, run).for_run_failure()
    monkeypatch.delenv(WEBHOOK, raising=False)
    failure_webhook(context)
    assert hook.messages == []  # type: ignore[attr-defined]
    monkeypatch.setenv(WEBHOOK, f"http://127.0.0.1:{hook.server_port}/services/secret")
    monkeypatch.setenv("REFRAG_UI_URL", "https://dagster.example/")
    failure_webhook(context)
    (message,) = hook.messages  # type: ignore[attr-defined]
    assert list(message) == ["text"]
    first, second, *_, last = message["text"].splitlines()
    assert first == f"refrag_pipeline of {MODEL} failed"
    assert second.startswith("corpus: ") and "ended with status 1" in second
    assert last == f"https://dagster.example/runs/{run.run_id}"


@pytest.mark.parametrize("path", ["/refuse", "nonsense/secret", ""])
def test_a_webhook_that_fails_does_not_give_its_address_away(
    hook: http.server.ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    address = (
        f"http://127.0.0.1:{hook.server_port}{path}" if path.startswith("/") else path or "http://127.0.0.1:1/secret"
    )
    monkeypatch.setenv(WEBHOOK, address)
    with pytest.raises(RefragError, match=WEBHOOK) as raised:
        post("hello")
    assert address not in str(raised.value) and "secret" not in str(raised.value)
