"""`RunRecipe`: the steps of `psoups run`, from prompts to experts, merged models, answers and a report."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from math import prod
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from personalized_soups.declare.declared import Declared, refusal
from personalized_soups.declare.dimension import Catalogue, Name
from personalized_soups.declare.run_steps import (
    AnswersStep,
    ChooseStep,
    ExpertsStep,
    File,
    InterferenceStep,
    LabelStep,
    MergeStep,
    PairsStep,
    PositiveInt,
    ReportStep,
    RolloutsStep,
    SweepStep,
    TrainStep,
)
from personalized_soups.errors import choose_from

AnyStep = Annotated[
    RolloutsStep
    | LabelStep
    | PairsStep
    | TrainStep
    | ExpertsStep
    | MergeStep
    | ChooseStep
    | AnswersStep
    | SweepStep
    | InterferenceStep
    | ReportStep,
    Field(discriminator="kind"),
]
# Which kinds of step may stand in a field that names a step or several steps.
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "rollouts": ("rollouts",),
    "labels": ("label",),
    "pairs": ("pairs",),
    "experts": ("train", "experts"),
    "soups": ("merge",),
    "policies": ("train",),
    "choice": ("choose",),
    "systems": ("answers",),
    "reward_models": ("train",),
    "fluency": ("rollouts",),
    "fronts": ("sweep", "answers"),
    "interference": ("interference",),
}


class RunRecipe(Declared):
    """The steps of a run. A step that names another step reads its files.

    Steps of the kinds label, pairs and train are made for each target of the labels, and merge for each combination.
    """

    base: File = Field(description="The base: the name of a named base, a folder, a GGUF file or a hub id.")
    on: File | None = Field(
        default=None,
        description="The LoRA adapter, such as an SFT adapter, on top of which experts and policies are trained and "
        "answer. A relative path starts at the folder of the recipe.",
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        default="float32",
        description="The dtype of the base while it answers. A training recipe has its own.",
    )
    dimensions: File | None = Field(
        default=None, description="The catalogue. Left out, the shipped one that suits the base."
    )
    seed: int = Field(default=0, ge=0, description="The first seed.")
    num_seeds: PositiveInt = Field(
        default=1,
        description="The number of seeds. Each has its own answers, pairs, trainings and systems; the report is on all "
        "of them. The steps of a further seed have its number before their names.",
    )
    num_combinations: PositiveInt | None = Field(
        default=None,
        description="The number of combinations of sides, which are then drawn by the seed. Left out, there are all of "
        "them: 2^n for n dimensions with two sides.",
    )
    steps: dict[Name, AnyStep] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        for name, step in self.steps.items():
            for field, needed in named_steps(step):
                if needed not in self.steps:
                    raise refusal(
                        f"the step {name!r} needs {needed!r}, which is not declared",
                        mend=choose_from(needed, self.steps),
                        key=("steps", name, field),
                    )
                if self.steps[needed].kind not in _FIELDS[field]:
                    raise refusal(
                        f"`{field}` names the step {needed!r}, which is of the kind {self.steps[needed].kind!r}",
                        mend=f"name a step of the kind {' or '.join(map(repr, _FIELDS[field]))}",
                        key=("steps", name, field),
                    )
        return self

    def combinations(self, catalogue: Catalogue) -> list[tuple[str, ...]]:
        """Return the combinations of one side of each dimension: all, or `num_combinations` of them."""
        sides = [list(dimension.sides) for dimension in catalogue.dimensions.values()]
        total = prod(map(len, sides))
        if self.num_combinations is None or self.num_combinations >= total:
            return list(itertools.product(*sides))
        drawn = random.Random(self.seed).sample(range(total), self.num_combinations)
        return [_combination(number, sides) for number in sorted(drawn)]


def _combination(number: int, sides: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return the combination with this number in the order of `itertools.product`."""
    found = []
    for of_dimension in reversed(sides):
        number, at = divmod(number, len(of_dimension))
        found.append(of_dimension[at])
    return tuple(reversed(found))


def named_steps(step: Declared) -> list[tuple[str, str]]:
    """Return the names of the steps that a step names, each after the field that names it."""
    named = []
    for field in _FIELDS:
        value = getattr(step, field, None) or ()
        named += [(field, name) for name in ((value,) if isinstance(value, str) else value)]
    return named
