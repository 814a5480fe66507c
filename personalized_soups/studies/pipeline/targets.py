"""What a run's labels, pairs and trainings are made for: a side, a combination of sides, a dimension, or all users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, assert_never

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.run_recipe import RunRecipe
from personalized_soups.declare.run_steps import ExpertsStep, LabelStep, PairsStep, Targets, TrainStep
from personalized_soups.errors import DeclarationError
from personalized_soups.systems.bone_soups.mixing import backbone_rewards


@dataclass(frozen=True, slots=True)
class Target:
    """What is preferred.

    Attributes:
        name: the name of the expert or policy that is trained for this target.
        weights: the weight of each preferred side in a score. For a single policy, all sides of the catalogue.
        kind: whether there is a target for each side, one for each combination, one for each dimension, or one in all.
    """

    name: str
    weights: Mapping[str, float]
    kind: Literal["side", "combination", "dimension", "single"]

    @property
    def sides(self) -> tuple[str, ...]:
        """The preferred sides."""
        return tuple(self.weights)


def combination_name(sides: tuple[str, ...]) -> str:
    """Return the name of a combination, as in the folders of merged models: `elementary+concise+friendly`."""
    return "+".join(sides)


def targets_of(name: str, recipe: RunRecipe, catalogue: Catalogue) -> list[Target]:
    """Return the targets of a step of the kind label, pairs, train or experts.

    A single policy for all targets, from `conditioned` pairs, has the name of its pairs step.

    Raises:
        DeclarationError: if a dimension is a target, but has not one low and one high side.
    """
    step: Any = recipe.steps[name]
    match step:
        case LabelStep():
            return _declared(step, name, recipe, catalogue)
        case PairsStep() if step.conditioned:
            return [Target(name, dict.fromkeys(catalogue.sides, 1.0), "single")]
        case PairsStep():
            return targets_of(step.labels, recipe, catalogue)
        case TrainStep() if step.pairs is not None:
            return targets_of(step.pairs, recipe, catalogue)
        case TrainStep():
            return _declared(step, name, recipe, catalogue)
        case ExpertsStep():
            return _of("sides", 1.0, recipe, catalogue)
        case _:
            raise TypeError(f"a step of the kind {step.kind} has no targets")


def beta_of(name: str, recipe: RunRecipe) -> float:
    """Return the `beta` of the targets of a step."""
    step: Any = recipe.steps[name]
    if isinstance(step, TrainStep) and step.pairs is not None:
        return beta_of(step.pairs, recipe)
    return beta_of(step.labels, recipe) if isinstance(step, PairsStep) else getattr(step, "beta", 1.0)


def ends_of(catalogue: Catalogue) -> dict[str, tuple[str, str]]:
    """Return the low and the high side of each dimension.

    Raises:
        DeclarationError: if a dimension has not one low and one high side.
    """
    found = {}
    for name, dimension in catalogue.dimensions.items():
        low = [side for side, declared in dimension.sides.items() if declared.end == "low"]
        high = [side for side, declared in dimension.sides.items() if declared.end == "high"]
        if len(low) != 1 or len(high) != 1:
            raise DeclarationError(
                f"the dimension {name!r} has {len(low)} low and {len(high)} high sides, but must have one of each",
                where=catalogue.place("dimensions", name, "sides"),
                mend="write `end: low` for one side, and give the dimension two",
            )
        found[name] = (low[0], high[0])
    return found


def _declared(step: LabelStep | TrainStep, name: str, recipe: RunRecipe, catalogue: Catalogue) -> list[Target]:
    dimensions = len(catalogue.dimensions)
    if step.targets == "dimensions" and step.beta <= 1 / dimensions and dimensions > 1:
        raise DeclarationError(
            f"beta is {step.beta:g}, but with {dimensions} dimensions it must be above 1/{dimensions}",
            where=recipe.place("steps", name, "beta"),
            mend="write a greater beta, such as 0.7",
        )
    only = step.combinations if isinstance(step, LabelStep) else ()
    if not only:
        return _of(step.targets, step.beta, recipe, catalogue)
    return [_combination(sides) for sides in checked_combinations(only, name, recipe, catalogue)]


def checked_combinations(
    only: Sequence[tuple[str, ...]], name: str, recipe: RunRecipe, catalogue: Catalogue
) -> list[tuple[str, ...]]:
    """Return the combinations that a step declares, in the order of the run.

    Raises:
        DeclarationError: if one of them is not a combination of the run.
    """
    every = recipe.combinations(catalogue)
    for sides in only:
        if sides not in every:
            raise DeclarationError(
                f"{' + '.join(sides)} is not a combination of this run",
                where=recipe.place("steps", name, "combinations"),
                mend=f"name one side of each dimension, such as [{', '.join(every[0])}]",
            )
    return [sides for sides in every if sides in only]


def _combination(sides: tuple[str, ...]) -> Target:
    return Target(combination_name(sides), dict.fromkeys(sides, 1.0), "combination")


def _of(targets: Targets, beta: float, recipe: RunRecipe, catalogue: Catalogue) -> list[Target]:
    match targets:
        case "sides":
            return [Target(side, {side: 1.0}, "side") for side in catalogue.sides]
        case "combinations":
            return [_combination(sides) for sides in recipe.combinations(catalogue)]
        case "everyone":
            return [Target(targets, dict.fromkeys(catalogue.sides, 1.0), "single")]
        case "dimensions":
            ends = ends_of(catalogue)
            return [
                Target(name, {ends[other][1]: weight for other, weight in weights.items() if weight}, "dimension")
                for name, weights in backbone_rewards(list(ends), beta).items()
            ]
        case _:
            assert_never(targets)
