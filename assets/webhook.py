"""A failed run is told to a webhook in Slack's shape: {"text": ...}. The URL is a secret: $REFRAG_WEBHOOK_URL."""

import json
import os
import urllib.error
import urllib.request

import dagster as dg

from refrag_platform.errors import RefragError

WEBHOOK = "REFRAG_WEBHOOK_URL"
# Where the UI is, for a link; set it where people open it under another name.
UI = "REFRAG_UI_URL"
LONGEST_REASON = 1500


@dg.run_failure_sensor(
    name="failure_webhook",
    default_status=dg.DefaultSensorStatus.RUNNING,
    description=f"Posts a failed run, and why it failed, to the webhook of ${WEBHOOK}; without it, nothing.",
)
def failure_webhook(context: dg.RunFailureSensorContext) -> None:
    if not os.environ.get(WEBHOOK):
        return
    run = context.dagster_run
    events = [event for event in context.get_step_failure_events() if event.step_failure_data]
    reasons = [f"{event.step_key}: {failure_reason(event)}" for event in events]
    model = run.tags.get("dagster/partition", "no model")
    address = os.environ.get(UI, "http://127.0.0.1:3001").rstrip("/")
    told = reasons or [context.failure_event.message or ""]
    lines = [f"{run.job_name} of {model} failed", *told, f"{address}/runs/{run.run_id}"]
    post("\n".join(line[:LONGEST_REASON] for line in lines))


def post(text: str) -> None:
    """Send a message to the webhook.

    Raises:
        RefragError: it can't be reached or refuses; the message does not hold the URL, which is a secret.
    """
    body = json.dumps({"text": text}).encode()
    try:
        request = urllib.request.Request(os.environ[WEBHOOK], body, {"Content-Type": "application/json"}, method="POST")
        with urllib.request.urlopen(request, timeout=10):
            return
    except urllib.error.URLError as error:
        raise RefragError(f"the webhook of ${WEBHOOK} did not take the message: {error.reason}") from None
    except (ValueError, OSError):
        raise RefragError(f"the webhook of ${WEBHOOK} is no URL that can be posted to, or does not answer") from None


def failure_reason(event: dg.DagsterEvent) -> str:
    """What a failed step said: the reason of a Failure, else the message of its exception."""
    data = event.step_failure_data
    if data.user_failure_data and data.user_failure_data.description:
        return data.user_failure_data.description
    # Dagster's own error says which step it was, its cause what happened.
    error = data.error
    while error and error.cause:
        error = error.cause
    return error.message.strip() if error else "no reason given"
