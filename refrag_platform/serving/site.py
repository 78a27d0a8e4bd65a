"""The service, whatever server runs it: the application with its settings, and the model that is loaded behind it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from refrag_platform.serving.api import create_app
from refrag_platform.serving.logs import log_to_stderr
from refrag_platform.serving.settings import ApiSettings
from refrag_platform.serving.tracing import tracer_of

if TYPE_CHECKING:
    from refrag_platform.serving.engine import Engine

logger = logging.getLogger("refrag.serving")


class Site:
    """One model's application (`app`), with the settings of the environment.

    The model is loaded in the background: the application answers at once, and for the model once it is there.
    """

    def __init__(self, model: str, tag: str | None = None) -> None:
        """Args, Raises: as of `create_app`; a wrong setting is a RefragError too."""
        log_to_stderr(as_json=os.environ.get("REFRAG_LOG") == "json")
        self.settings = ApiSettings.from_environment(os.environ)
        self.app = create_app(model, self.settings, tag, tracer_of(os.environ))
        self._name = tag or model

    def load(self, open_engine: Callable[[ApiSettings], Engine]) -> None:
        """Open the engine on a thread."""
        threading.Thread(target=self._load, args=(open_engine,), name="load-model", daemon=True).start()

    @property
    def ready(self) -> bool:
        """Whether the model answers: it is loaded, with the store that its encoder made, and its device works."""
        engine: Engine | None = self.app.state.engine
        return engine is not None and engine.alive

    @property
    def alive(self) -> bool:
        """Whether the model answers or may yet; else the process must be started anew."""
        return self.app.state.failure is None and (self.app.state.engine is None or self.ready)

    def _load(self, open_engine: Callable[[ApiSettings], Engine]) -> None:
        try:
            engine = open_engine(self.settings)
            logger.info("%s is ready on %s; %s", self._name, engine.bundle.model.device, engine.memory())
            self.app.state.engine = engine
        except Exception as error:
            self.app.state.failure = str(error)
            logger.exception("%s can't be loaded", self._name)
