"""A study's recipe: how pairs are made, weights are chosen and merged models are scored."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from personalized_soups.declare.declared import Declared, refusal
from personalized_soups.declare.profile import MethodName

PositiveInt = Annotated[int, Field(gt=0)]
Temperature = Annotated[float, Field(gt=0)]
MixingWeight = Annotated[float, Field(gt=0)]


class PairsRecipe(Declared):
    """How preference pairs come from the base's own answers."""

    num_prompts: PositiveInt
    num_samples: Annotated[int, Field(ge=2, description="Answers to each prompt.")]
    temperature: Temperature = 1.0
    min_gap: Annotated[float, Field(gt=0, le=1, description="Least difference of the two scores of a pair.")]
    max_pairs: PositiveInt


class SelectionRecipe(Declared):
    """How method and scale are chosen, on validation topics: every weight of every method, for all combinations."""

    num_prompts: PositiveInt = Field(description="Prompts for each combination, weight and method.")
    weights: dict[MethodName, Annotated[tuple[MixingWeight, ...], Field(min_length=1)]] = Field(min_length=1)


class SweepRecipe(Declared):
    """One weight from 0 to 1, the opposing side's from 1 to 0."""

    num_prompts: PositiveInt
    num_steps: Annotated[int, Field(ge=2)]


class StudyRecipe(Declared):
    """Everything of a study but the training of its experts (recipes/train)."""

    pairs: PairsRecipe
    selection: SelectionRecipe
    sweep: SweepRecipe
    num_prompts: PositiveInt = Field(description="Held-out prompts for each combination.")
    temperature: Temperature = 0.7
    max_new_tokens: PositiveInt = 160

    @model_validator(mode="after")
    def _check_growing(self) -> Self:
        for method, weights in self.selection.weights.items():
            if list(weights) != sorted(set(weights)):
                raise refusal(
                    f"the weights of {method!r} do not rise",
                    mend="write each weight once, from the smallest to the largest",
                    key=("selection", "weights", method),
                )
        return self
