"""Silence for what other libraries print while they work as they should."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

# Where DeepSpeed is installed, saving any model imports it; a tied head is saved once, with the embeddings.
EXPECTED = {"DeepSpeed": "Setting accelerator to CPU", "accelerate.utils.other": "Removed shared tensor"}


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' bars over weights, and without what EXPECTED lists. Warnings about the weights stay."""
    bars, loggers = transformers_logging.is_progress_bar_enabled(), [logging.getLogger(name) for name in EXPECTED]
    transformers_logging.disable_progress_bar()
    for logger in loggers:
        logger.addFilter(_says_something)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_says_something)
        if bars:
            transformers_logging.enable_progress_bar()


def _says_something(record: logging.LogRecord) -> bool:
    return EXPECTED[record.name] not in record.getMessage()
