"""Make the steps of a run from its recipe: each for every side, or for every combination of sides."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, assert_never

from personalized_soups.adapters.fingerprint import base_fingerprint
from personalized_soups.adapters.provenance import library_versions
from personalized_soups.bases.place import place_of
from personalized_soups.declare.base_table import named_bases
from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.loader import load
from personalized_soups.declare.run_recipe import (
    LabelStep,
    MergeStep,
    PairsStep,
    RolloutsStep,
    RunRecipe,
    TrainStep,
    named_steps,
)
from personalized_soups.declare.shipped import shipped_recipe
from personalized_soups.errors import InputError
from personalized_soups.files.cache_folder import reply_cache_file
from personalized_soups.files.digest import digest_file
from personalized_soups.studies.pipeline.kinds import Label, Merge, Pair, Sample, Train, World
from personalized_soups.studies.pipeline.steps import Step

_CATALOGUE = "dimensions/psoups.yaml"


def steps_of(recipe: RunRecipe, *, device: str = "auto") -> list[Step]:
    """Return the steps of a run.

    Args:
        recipe: the recipe.
        device: the device to compute on.

    Raises:
        DeclarationError: if the catalogue is invalid.
        InputError: if a file that the recipe names is missing, or the base cannot be found.
    """
    return list(_Expansion(recipe, device).steps())


class _Expansion:
    def __init__(self, recipe: RunRecipe, device: str) -> None:
        self._recipe = recipe
        base = str(place_of(recipe.base))
        row = named_bases().get(recipe.base)
        shipped = shipped_recipe(_CATALOGUE if row is None else row.dimensions)
        path = shipped if recipe.dimensions is None else recipe.relative_path(recipe.dimensions)
        catalogue = load(path, Catalogue)
        self._world = World(base, base_fingerprint(base), catalogue, recipe.seed, device)
        needed = {name for step in recipe.steps.values() for name in named_steps(step).values()}
        self._results = recipe.steps.keys() - needed
        self._common: dict[str, Any] = {
            "base": self._world.fingerprint,
            "catalogue": catalogue.model_dump(mode="json"),
            "seed": recipe.seed,
            "versions": library_versions("torch", "transformers", "peft", "trl"),
        }

    def steps(self) -> Iterator[Step]:
        """Yield all steps."""
        sides = list(self._world.catalogue.sides)
        for name, step in self._recipe.steps.items():
            match step:
                case RolloutsStep():
                    prompts = self._file(step.prompts, name, "prompts")
                    work = Sample(self._world, step, prompts)
                    yield self._step(name, name, (), work, {"prompts": digest_file(prompts)})
                case LabelStep():
                    judge = None if step.judge is None else self._file(step.judge, name, "judge")
                    files = {} if judge is None else {"judge": digest_file(judge)}
                    cache = None if judge is None else reply_cache_file()
                    for side in sides:
                        label = Label(self._world, step, side, judge, cache)
                        yield self._step(name, f"{name}-{side}", (step.rollouts,), label, {"side": side, **files})
                case PairsStep():
                    for side in sides:
                        labels = f"{step.labels}-{side}"
                        pair = Pair(self._world, step, side, labels)
                        yield self._step(name, f"{name}-{side}", (labels,), pair, {"side": side})
                case TrainStep():
                    yield from self._trainings(name, step, sides)
                case MergeStep():
                    for combination in self._recipe.combinations(self._world.catalogue):
                        needs = tuple(f"{step.experts}-{side}" for side in combination)
                        merge = Merge(step, combination)
                        own = {"sides": list(combination)}
                        yield self._step(name, f"{name}-{'+'.join(combination)}", needs, merge, own)
                case _:
                    assert_never(step)

    def _trainings(self, name: str, step: TrainStep, sides: list[str]) -> Iterator[Step]:
        recipe = self._file(step.recipe, name, "recipe")
        files = {"recipe": digest_file(recipe)}
        for side in sides:
            own = {"side": side, **files}
            if step.prompts is not None:
                prompts = self._file(step.prompts, name, "prompts")
                train = Train(self._world, step, side, prompts, recipe)
                yield self._step(name, f"{name}-{side}", (), train, {**own, "prompts": digest_file(prompts)})
            else:
                pairs = f"{step.pairs}-{side}"
                train = Train(self._world, step, side, pairs, recipe)
                yield self._step(name, f"{name}-{side}", (pairs,), train, own)

    def _step(self, declared: str, name: str, needs: tuple[str, ...], work: Any, own: dict[str, Any]) -> Step:
        settings = {**self._common, **self._recipe.steps[declared].model_dump(mode="json"), **own}
        return Step(
            name,
            settings,
            needs,
            work,
            where=self._recipe.place("steps", declared),
            is_result=declared in self._results,
        )

    def _file(self, path: str, name: str, key: str) -> Path:
        found = self._recipe.relative_path(path)
        if not found.is_file():
            raise InputError(
                f"there is no file {str(found)!r}",
                where=self._recipe.place("steps", name, key),
                mend="check the path; a relative path starts at the folder of the recipe",
            )
        return found.resolve()
