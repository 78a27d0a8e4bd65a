"""Where things lie: the project's root, its models and the folder of each artifact.

models/NAME/recipe.yaml         what the model is made of
models/NAME/run/                what a run set over the recipe, and all settings as DVC watches them
models/NAME/STAGE/content/      the artifact: what DVC hashes, content only
models/NAME/STAGE/manifest.json beside it: inputs, settings, seed, commit, hardware, metrics
data/NAME/{corpus,chunks}/      the same for data
work/NAME/STAGE/                scratch of a stage that has not finished: resumable, never trusted
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from refrag_platform.errors import RecipeError, RefragError
from refrag_platform.recipes import (
    CONTROL_STAGES,
    ControlName,
    Layer,
    Recipe,
    control_settings,
    extended,
    read_layer,
    read_recipe,
    recipe_layers,
    resolve,
    split_name,
)

DIALS = "params.yaml"
DATA_STAGES = frozenset({"corpus", "chunks"})


@dataclass(frozen=True)
class Project:
    """A checkout of refrag-platform, or any folder with `models/` and `params.yaml` laid out like one."""

    root: Path

    @classmethod
    def find(cls, start: Path | None = None) -> Project:
        """The project around `start` (default: $REFRAG_ROOT, else the working directory).

        Raises:
            RefragError: no folder upwards has params.yaml and models/.
        """
        begin = (start or Path(os.environ.get("REFRAG_ROOT", "."))).resolve()
        for folder in (begin, *begin.parents):
            if (folder / DIALS).is_file() and (folder / "models").is_dir():
                return cls(folder)
        raise RefragError(
            f"{begin} is not inside a refrag project (no params.yaml with models/ beside it); "
            "change into the checkout or set REFRAG_ROOT"
        )

    def params(self) -> dict[str, Any]:
        """params.yaml as plain values."""
        return yaml.safe_load((self.root / DIALS).read_text(encoding="utf-8")) or {}

    def models(self) -> list[str]:
        """The models that DVC and Dagster run, in params.yaml's order."""
        return list(self.params()["models"])

    def recipes(self) -> list[str]:
        """Every model with a recipe, run or not."""
        return sorted(path.parent.name for path in (self.root / "models").glob("*/recipe.yaml"))

    def control(self, model: str) -> ControlName | None:
        """Whose control this is, and what it reads, by its name; None of a model with a recipe file of its own."""
        return None if (self.root / "models" / model / "recipe.yaml").is_file() else split_name(model)

    def recipe_path(self, model: str) -> Path:
        """The recipe's file; a control's is its model's."""
        control = self.control(model)
        return self.root / "models" / (control.model if control else model) / "recipe.yaml"

    def recipe(self, model: str) -> Recipe:
        """The recipe of `model` with params.yaml's overrides, and what a run set.

        Raises:
            RecipeError: there is no such recipe, or it is wrong.
        """
        path = self.recipe_path(model)
        recipe = resolve(path, self.recipe_layers(model))
        if recipe.name != model:
            raise RecipeError(f"{path}: name is {recipe.name!r}; it must equal its folder, {model!r}")
        return recipe

    def recipe_or_file(self, model: str) -> tuple[Recipe, Path]:
        """The recipe of `model`, or that of a recipe file as it stands there, and its folder.

        Raises:
            RecipeError: there is no such recipe, or it is wrong.
        """
        if Path(model).is_file():
            return read_recipe(Path(model)), Path(model).parent
        return self.recipe(model), self.recipe_path(model).parent

    def recipe_layers(self, model: str, of_runs: bool = True) -> list[Layer]:
        """What the recipe of `model` is made of, the weakest first; `of_runs`: with what a run set itself.

        Raises:
            RecipeError: there is no such recipe, or one of its files can't be read.
        """
        path, run = self.recipe_path(model), self.run_overrides(model)
        if not path.is_file():
            raise RecipeError(f"no model {model!r}; there are: {', '.join(self.recipes()) or 'none'}")
        if control := self.control(model):
            settings = Layer(f"controls.{control.kind}", control_settings(model, control.kind), {})
            layers = [*self.recipe_layers(control.model), settings]
        else:
            layers = recipe_layers(path)
        layers.append(read_layer(self.root / DIALS, "overrides", model))
        return [*layers, read_layer(run)] if of_runs and run.is_file() else layers

    def run_overrides(self, model: str) -> Path:
        """The settings that a run of `model` put over all others, from where it trains; not there if none did."""
        return self.root / "models" / model / "run" / "overrides.yaml"

    def resolved_recipe(self, model: str) -> Path:
        """The recipe of `model` as a file of all its settings, by whose sections DVC knows what is stale."""
        return self.root / "models" / model / "run" / "recipe.yaml"

    def shipped(self, model: str) -> Path:
        """The folder of weights that `continue_from: release` means: the recipe's own, or of one that it extends."""
        folders = [file.parent / "release" for file in extended(self.recipe_path(model))]
        return next((folder for folder in folders if folder.is_dir()), folders[0])

    def stage_dir(self, stage: str, model: str) -> Path:
        """The published folder of an artifact: `content/`, `manifest.json` and what lies beside them.

        A control has its model's artifacts of the stages that are none of its own.
        """
        if (control := self.control(model)) and stage not in CONTROL_STAGES:
            model = control.model
        return self.root / ("data" if stage in DATA_STAGES else "models") / model / stage

    def content(self, stage: str, model: str) -> Path:
        return self.stage_dir(stage, model) / "content"

    def work_dir(self, stage: str, model: str) -> Path:
        """The resumable scratch folder of a stage."""
        return self.root / "work" / model / stage

    def source_dir(self, model: str) -> Path:
        """Where a user drops documents of the `files` source."""
        return self.root / "data" / "sources" / self.recipe_path(model).parent.name

    def source_path(self, model: str, path: str | None) -> Path:
        """The folder or file of a `files` source whose `path` this is: $VARIABLES and ~ count; may not exist."""
        return self.source_dir(model) if path is None else self.root / Path(os.path.expandvars(path)).expanduser()
