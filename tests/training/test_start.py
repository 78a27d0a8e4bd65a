"""A pipeline that starts from the release: its artifacts are the release's, and follow it when it changes."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.bundle.work import work_to_do
from refrag_platform.compact.coding import Coding
from refrag_platform.compact.packing import Codings, load_packed, pack
from refrag_platform.compact.record import training_figures
from refrag_platform.errors import ArtifactError, RecipeError, RefragError
from refrag_platform.history.freshness import is_current
from refrag_platform.lineage.origin import origin
from refrag_platform.model.policy import PolicyNetwork
from refrag_platform.model.refrag import RefragModel
from refrag_platform.project import Project
from refrag_platform.runner import run_stage

MODEL = "tiny"
STARTED = ("reconstruction", "cpt", "policy")
FIGURES = {"steps": 900, "first_loss": 7.0, "last_loss": 3.0, "last": {"own_loss": 3.1}}


def start_from_release(project: Project, stages: tuple[str, ...] = STARTED) -> None:
    params = project.params()
    params["overrides"][MODEL] |= {stage: {"continue_from": "release"} for stage in stages}
    (project.root / "params.yaml").write_text(yaml.safe_dump(params))


def write_release(project: Project, seed: int, with_policy: bool = True) -> None:
    """A release of weights that have moved, as if trained elsewhere."""
    torch.manual_seed(seed)
    recipe, base = project.recipe(MODEL), project.recipe_path(MODEL).parent
    model, folder = RefragModel.create(recipe, base), project.root / "trained"
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.02 * torch.randn_like(parameter))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    model.save(folder)
    if with_policy:
        PolicyNetwork(model.vector_dim, 32, 2, 2, recipe.policy.share_kept).save(folder)
    codings = Codings(Coding(8), Coding(8), Coding(0))
    figures = dict.fromkeys(STARTED, FIGURES)
    pack(folder, recipe, base, base / "release", codings, training=figures, replace=True)


def test_the_artifacts_are_the_releases_and_follow_it(project: Project) -> None:
    write_release(project, seed=1)
    start_from_release(project)
    for stage in ("corpus", "reconstruction", "cpt", "finetuned", "policy"):
        run_stage(project, stage, MODEL)
    base = project.recipe_path(MODEL).parent
    model, policy = load_packed(base / "release", project.recipe(MODEL), base)
    assert policy is not None
    made = RefragModel.load(project.content("cpt", MODEL))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(made.state_dict()[name], tensor, msg=name)
    kept = load_file(project.content("policy", MODEL) / "policy.safetensors")
    torch.testing.assert_close(kept, dict(policy.state_dict()))
    for stage in STARTED:
        manifest = Manifest.read(project.stage_dir(stage, MODEL))
        assert manifest.metrics["steps"] == 900 and manifest.metrics["last_loss"] == 3.0
        assert [source.path for source in manifest.sources if "release" in source.path] == [
            f"models/{MODEL}/release/manifest.json"
        ]
        # Settings of a training that didn't take place would contradict the figures of the one that did.
        assert set(manifest.settings[stage]) == {"continue_from", "precision"}
        assert origin(manifest) == f"900 steps; taken as it is from models/{MODEL}/release"
        assert run_stage(project, stage, MODEL).cached
    write_release(project, seed=2)
    for stage in STARTED:
        assert not is_current(project, stage, MODEL)


def test_cpt_trains_on_from_the_release_where_reconstruction_alone_takes_it(project: Project) -> None:
    write_release(project, seed=1, with_policy=False)
    start_from_release(project, ("reconstruction",))
    for stage in ("corpus", "reconstruction", "cpt"):
        run_stage(project, stage, MODEL)
    made = Manifest.read(project.stage_dir("cpt", MODEL))
    assert made.metrics["steps"] == project.recipe(MODEL).cpt.steps
    before, after = (RefragModel.load(project.content(stage, MODEL)) for stage in ("reconstruction", "cpt"))
    assert not torch.equal(before.projection.outer.weight, after.projection.outer.weight)


def test_a_control_of_a_model_that_goes_on_starts_where_it_does(project: Project) -> None:
    write_release(project, seed=1)
    start_from_release(project, ("reconstruction",))
    params, control = project.params(), f"{MODEL}--full"
    params["overrides"][MODEL] |= {"controls": {"full": {"start": "release"}}}
    params["overrides"][control] = {"cpt": {"steps": 1, "decoder_learning_rate": 1e-9}}
    (project.root / "params.yaml").write_text(yaml.safe_dump(params))
    run_stage(project, "corpus", MODEL)
    with work_to_do(project, [control], "cpt") as work:
        assert f"models/{MODEL}/release/decoder.safetensors" in work.members
    run_stage(project, "cpt", control)
    base = project.recipe_path(MODEL).parent
    model, _ = load_packed(base / "release", project.recipe(MODEL), base)
    made = RefragModel.load(project.content("cpt", control))
    for name, tensor in model.decoder.state_dict().items():
        torch.testing.assert_close(made.decoder.state_dict()[name], tensor, msg=name)
    assert f"models/{MODEL}/release/manifest.json" in {
        source.path for source in Manifest.read(project.stage_dir("cpt", control)).sources
    }
    write_release(project, seed=2)
    assert not is_current(project, "cpt", control)


def test_what_the_release_lacks_is_named(project: Project) -> None:
    start_from_release(project)
    run_stage(project, "corpus", MODEL)
    with pytest.raises(ArtifactError, match=r"holds no packed weights: manifest\.json"):
        run_stage(project, "reconstruction", MODEL)
    write_release(project, seed=1, with_policy=False)
    for stage in ("reconstruction", "cpt", "finetuned"):
        run_stage(project, stage, MODEL)
    with pytest.raises(ArtifactError, match=r"holds no policy; leave policy\.continue_from out"):
        run_stage(project, "policy", MODEL)


def test_a_release_of_another_shape_is_refused(project: Project) -> None:
    """The base weights are the same: only the settings tell."""
    write_release(project, seed=1)
    params = project.params()
    params["overrides"][MODEL]["projection"] = {"activation": "relu"}
    (project.root / "params.yaml").write_text(yaml.safe_dump(params))
    base = project.recipe_path(MODEL).parent
    with pytest.raises(ArtifactError, match=r"other settings than the recipe tiny has: projection\.activation"):
        load_packed(base / "release", project.recipe(MODEL), base)


def test_a_policy_of_other_vectors_is_refused(project: Project) -> None:
    start_from_release(project, stages=("policy",))
    with pytest.raises(RecipeError, match="a policy reads the vectors of its own encoder"):
        project.recipe(MODEL)


def test_figures_come_from_summaries_and_missing_ones_are_named() -> None:
    assert training_figures(json.loads(json.dumps(FIGURES)) | {"seconds": 3.0}) == FIGURES
    with pytest.raises(RefragError, match=r"no last_loss; give a summary\.json"):
        training_figures({"steps": 1, "first_loss": 2.0})
