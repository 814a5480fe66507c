"""The recipe of a study: how preference pairs are made, weights are chosen, and merged models are scored."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from personalized_soups.declare.declared import Declared, refusal
from personalized_soups.declare.dimension import (
    AnyScorer,
    Catalogue,
    LengthScorer,
    MarkersScorer,
    Name,
    ReadabilityScorer,
)
from personalized_soups.declare.profile import MethodName
from personalized_soups.errors import DeclarationError, choose_from

PositiveInt = Annotated[int, Field(gt=0)]
Temperature = Annotated[float, Field(gt=0)]
MixingWeight = Annotated[float, Field(gt=0)]

SystemName: TypeAlias = Literal["preference_prompting", "single_expert", "soup_prompting"]
"""The systems that a study can compare with the base and the soups."""


class PairsRecipe(Declared):
    """How preference pairs are made from the base model's answers."""

    num_prompts: PositiveInt
    num_samples: Annotated[int, Field(ge=2, description="The number of answers that are sampled for each prompt.")]
    plain: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="The number of answers to a prompt that are sampled without an instruction. `plain` and "
        "`instructed` add up to `num_samples`.",
    )
    instructed: int = Field(
        default=0,
        ge=0,
        description="The number of answers to a prompt that are sampled under the instruction of a side. The sides "
        "take turns.",
    )
    temperature: Temperature = 1.0
    min_gap: Annotated[
        float, Field(gt=0, le=1, description="The smallest allowed difference between the scores of the two answers.")
    ]
    max_pairs: PositiveInt
    match_length: bool = Field(
        default=False,
        description="Choose pairs whose two answers are equally long on average, for sides that are not about length.",
    )
    whole_sentences: bool = Field(
        default=False, description="Remove a last sentence that is cut off from the answers of the pairs."
    )

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.instructed > self.num_samples:
            raise refusal(
                f"{self.instructed} answers are instructed, but only {self.num_samples} are sampled",
                mend=f"write instructed: {self.num_samples} or less, or a larger num_samples",
                key=("instructed",),
            )
        plain = self.num_samples - self.instructed
        if self.plain is not None and self.plain != plain:
            raise refusal(
                f"plain ({self.plain}) and instructed ({self.instructed}) add up to {self.plain + self.instructed}, "
                f"but num_samples is {self.num_samples}",
                mend=f"write plain: {plain}, or num_samples: {self.plain + self.instructed}",
                key=("plain",),
            )
        return self


class SelectionRecipe(Declared):
    """How the merge method and the weight are chosen: each weight of each method is scored on validation topics."""

    num_prompts: PositiveInt = Field(
        description="The number of prompts for each combination of sides, weight and method."
    )
    weights: dict[MethodName, Annotated[tuple[MixingWeight, ...], Field(min_length=1)]] = Field(min_length=1)
    min_valid: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description="A weight is not chosen if its share of valid answers is less than this share of that of the "
        "method's most valid weight. Large weights reach the sides more often, but break more answers.",
    )


class SweepRecipe(Declared):
    """A sweep between two sides: the weight of one side rises from 0 to 1, and that of the other falls from 1 to 0."""

    num_prompts: PositiveInt
    num_steps: Annotated[int, Field(ge=2)]


class FluencyRecipe(Declared):
    """How the gate is calibrated that rejects broken answers (`psoups scorer calibrate`): on the base's own answers."""

    accept: float = Field(default=0.97, gt=0, lt=1, description="The share of the base's own answers to accept.")
    num_samples: PositiveInt = Field(
        default=1, description="The number of answers to each training prompt on which the gate is calibrated."
    )


Instructions = Annotated[tuple[Annotated[str, Field(pattern=r"\S")], ...], Field(min_length=1)]


class TrainedJudge(Declared):
    """A judge that the study trains: a classifier of the base's answers under instructions of the two ends.

    The answers are to validation prompts on which nothing is chosen. The instructions must differ from those of the
    sides, so that the judge learns from other text than the experts.
    """

    kind: Literal["trained"]
    high: Instructions = Field(description="Instructions of the high end. Each gives one answer to every prompt.")
    low: Instructions = Field(description="Instructions of the low end.")
    num_prompts: PositiveInt = Field(default=32, description="The number of prompts.")


JudgeSpec = Annotated[AnyScorer | TrainedJudge, Field(discriminator="kind")]


class ExternalRecipe(Declared):
    """How prompts are drawn from files that are not the study's own."""

    num_prompts: PositiveInt = Field(default=50, description="The number of prompts that are drawn from each file.")
    max_prompt_tokens: PositiveInt = Field(
        default=256, description="Prompts with more tokens are skipped, and the report counts them."
    )


class StudyRecipe(Declared):
    """All settings of a study except the training of its experts, which has recipes of its own (recipes/train)."""

    pairs: PairsRecipe
    selection: SelectionRecipe
    sweep: SweepRecipe | None = Field(default=None, description="Left out, no sweep between two sides is made.")
    num_prompts: PositiveInt = Field(description="The number of held-out prompts for each combination.")
    temperature: Temperature = 0.7
    max_new_tokens: PositiveInt = 160
    batch_size: PositiveInt | None = Field(
        default=None,
        description="The number of answers that are generated at once, each with its own mixture of experts. Left out, "
        "each model is merged, and answers all its prompts at once.",
    )
    sides: tuple[Name, ...] = Field(
        default=(),
        description="The sides of the study, one with `end: low` and one with `end: high` in each dimension. Left out, "
        "the study has all sides of the catalogue.",
    )
    systems: tuple[SystemName, ...] = Field(
        default=(),
        description="Systems that are compared with the base and the soups. `preference_prompting`: the base, with the "
        "instructions of the wanted sides before the prompt. `single_expert`: the best of the wanted experts alone, "
        "chosen on validation. `soup_prompting`: the best soup, with the instructions.",
    )
    judges: dict[Name, JudgeSpec] = Field(
        default={},
        description="A held-out judge for each dimension: a scorer other than the one that labels the pairs, or "
        "`kind: trained`.",
    )
    fluency: FluencyRecipe | None = Field(
        default=None, description="The gate that rejects broken answers. Left out, only scorers decide what is valid."
    )
    external: ExternalRecipe = ExternalRecipe()

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

    @model_validator(mode="after")
    def _check_systems(self) -> Self:
        repeated = [name for name in self.systems if self.systems.count(name) > 1]
        if repeated:
            raise refusal(f"the system {repeated[0]!r} is repeated", mend="write it once", key=("systems",))
        return self

    def catalogue_of(self, catalogue: Catalogue) -> Catalogue:
        """Return the part of a catalogue that the study uses: the recipe's sides and their dimensions.

        Raises:
            DeclarationError: if a side is not in the catalogue.
        """
        if not self.sides:
            return catalogue
        for at, side in enumerate(self.sides):
            if side not in catalogue.sides:
                raise DeclarationError(
                    f"unknown side {side!r}", where=self.place("sides", at), mend=choose_from(side, catalogue.sides)
                )
        dimensions = {}
        for name, dimension in catalogue.dimensions.items():
            used = {side: declared for side, declared in dimension.sides.items() if side in self.sides}
            if used:
                dimensions[name] = dimension.replaced(sides=used)
        return catalogue.replaced(dimensions=dimensions)

    def check_judges(self, catalogue: Catalogue) -> None:
        """Check that each dimension has a judge that is not the scorer of its pairs. Without judges, check nothing.

        Raises:
            DeclarationError: if a judge's dimension is unknown, a dimension has no judge, or a judge measures the same
                as a scorer that labels the pairs of its dimension.
        """
        for name, judge in self.judges.items():
            if name not in catalogue.dimensions:
                raise DeclarationError(
                    f"unknown dimension {name!r}",
                    where=self.place("judges", name),
                    mend=choose_from(name, catalogue.dimensions),
                )
            for side in catalogue.dimensions[name].sides:
                if isinstance(judge, TrainedJudge):
                    self._check_instructions(name, judge, catalogue.sides[side].instruction)
                elif _measures_the_same(judge, catalogue.scorer_of(side)):
                    raise DeclarationError(
                        f"the judge of {name!r} measures the same as the scorer that labels the pairs of {side!r}",
                        where=self.place("judges", name),
                        mend="declare another scorer as the judge, so that it is independent of the labels",
                    )
        missing = [name for name in catalogue.dimensions if name not in self.judges]
        if self.judges and missing:
            raise DeclarationError(
                f"the dimension {missing[0]!r} has no judge",
                where=self.place("judges"),
                mend="declare a judge for every dimension, or remove all judges",
            )

    def _check_instructions(self, dimension: str, judge: TrainedJudge, instruction: str) -> None:
        if instruction in (*judge.high, *judge.low):
            raise DeclarationError(
                f"the judge of {dimension!r} is trained under the instruction of a side: {instruction!r}",
                where=self.place("judges", dimension),
                mend="write other instructions, so that the judge is independent of the experts",
            )


def _measures_the_same(judge: AnyScorer, scorer: AnyScorer) -> bool:
    """Return whether two scorers are equal, differ only in the ends of their scale, or count a common phrase."""
    if isinstance(judge, MarkersScorer) and isinstance(scorer, MarkersScorer):
        return bool(_phrases(judge) & _phrases(scorer))
    rescaled = (LengthScorer, ReadabilityScorer)
    return judge == scorer or any(isinstance(judge, kind) and isinstance(scorer, kind) for kind in rescaled)


def _phrases(scorer: MarkersScorer) -> set[str]:
    return {" ".join(phrase.lower().split()) for phrase in (*scorer.high, *scorer.low)}
