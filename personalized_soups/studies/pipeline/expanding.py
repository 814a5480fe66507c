"""Make the steps of a run from its recipe: each for every target, or for every combination of sides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from personalized_soups.adapters.fingerprint import base_fingerprint
from personalized_soups.bases.place import place_of
from personalized_soups.declare import run_steps
from personalized_soups.declare.base_table import named_bases
from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.loader import load
from personalized_soups.declare.run_recipe import RunRecipe
from personalized_soups.declare.shipped import shipped_recipe
from personalized_soups.studies.pipeline import comparing_steps, making_steps
from personalized_soups.studies.pipeline.expansion import Expansion
from personalized_soups.studies.pipeline.held_out import check_held_out
from personalized_soups.studies.pipeline.steps import Step
from personalized_soups.studies.pipeline.world import World

_CATALOGUE = "dimensions/psoups.yaml"
_STEPS: Mapping[type, Callable[[Expansion, str, Any], Iterator[Step]]] = {
    run_steps.RolloutsStep: making_steps.rollout_steps,
    run_steps.LabelStep: making_steps.label_steps,
    run_steps.PairsStep: making_steps.pair_steps,
    run_steps.TrainStep: making_steps.train_steps,
    run_steps.ExpertsStep: making_steps.taken_steps,
    run_steps.MergeStep: making_steps.merge_steps,
    run_steps.ChooseStep: comparing_steps.generation_steps,
    run_steps.AnswersStep: comparing_steps.generation_steps,
    run_steps.SweepStep: comparing_steps.generation_steps,
    run_steps.InterferenceStep: comparing_steps.generation_steps,
    run_steps.ReportStep: comparing_steps.report_steps,
}


def steps_of(recipe: RunRecipe, *, device: str = "auto") -> list[Step]:
    """Return the steps of a run.

    Args:
        recipe: the recipe.
        device: the device to compute on.

    Raises:
        DeclarationError: if the catalogue is invalid, a step names one that does not suit it, or held-out prompts are
            trained on.
        InputError: if a file that the recipe names is missing, or the base cannot be found.
    """
    base = str(place_of(recipe.base))
    row = named_bases().get(recipe.base)
    shipped = shipped_recipe(_CATALOGUE if row is None else row.dimensions)
    path = shipped if recipe.dimensions is None else recipe.relative_path(recipe.dimensions)
    on = None if recipe.on is None else recipe.relative_path(recipe.on)
    world = World(base, base_fingerprint(base), load(path, Catalogue), recipe.seed, device, dtype=recipe.dtype, on=on)
    expansions = [Expansion(recipe, world, number) for number in range(recipe.num_seeds)]
    check_held_out(recipe)
    return [
        step
        for run in expansions
        for name, declared in recipe.steps.items()
        for step in _STEPS[type(declared)](run, name, declared)
    ]
