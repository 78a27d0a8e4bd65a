"""Silence for what other libraries print while they work as they should."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' bars over weights, and without DeepSpeed's word that it runs on a CPU.

    Where DeepSpeed is installed, saving any model imports it. Warnings about the weights stay.
    """
    bars, deepspeed = transformers_logging.is_progress_bar_enabled(), logging.getLogger("DeepSpeed")
    transformers_logging.disable_progress_bar()
    deepspeed.addFilter(_says_something)
    try:
        yield
    finally:
        deepspeed.removeFilter(_says_something)
        if bars:
            transformers_logging.enable_progress_bar()


def _says_something(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Setting accelerator to CPU")
