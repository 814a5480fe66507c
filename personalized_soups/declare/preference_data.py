"""The lines of the files between a base and its experts' pairs: sampled answers, and answers with labels."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from personalized_soups.declare.declared import Declared, refusal

Verdict: TypeAlias = Literal["first", "second", "tie", "unparsed"]
"""The better of two answers. `unparsed`: the judge gave no verdict, and the comparison counts for no answer."""

Prompt = Annotated[str, Field(pattern=r"\S")]


class Rollout(Declared):
    """A line of `psoups data rollouts`: a prompt and the answers that a model sampled.

    Example:
        >>> Rollout(prompt="How do I clean a lamp?", answers=("Dust it.", "Happy to help! Dust it.")).prompt
        'How do I clean a lamp?'
    """

    prompt: Prompt = Field(description="The plain prompt.")
    answers: Annotated[tuple[str, ...], Field(min_length=1)]
    instructions: tuple[str | None, ...] = Field(
        default=(),
        description="The instruction under which each answer was sampled, or null for a plain answer. Left out, all "
        "answers are plain.",
    )

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if self.instructions and len(self.instructions) != len(self.answers):
            raise refusal(
                f"there are {len(self.answers)} answers, but {len(self.instructions)} instructions",
                mend="give one instruction for each answer, null for a plain one",
                key=("instructions",),
            )
        return self


class LabelledComparison(Declared):
    """A judge's verdict on two answers of a line, which are named by their place in `answers`, counted from 0."""

    first: Annotated[int, Field(ge=0)]
    second: Annotated[int, Field(ge=0)]
    verdict: Verdict


class LabelledAnswers(Declared):
    """A line of `psoups data label`: the answers to a prompt, and how well they fit a side.

    A scorer gives each answer a score. A judge compares answers.

    Example:
        >>> LabelledAnswers(prompt="Why?", side="concise", answers=("So.", "It rains, so."), scores=(0.9, 0.4)).side
        'concise'
    """

    prompt: Prompt
    side: Annotated[str, Field(min_length=1)] = Field(description="The side for which the answers are labelled.")
    answers: tuple[str, ...]
    scores: tuple[float | None, ...] = Field(
        default=(), description="The score of each answer towards the side, in [0, 1], or null for an invalid answer."
    )
    comparisons: tuple[LabelledComparison, ...] = Field(default=(), description="The verdicts of a judge.")

    @model_validator(mode="after")
    def _check_places(self) -> Self:
        if self.scores and len(self.scores) != len(self.answers):
            raise refusal(
                f"there are {len(self.answers)} answers, but {len(self.scores)} scores",
                mend="give one score for each answer, null for an invalid one",
                key=("scores",),
            )
        for at, compared in enumerate(self.comparisons):
            if compared.first == compared.second or max(compared.first, compared.second) >= len(self.answers):
                raise refusal(
                    f"the comparison names the answers {compared.first} and {compared.second}, but there are "
                    f"{len(self.answers)}, counted from 0",
                    mend="name two different answers",
                    key=("comparisons", at),
                )
        return self
