"""Trainings that continue from a released checkpoint: one takes it over, the other trains on, the encoder frozen."""

import shutil
from pathlib import Path

import pytest
import torch

from refrag_platform.artifacts.digest import file_digest, folder_digest
from refrag_platform.model.refrag import RefragModel
from refrag_platform.project import Project
from refrag_platform.recipes import Recipe
from refrag_platform.stages import RELEASED, StageContext
from refrag_platform.training.core.artifact import write_training
from refrag_platform.training.cpt import train_cpt
from refrag_platform.training.reconstruction import train_reconstruction
from tests.conftest import ROOT
from tests.encoders import model_with, recipe_with
from tests.training.conftest import repeating_documents, write_corpus


@pytest.fixture
def context(recipe: Recipe, model: RefragModel, tmp_path: Path) -> StageContext:
    """Of `cpt`, with a released checkpoint in its scratch."""
    cpt = recipe.cpt.model_copy(update={"steps": 2, "batch_size": 2, "continue_from": "v1.0.0"})
    for name in ("content", "state"):
        (tmp_path / name).mkdir()
    corpus = write_corpus(tmp_path / "corpus", repeating_documents(64, 4, 8, range(10, 200)))
    made = StageContext(
        Project(ROOT),
        recipe.model_copy(update={"cpt": cpt}),
        "cpt",
        {"corpus": corpus},
        tmp_path / "content",
        tmp_path / "state",
        tmp_path,
    )
    assert made.released is None
    (made.work / RELEASED).mkdir()
    model.save(made.work / RELEASED, torch.float32)
    assert made.released == made.work / RELEASED
    return made


def test_cpt_trains_the_decoder_on_and_leaves_the_encoder(context: StageContext) -> None:
    assert context.released is not None
    before = RefragModel.load(context.released)
    assert train_cpt(context)["steps"] == 2
    after = RefragModel.load(context.out)
    assert after.encoder_digest() == before.encoder_digest()
    one, other = (folder_digest(folder / "decoder") for folder in (context.released, context.out))
    assert one != other
    assert any(
        not torch.equal(old, new)
        for old, new in zip(before.projection.parameters(), after.projection.parameters(), strict=True)
    ), "the projection is no part of the store's vectors, and trains"


def test_cpt_trains_on_for_the_rates_of_the_recipe(context: StageContext) -> None:
    encoder = context.recipe.encoder.model_copy(update={"rates": [1, 2]})
    context.recipe = context.recipe.model_copy(update={"encoder": encoder})
    assert context.released is not None and RefragModel.load(context.released).rates == (1,)
    train_cpt(context)
    assert RefragModel.load(context.out).rates == (1, 2)


def test_cpt_leaves_an_encoder_that_has_low_rank_updates_too(context: StageContext) -> None:
    model = model_with("layers, passage")
    folder = context.work / RELEASED
    shutil.rmtree(folder)
    folder.mkdir()
    model.save(folder)
    cpt = context.recipe.cpt.model_copy(update={"encoder_lora_rank": 2})
    context.recipe = recipe_with("layers, passage").model_copy(update={"cpt": cpt})
    train_cpt(context)
    assert RefragModel.load(context.out).encoder_digest() == model.eval().encoder_digest()


def test_reconstruction_takes_the_checkpoint_over(context: StageContext) -> None:
    assert context.released is not None
    context.stage = "reconstruction"
    figures = {"steps": 40, "first_loss": 4.0, "last_loss": 3.0, "last": {"vector_std": 0.5}}
    context.out, kept = context.released, context.out
    (context.work / "metrics.jsonl").touch()
    write_training(context, figures, {})
    (context.released / "inputs.json").write_text("{}")
    context.out = kept
    assert train_reconstruction(context) == {"steps": 40, "first_loss": 4.0, "last_loss": 3.0, "vector_std": 0.5}
    assert not (context.out / "inputs.json").exists()
    for name in ("encoder.safetensors", "training.json"):
        assert file_digest(context.out / name) == file_digest(context.released / name)
