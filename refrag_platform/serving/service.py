"""The BentoML service: BentoML's own /healthz, /livez and /readyz; all else is the application's (`api`).

BentoML's stock page loads a third party's tag manager, and neither it nor BentoML's metrics ask for a key.

    bentoml build --arg model_tag=refrag-tiny:0123456789abcdef     (`refrag run package` does it)
    bentoml serve refrag-tiny:... --host 127.0.0.1

BentoML reads a service from the module that defines it, so this one module does its work at import.
The model is loaded in the background: /livez answers at once, /readyz and /v1 once it is loaded.
"""

from __future__ import annotations

from pathlib import Path

import bentoml
from bentoml._internal.utils.args import set_arguments
from bentoml.models import BentoModel
from pydantic import BaseModel, ConfigDict

from refrag_platform.serving.guard import OnlyHealth
from refrag_platform.serving.package import load_packaged, model_name, packaged_model
from refrag_platform.serving.site import Site


class Arguments(BaseModel):
    """`--arg NAME=VALUE` of `bentoml build` and `bentoml serve`; a Bento remembers those it was built with.

    model_tag: exact tag of the model; default the newest refrag model of the store. gpus: GPUs to reserve;
    default one where there is one.
    """

    model_config = ConfigDict(protected_namespaces=())

    model_tag: str = ""
    gpus: int | None = None


arguments = bentoml.use_arguments(Arguments)
model_tag = packaged_model(arguments.model_tag)
# A Bento built without --arg must serve the model it was built with, not a newer one.
set_arguments({"model_tag": model_tag}, override=False)
# Asked of the kernel: importing torch would double the time that BentoML's supervisor takes to start.
gpus = int(any(Path("/dev").glob("nvidia[0-9]*"))) if arguments.gpus is None else arguments.gpus
site = Site(model_name(model_tag), model_tag)


@bentoml.service(
    name="refrag",
    workers=1,
    resources={"gpu": gpus} if gpus else {},
    # Above the application's own limit, whose answers have OpenAI's shape and a Retry-After.
    traffic={"timeout": site.settings.deadline + 30},
    # The application has its own: by route, and with the request's id.
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
)
class RefragService:
    """A decoder that reads retrieved passages as chunk vectors (REFRAG, arXiv 2509.01092)."""

    model = BentoModel(model_tag)

    def __init__(self) -> None:
        folder = Path(self.model.path)
        site.load(lambda settings: load_packaged(folder, settings.store, settings.tables, settings.vllm))

    def __is_ready__(self) -> bool:
        return site.ready

    def __is_alive__(self) -> bool:
        return site.alive


# Inside BentoML's own timeout, outside all of its routes.
RefragService.add_asgi_middleware(OnlyHealth, site=site.app)  # type: ignore[attr-defined]
