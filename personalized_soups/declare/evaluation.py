"""The recipe of a study: how preference pairs are made, weights are chosen, and merged models are scored."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from personalized_soups.declare.declared import Declared, refusal
from personalized_soups.declare.profile import MethodName

PositiveInt = Annotated[int, Field(gt=0)]
Temperature = Annotated[float, Field(gt=0)]
MixingWeight = Annotated[float, Field(gt=0)]


class PairsRecipe(Declared):
    """How preference pairs are made from the base model's answers."""

    num_prompts: PositiveInt
    num_samples: Annotated[int, Field(ge=2, description="The number of answers that are sampled for each prompt.")]
    temperature: Temperature = 1.0
    min_gap: Annotated[
        float, Field(gt=0, le=1, description="The smallest allowed difference between the scores of the two answers.")
    ]
    max_pairs: PositiveInt


class SelectionRecipe(Declared):
    """How the merge method and the weight are chosen: each weight of each method is scored on validation topics."""

    num_prompts: PositiveInt = Field(
        description="The number of prompts for each combination of sides, weight and method."
    )
    weights: dict[MethodName, Annotated[tuple[MixingWeight, ...], Field(min_length=1)]] = Field(min_length=1)


class SweepRecipe(Declared):
    """A sweep between two sides: the weight of one side rises from 0 to 1, and that of the other falls from 1 to 0."""

    num_prompts: PositiveInt
    num_steps: Annotated[int, Field(ge=2)]


class StudyRecipe(Declared):
    """All settings of a study except the training of its experts, which has recipes of its own (recipes/train)."""

    pairs: PairsRecipe
    selection: SelectionRecipe
    sweep: SweepRecipe
    num_prompts: PositiveInt = Field(description="The number of held-out prompts for each combination.")
    temperature: Temperature = 0.7
    max_new_tokens: PositiveInt = 160

    @model_validator(mode="after")
    def _check_growing(self) -> Self:
        for method, weights in self.selection.weights.items():
            if list(weights) != sorted(set(weights)):
                raise refusal(
                    f"the weights of the method {method!r} are not in rising order",
                    mend="write each weight once, from the smallest to the largest",
                    key=("selection", "weights", method),
                )
        return self
