"""The service's settings, from the environment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from refrag_platform.errors import RefragError
from refrag_platform.store.objects import object_url

KEYS = ("API_KEY", "API_KEYS", "API_KEYS_FILE")
LIMITS = ("RATE_LIMIT", "MAX_BODY", "MAX_WAITING", "DEADLINE", "UNREADY")
# A stream's client has this long after the deadline to take what was sent.
SECONDS_TO_READ = 5.0
VARIABLES = frozenset(f"REFRAG_{name}" for name in (*KEYS, *LIMITS, "STORE", "TABLES", "VLLM"))


@dataclass(frozen=True)
class ApiSettings:
    """Limits of the service.

    api_key, api_keys, api_keys_file: who may ask (`keys.Keys`); without any, clients of this machine alone.
    rate_limit: requests a minute of a key that has no number of its own; None: any. max_body: bytes. max_waiting:
    requests that may wait beside those that are being answered; further ones get 429. deadline: seconds from arrival
    to the last token. unready: seconds after SIGTERM in which requests are let in yet, while /readyz says 503 (under
    uvicorn alone). store: folder of the working copy to which documents are added; None: the store is served as it
    was made. tables: URL in an object store of search tables to be read instead of those in the package. vllm: whether
    vLLM runs the decoder.
    """

    api_key: str | None = None
    api_keys: str = ""
    api_keys_file: Path | None = None
    rate_limit: int | None = None
    max_body: int = 4 * 1024 * 1024
    max_waiting: int = 16
    deadline: float = 300.0
    unready: float = 0.0
    store: Path | None = None
    tables: str | None = None
    vllm: bool = False

    @property
    def longest(self) -> float:
        """Seconds that a request may take, its last bytes included."""
        return self.deadline + SECONDS_TO_READ

    @classmethod
    def from_environment(cls, values: Mapping[str, str]) -> ApiSettings:
        """Settings from `VARIABLES`.

        Raises:
            RefragError: a number is not above zero, a path isn't whole, two stores are named, or a switch is neither
                0 nor 1.
        """

        def number(name: str, default: float, zero: bool = False) -> float:
            text = values.get(name, "")
            try:
                value = float(text) if text else default
            except ValueError:
                value = -1.0
            if not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
                raise RefragError(f"{name} is {text!r}; it must be a number above 0{', or 0' if zero else ''}")
            return value

        def path(name: str) -> Path | None:
            text = values.get(name)
            if text and not Path(text).is_absolute():
                # The server's working directory isn't the shell's.
                raise RefragError(f"{name} is {text!r}; give the whole path, from /")
            return Path(text) if text else None

        if values.get("REFRAG_STORE") and values.get("REFRAG_TABLES"):
            raise RefragError("REFRAG_STORE and REFRAG_TABLES are both set; a working copy has tables of its own")
        if values.get("REFRAG_VLLM", "") not in ("", "0", "1"):
            raise RefragError(f"REFRAG_VLLM is {values['REFRAG_VLLM']!r}; it must be 1 (vLLM runs the decoder) or 0")
        return cls(
            api_key=values.get("REFRAG_API_KEY") or None,
            api_keys=values.get("REFRAG_API_KEYS", ""),
            api_keys_file=path("REFRAG_API_KEYS_FILE"),
            rate_limit=math.ceil(number("REFRAG_RATE_LIMIT", 1)) if values.get("REFRAG_RATE_LIMIT") else None,
            max_body=int(number("REFRAG_MAX_BODY", cls.max_body)),
            max_waiting=int(number("REFRAG_MAX_WAITING", cls.max_waiting)),
            deadline=number("REFRAG_DEADLINE", cls.deadline),
            unready=number("REFRAG_UNREADY", cls.unready, zero=True),
            store=path("REFRAG_STORE"),
            tables=object_url(values["REFRAG_TABLES"], "REFRAG_TABLES") if values.get("REFRAG_TABLES") else None,
            vllm=values.get("REFRAG_VLLM") == "1",
        )
