"""Recipes: what a model is made of and how it is trained, typed and checked at load.

A recipe is `models/NAME/recipe.yaml`, over another one if it `extends` that; `params.yaml` may override single keys
of it under `overrides.NAME`. `refrag recipes show NAME` prints the result, every key explained.
"""

from refrag_platform.recipes.after_training import EvaluationRecipe, ReleaseRecipe, ServingRecipe
from refrag_platform.recipes.controls import (
    CONTROL_STAGES,
    Control,
    ControlName,
    ControlRecipe,
    TrainedSystem,
    control_name,
    control_settings,
    split_name,
)
from refrag_platform.recipes.data import ChunksRecipe, CorpusRecipe, SourceRecipe
from refrag_platform.recipes.layers import BESIDE, Layer, extended, read_layer, recipe_layers
from refrag_platform.recipes.loading import merge, origins, read_recipe, resolve
from refrag_platform.recipes.parts import DecoderRecipe, EncoderRecipe, ProjectionRecipe
from refrag_platform.recipes.reading import ReadingRecipe
from refrag_platform.recipes.recipe import Recipe
from refrag_platform.recipes.training import (
    CptRecipe,
    CurriculumRecipe,
    FinetunedRecipe,
    PolicyRecipe,
    ReconstructionRecipe,
    TrainingRecipe,
    TrainsDecoder,
    TrainsEncoder,
)

__all__ = [
    "BESIDE",
    "CONTROL_STAGES",
    "ChunksRecipe",
    "Control",
    "ControlName",
    "ControlRecipe",
    "CorpusRecipe",
    "CptRecipe",
    "CurriculumRecipe",
    "DecoderRecipe",
    "EncoderRecipe",
    "EvaluationRecipe",
    "FinetunedRecipe",
    "Layer",
    "PolicyRecipe",
    "ProjectionRecipe",
    "ReadingRecipe",
    "Recipe",
    "ReconstructionRecipe",
    "ReleaseRecipe",
    "ServingRecipe",
    "SourceRecipe",
    "TrainedSystem",
    "TrainingRecipe",
    "TrainsDecoder",
    "TrainsEncoder",
    "control_name",
    "control_settings",
    "extended",
    "merge",
    "origins",
    "read_layer",
    "read_recipe",
    "recipe_layers",
    "resolve",
    "split_name",
]
