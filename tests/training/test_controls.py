"""Controls: trained by the model's own stages, from its corpus and the untrained decoder, at the best rate."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from refrag_platform.artifacts.digest import file_digest
from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.model.refrag import RefragModel
from refrag_platform.project import Project
from refrag_platform.runner import run_stage
from refrag_platform.stages import stages_of
from tests.conftest import copy_project
from tests.planted import MODEL, override

pytestmark = pytest.mark.slow
RATES = [1e-8, 5e-3]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with tiny's corpus, and two of its controls in place of tiny itself."""
    project = copy_project(tmp_path_factory.mktemp("controls") / "project")
    recipe = project.recipe_path(MODEL)
    recipe.write_text(f"{recipe.read_text()}controls: {{full: {{}}, plain: {{learning_rates: {RATES}}}}}\n")
    override(project, "corpus", {"sources": [{"kind": "factbook", "documents": 24}]})
    override(project, "cpt", {"steps": 4})
    override(project, "finetuned", {"steps": 8})
    run_stage(project, "corpus", MODEL)
    for kind in ("full", "plain"):
        for stage in stages_of(project, f"{MODEL}--{kind}"):
            run_stage(project, stage.name, f"{MODEL}--{kind}")
    return project


def decoder(folder: Path) -> str:
    return file_digest(folder / "decoder" / "model.safetensors")


def test_a_control_trains_the_untrained_decoder_alone_and_makes_no_corpus(trained: Project, tmp_path: Path) -> None:
    recipe = trained.recipe(MODEL)
    untrained = RefragModel.create(recipe, trained.recipe_path(MODEL).parent)
    untrained.save(tmp_path)
    decoders = {decoder(tmp_path)}
    for kind in ("full", "plain"):
        for stage in ("cpt", "finetuned"):
            folder = trained.content(stage, f"{MODEL}--{kind}")
            before, after = (load_file(place / "encoder.safetensors") for place in (tmp_path, folder))
            assert all(before[name].equal(after[name]) for name in before), "no vector is read"
            decoders.add(decoder(folder))
    assert len(decoders) == 5
    assert [folder.name for folder in (trained.root / "data").iterdir() if (folder / "corpus").exists()] == [MODEL]


def test_the_best_rate_on_validation_questions_is_kept(trained: Project) -> None:
    metrics = Manifest.read(trained.stage_dir("finetuned", f"{MODEL}--plain")).metrics
    losses = {rate: metrics[f"validation_loss_at_{rate:g}"] for rate in RATES}
    assert losses[5e-3] < losses[1e-8], "hardly anything is learned at the other"
    assert metrics["learning_rate"] == 5e-3 and metrics["last_loss"] < metrics["first_loss"]
