"""The service's log on stderr: lines for people or, with REFRAG_LOG=json, an object a line. Neither has prompts."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

LINE = "%(asctime)s [%(levelname)s] [%(name)s] %(message)s"
# What `Observe` tells of a request beside the message.
FIELDS = ("request_id", "method", "path", "endpoint", "status", "milliseconds")


class JsonLines(logging.Formatter):
    """A record as a JSON object: time (UTC), level, logger, message, what is known of its request, error."""

    def format(self, record: logging.LogRecord) -> str:
        told = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{name: getattr(record, name) for name in FIELDS if hasattr(record, name)},
        }
        if record.exc_info:
            told["error"] = self.formatException(record.exc_info)
        return json.dumps(told)


def log_to_stderr(as_json: bool) -> None:
    """Show what this package says from INFO on: BentoML and uvicorn show their own loggers' alone."""
    ours = logging.getLogger("refrag")
    if not ours.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(JsonLines() if as_json else logging.Formatter(LINE))
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)
        ours.propagate = False
