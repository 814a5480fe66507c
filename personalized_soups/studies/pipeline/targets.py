"""What a run's labels, pairs and trainings are made for: a side, a combination of sides, or all users."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, assert_never

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.run_recipe import LabelStep, PairsStep, RunRecipe, TrainStep


@dataclass(frozen=True, slots=True)
class Target:
    """What is preferred.

    Attributes:
        name: the name of the expert or policy that is trained for this target.
        sides: the preferred sides. For a single policy, all sides of the catalogue.
        kind: whether there is a target for each side, one for each combination, or a single one.
    """

    name: str
    sides: tuple[str, ...]
    kind: Literal["side", "combination", "single"]


def combination_name(sides: tuple[str, ...]) -> str:
    """Return the name of a combination, as in the folders of merged models: `elementary+concise+friendly`."""
    return "+".join(sides)


def targets_of(name: str, recipe: RunRecipe, catalogue: Catalogue) -> list[Target]:
    """Return the targets of a step of the kind label, pairs or train.

    A single policy for all targets, from `conditioned` pairs, has the name of its pairs step.
    """
    step: Any = recipe.steps[name]
    match step:
        case LabelStep():
            return _declared(step.targets, recipe, catalogue)
        case PairsStep() if step.conditioned:
            return [Target(name, tuple(catalogue.sides), "single")]
        case PairsStep():
            return targets_of(step.labels, recipe, catalogue)
        case TrainStep() if step.pairs is not None:
            return targets_of(step.pairs, recipe, catalogue)
        case _:
            return _declared("sides", recipe, catalogue)


def _declared(
    targets: Literal["sides", "combinations", "everyone"], recipe: RunRecipe, catalogue: Catalogue
) -> list[Target]:
    match targets:
        case "sides":
            return [Target(side, (side,), "side") for side in catalogue.sides]
        case "combinations":
            combinations = recipe.combinations(catalogue)
            return [Target(combination_name(sides), sides, "combination") for sides in combinations]
        case "everyone":
            return [Target(targets, tuple(catalogue.sides), "single")]
        case _:
            assert_never(targets)
