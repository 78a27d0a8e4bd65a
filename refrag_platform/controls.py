"""Which trained controls a model may be held against: those that its recipe would train now, from its corpus."""

from __future__ import annotations

from dataclasses import dataclass, field

from refrag_platform.artifacts.manifest import FILE_NAME, Manifest
from refrag_platform.errors import RecipeError
from refrag_platform.project import Project
from refrag_platform.recipes import Control, Recipe, control_name
from refrag_platform.stages import SHIPPED, STAGES, inputs_of, settings_of


@dataclass
class Controls:
    """The controls of a recipe whose artifact of a stage is in place, by what they read.

    `matched`: made from today's settings, seed and inputs. `unmatched`: why each of the others was not.
    """

    matched: dict[Control, Manifest] = field(default_factory=dict)
    unmatched: dict[Control, str] = field(default_factory=dict)


def trained_controls(project: Project, recipe: Recipe, stage: str) -> Controls:
    """The controls of a recipe that the stage has trained; the bytes are not read.

    Raises:
        ArtifactError: a manifest is damaged.
    """
    controls = Controls()
    for kind in recipe.controls:
        folder = project.stage_dir(stage, control_name(recipe.name, kind))
        if (folder / FILE_NAME).is_file():
            manifest = Manifest.read(folder)
            if reason := _difference(project, manifest):
                controls.unmatched[kind] = reason
            else:
                controls.matched[kind] = manifest
    return controls


def require_matched_start(project: Project, control: str) -> None:
    """Refuse a control that starts elsewhere than its model does: one of them would be trained for more steps.

    Raises:
        RecipeError: it is one.
    """
    name = project.control(control)
    if not name:
        return
    recipe = project.recipe(name.model)
    declared = {str(kind): control_recipe for kind, control_recipe in recipe.controls.items()}.get(name.kind)
    if declared is None:  # The control's own recipe says so.
        return
    start, cpt = recipe.reconstruction.continue_from, recipe.cpt.continue_from
    if declared.start == SHIPPED and (start != SHIPPED or cpt is not None):
        raise RecipeError(
            f"{control} would be trained for more steps than {name.model}: controls.{name.kind}.start is "
            f"{declared.start!r}, reconstruction.continue_from {start!r}, cpt.continue_from {cpt!r}: no fair "
            f"comparison; leave controls.{name.kind}.start out, or let {name.model} start from the release too, and "
            "train its cpt"
        )
    if start is not None and declared.start != SHIPPED:
        mend = f"set controls.{name.kind}.start: {SHIPPED}, or " if start == SHIPPED and cpt is None else ""
        raise RecipeError(
            f"{control} would be trained for fewer steps than {name.model}, whose reconstruction.continue_from is "
            f"{start!r}: no fair comparison; {mend}declare it in a recipe that starts from untrained weights"
        )


def _difference(project: Project, manifest: Manifest) -> str | None:
    """What a control was made from otherwise than it would be now."""
    stage, control = STAGES[manifest.stage], manifest.model
    try:
        require_matched_start(project, control)
        recipe = project.recipe(control)
    except RecipeError as error:
        return str(error)
    if manifest.settings != settings_of(stage, recipe) or manifest.seed != recipe.seed:
        return "its settings or its seed are others now"
    for name in inputs_of(project, stage, control):
        folder = project.stage_dir(name, control)
        now = Manifest.read(folder).hash if (folder / FILE_NAME).is_file() else None
        # Without a corpus in place the model is judged on windows and questions that are given.
        if now is not None and now != manifest.inputs[name].hash:
            return f"its {STAGES[name].title} is another now"
    return None
