"""`Expansion`: what is needed to make the steps of one seed from the steps that a recipe declares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from personalized_soups.adapters.base_adapter import BaseAdapter
from personalized_soups.adapters.provenance import library_versions
from personalized_soups.declare.dimension import AnyScorer, ClassifierScorer
from personalized_soups.declare.run_recipe import RunRecipe, named_steps
from personalized_soups.declare.run_steps import TrainStep
from personalized_soups.errors import DeclarationError, InputError
from personalized_soups.studies.pipeline.run_folder import digest_of
from personalized_soups.studies.pipeline.steps import Report, Step, Work
from personalized_soups.studies.pipeline.targets import Target, targets_of
from personalized_soups.studies.pipeline.world import World

_MODELS = {
    "side": "one side each",
    "combination": "one combination each",
    "dimension": "one dimension each",
    "single": "all combinations",
}


def seed_prefix(number: int) -> str:
    """Return what stands before the names of a seed's steps. The first seed's steps have their declared names."""
    return f"seed{number}-" if number else ""


@dataclass(frozen=True, slots=True)
class _ForSeed:
    """The work of a step of a further seed, which knows the steps that it needs by their declared names."""

    work: Work
    prefix: str

    def __call__(self, work: Path, inputs: Mapping[str, Path], report: Report) -> None:
        self.work(work, {name.removeprefix(self.prefix): folder for name, folder in inputs.items()}, report)


class Expansion:
    """Makes the steps of one seed.

    Args:
        recipe: the recipe.
        world: what all steps share, with the first seed.
        number: the number of the seed, from 0.
    """

    def __init__(self, recipe: RunRecipe, world: World, number: int) -> None:
        self.recipe = recipe
        self.number = number
        self.world = replace(world, seed=world.seed + number)
        needed = {name for step in recipe.steps.values() for _, name in named_steps(step)}
        self._results = recipe.steps.keys() - needed
        self._common: dict[str, Any] = {
            "base": world.fingerprint,
            "catalogue": world.catalogue.model_dump(mode="json"),
            "seed": self.world.seed,
            "dtype": recipe.dtype,
            "on": None if world.on is None else BaseAdapter.open(world.on).digest,
            "versions": library_versions("torch", "transformers", "peft", "trl"),
        }

    @property
    def combinations(self) -> list[tuple[str, ...]]:
        """The combinations of one side of each dimension."""
        return self.recipe.combinations(self.world.catalogue)

    @property
    def scorer_files(self) -> dict[str, str]:
        """The digests of the files that the catalogue's scorers read."""
        sides = self.world.catalogue.sides
        return self.files_of_scorers(self.world.catalogue.scorer_of(side) for side in sides)

    def files_of_scorers(self, scorers: Iterable[AnyScorer]) -> dict[str, str]:
        """Return the digest of the folder of each classifier among some scorers, by its path."""
        paths = dict.fromkeys(scorer.path for scorer in scorers if isinstance(scorer, ClassifierScorer))
        return {path: digest_of(self.world.catalogue.relative_path(path))[0] for path in paths}

    def targets(self, name: str) -> list[Target]:
        """Return the targets of a step of the kind label, pairs, train or experts."""
        return targets_of(name, self.recipe, self.world.catalogue)

    def check_targets(self, name: str, key: str, trained: str, kinds: tuple[str, ...]) -> None:
        """Check that the models of a train step, which another step names in `key`, are for targets of these kinds.

        Raises:
            DeclarationError: if they are not, or if they are reward models.
        """
        declared = self.recipe.steps[trained]
        if isinstance(declared, TrainStep) and declared.method == "reward":
            raise DeclarationError(
                f"`{key}` names the step {trained!r}, which trains reward models, and these give no answers",
                where=self.recipe.place("steps", name, key),
                mend="name a train step of another method",
            )
        kind = self.targets(trained)[0].kind
        if kind not in kinds:
            raise DeclarationError(
                f"`{key}` names the step {trained!r}, whose models are for {_MODELS[kind]}",
                where=self.recipe.place("steps", name, key),
                mend=f"name a train step whose models are for {' or '.join(_MODELS[each] for each in kinds)}: "
                "see `targets` of its labels",
            )

    def check_can_merge(self, name: str, key: str) -> None:
        """Check that experts can be merged, and not only mixed by the method linear.

        Raises:
            DeclarationError: if they were trained on top of an adapter, which a merged adapter would contain.
        """
        if self.world.on is not None:
            raise DeclarationError(
                "on top of the adapter of `on`, experts can only be mixed by the method linear, not merged",
                where=self.recipe.place("steps", name, key),
                mend="use the method linear in an answers step, or merge the adapter into the base first",
            )

    def step(
        self, declared: str, name: str, needs: tuple[str, ...], work: Work, own: dict[str, Any], *, extent: str = ""
    ) -> Step:
        """Return a step.

        Args:
            declared: the name of the declared step.
            name: the step's own name, without that of the seed.
            needs: the names of the steps whose files it reads.
            work: writes its files.
            own: on what its files depend, beside the declaration.
            extent: how much work it is, in words.
        """
        settings = {**self._common, **self.recipe.steps[declared].model_dump(mode="json"), **own}
        prefix = seed_prefix(self.number)
        return Step(
            f"{prefix}{name}",
            settings,
            tuple(f"{prefix}{need}" for need in needs),
            _ForSeed(work, prefix) if prefix else work,
            where=self.recipe.place("steps", declared),
            extent=extent,
            is_result=declared in self._results,
        )

    def file(self, path: str, name: str, key: str) -> Path:
        """Return a file that the step `name` names in `key`.

        Raises:
            InputError: if it is missing.
        """
        found = self.recipe.relative_path(path)
        if not found.is_file():
            raise InputError(
                f"there is no file {str(found)!r}",
                where=self.recipe.place("steps", name, key),
                mend="check the path; a relative path starts at the folder of the recipe",
            )
        return found.resolve()
