"""The tiny model on the CPU and, if there is one, a GPU."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from refrag_platform.decoding.runner import DecoderRunner
from refrag_platform.errors import RefragError
from refrag_platform.model.refrag import RefragModel
from refrag_platform.project import Project
from refrag_platform.recipes import read_recipe
from tests.conftest import ROOT

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
RECIPES = ["tiny", pytest.param("smollm2-135m", marks=pytest.mark.slow)]
# Where weights lie elsewhere, on a machine without a network say: REFRAG_TEST_RECIPE=/path/recipe.yaml.
if elsewhere := os.environ.get("REFRAG_TEST_RECIPE"):
    RECIPES.append(pytest.param(elsewhere, marks=pytest.mark.slow, id="elsewhere"))


@pytest.fixture(scope="session", params=RECIPES)
def recipe(request: pytest.FixtureRequest) -> str:
    """tiny has random weights, the others real ones."""
    return str(request.param)


@pytest.fixture(scope="session", params=DEVICES)
def model(request: pytest.FixtureRequest, recipe: str) -> RefragModel:
    """An untrained model in float32."""
    return create(recipe).to(request.param)


def create(recipe: str) -> RefragModel:
    """The model of a recipe, by name or file, where its weights are to be had."""
    project = Project(ROOT)
    try:
        if Path(recipe).is_absolute():
            return RefragModel.create(read_recipe(Path(recipe)), Path(recipe).parent).eval()
        return RefragModel.create(project.recipe(recipe), project.recipe_path(recipe).parent).eval()
    except RefragError as error:
        pytest.skip(str(error))


WAYS = ["exact", "padded", *(["graphed"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="session", params=WAYS)
def make_runner(request: pytest.FixtureRequest, model: RefragModel) -> Callable[..., DecoderRunner]:
    """A runner in each of its ways: nothing padded, padded shapes, and compiled graphs of these."""
    graphed = request.param == "graphed"
    if graphed and model.device.type == "cpu":
        pytest.skip("graphs are for GPUs")

    def make(max_positions: int = 200, max_batch: int = 4) -> DecoderRunner:
        return DecoderRunner(
            model.decoder,
            max_positions=max_positions,
            max_batch=max_batch,
            compile=graphed,
            cuda_graphs=graphed,
            padded=request.param != "exact",
            dynamic=True,
        )

    return make


@torch.inference_mode()
def plain_logits(model: RefragModel, embeds: Tensor, token_ids: list[int] = []) -> Tensor:  # noqa: B006
    """What the decoder itself says after embeds [N, d] and tokens, without a cache: [vocabulary]."""
    tokens = model.decoder.get_input_embeddings()(torch.tensor(token_ids, dtype=torch.long, device=model.device))
    return model.decoder(inputs_embeds=torch.cat([embeds, tokens])[None], use_cache=False).logits[0, -1]


def random_embeds(model: RefragModel, length: int, seed: int = 0) -> Tensor:
    """Token embeddings of random tokens, [length, d]."""
    generator = torch.Generator().manual_seed(seed)
    weight = model.decoder.get_input_embeddings().weight
    return weight[torch.randint(len(weight), (length,), generator=generator).to(weight.device)].detach()
