"""`RunRecipe`: the steps of `psoups run`, from prompts to experts and merged models."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from personalized_soups.declare.declared import Declared, refusal
from personalized_soups.declare.dimension import Catalogue, Name
from personalized_soups.declare.profile import MethodName
from personalized_soups.errors import choose_from

PositiveInt = Annotated[int, Field(gt=0)]
File = Annotated[str, Field(pattern=r"\S")]


class RolloutsStep(Declared):
    """Samples answers to prompts from the base."""

    kind: Literal["rollouts"]
    prompts: File = Field(description="The file of prompts. A relative path starts at the folder of the recipe.")
    num_samples: PositiveInt = 2
    instructed: int = Field(
        default=0, ge=0, description="How many of the answers to a prompt are sampled under a side's instruction."
    )
    temperature: Annotated[float, Field(ge=0)] = 1.0
    max_new_tokens: PositiveInt = 256
    batch_size: PositiveInt = 64


class LabelStep(Declared):
    """Labels sampled answers for each side of the catalogue, by its scorer or by a judge."""

    kind: Literal["label"]
    rollouts: Name = Field(description="The step whose answers are labelled.")
    judge: File | None = Field(
        default=None, description="The file of a judge. Left out, each side's scorer rates answers."
    )
    num_comparisons: PositiveInt | None = Field(
        default=None, description="A judge's comparisons for each prompt. Left out, each answer is compared once."
    )
    whole_sentences: bool = Field(
        default=False, description="Remove a last sentence that is cut off from each answer first."
    )


class PairsStep(Declared):
    """Chooses preference pairs from the labels of each side."""

    kind: Literal["pairs"]
    labels: Name = Field(description="The step whose labels are paired.")
    min_gap: Annotated[float, Field(gt=0, le=1)] = 0.3
    max_pairs: PositiveInt | None = None
    match_length: bool = False


class TrainStep(Declared):
    """Trains an expert of each side, or a reward model of each."""

    kind: Literal["train"]
    method: Literal["dpo", "reward", "grpo"] = "dpo"
    pairs: Name | None = Field(default=None, description="The step whose pairs are trained on. Not for grpo.")
    prompts: File | None = Field(default=None, description="The file of prompts, for grpo.")
    recipe: File = Field(
        description="The training recipe of the method. A relative path starts at this recipe's folder."
    )

    @model_validator(mode="after")
    def _check_data(self) -> Self:
        wanted, other = ("prompts", "pairs") if self.method == "grpo" else ("pairs", "prompts")
        if getattr(self, wanted) is None or getattr(self, other) is not None:
            raise refusal(
                f"the method {self.method} trains on {wanted}, and on nothing else",
                mend=f"write `{wanted}:`, and remove `{other}:`",
            )
        return self


class MergeStep(Declared):
    """Merges the experts of each combination of sides, one side of each dimension."""

    kind: Literal["merge"]
    experts: Name = Field(description="The step whose experts are merged.")
    method: MethodName = "linear"
    weight: float = Field(description="The weight of each expert.")


AnyStep = Annotated[RolloutsStep | LabelStep | PairsStep | TrainStep | MergeStep, Field(discriminator="kind")]
# Which kinds of step may stand in a field that names a step.
_FIELDS: Mapping[str, str] = {"rollouts": "rollouts", "labels": "label", "pairs": "pairs", "experts": "train"}


class RunRecipe(Declared):
    """The steps of a run. A step that names another step reads its files.

    Steps of the kinds label, pairs and train are made for each side of the catalogue, and merge for each combination.
    """

    base: File = Field(description="The base: the name of a named base, a folder, a GGUF file or a hub id.")
    dimensions: File | None = Field(
        default=None, description="The catalogue. Left out, the shipped one that suits the base."
    )
    seed: int = Field(default=0, ge=0)
    steps: dict[Name, AnyStep] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        for name, step in self.steps.items():
            for field, needed in named_steps(step).items():
                if needed not in self.steps:
                    raise refusal(
                        f"the step {name!r} needs {needed!r}, which is not declared",
                        mend=choose_from(needed, self.steps),
                        key=("steps", name, field),
                    )
                if self.steps[needed].kind != _FIELDS[field]:
                    raise refusal(
                        f"`{field}` names the step {needed!r}, which is of the kind {self.steps[needed].kind!r}",
                        mend=f"name a step of the kind {_FIELDS[field]!r}",
                        key=("steps", name, field),
                    )
        return self

    def combinations(self, catalogue: Catalogue) -> list[tuple[str, ...]]:
        """Return all combinations of one side of each dimension."""
        return list(itertools.product(*(dimension.sides for dimension in catalogue.dimensions.values())))


def named_steps(step: Declared) -> dict[str, str]:
    """Return the names of the steps that a step names, by the field that names them."""
    values = {field: getattr(step, field, None) for field in _FIELDS}
    return {field: value for field, value in values.items() if isinstance(value, str)}
