"""`RunRecipe`: the steps of `psoups run`, from prompts to experts, merged models, answers and a report."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from personalized_soups.declare.declared import Declared, refusal
from personalized_soups.declare.dimension import AnyScorer, Catalogue, Name
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
    """Labels sampled answers for each target, by the scorers of its sides or by a judge.

    The steps that use these labels, pairs and train, are made for each target, too.
    """

    kind: Literal["label"]
    rollouts: Name = Field(description="The step whose answers are labelled.")
    targets: Literal["sides", "combinations", "everyone"] = Field(
        default="sides",
        description="What is preferred: each side, for experts; each combination of one side of each dimension, for "
        "one policy each; or what all users prefer on average, whichever sides they prefer, for a single policy. A "
        "score is the mean of those towards the target's sides.",
    )
    judge: File | None = Field(
        default=None, description="The file of a judge. Left out, each side's scorer rates answers."
    )
    num_comparisons: PositiveInt | None = Field(
        default=None, description="A judge's comparisons for each prompt. Left out, each answer is compared once."
    )
    whole_sentences: bool = Field(
        default=False, description="Remove a last sentence that is cut off from each answer first."
    )

    @model_validator(mode="after")
    def _check_judge(self) -> Self:
        if self.judge is not None and self.targets == "everyone":
            raise refusal(
                "a judge cannot compare answers for everyone: the instructions of all sides contradict each other",
                mend="remove `judge:`, so that scorers rate the answers, or choose other targets",
                key=("judge",),
            )
        return self


class PairsStep(Declared):
    """Chooses preference pairs from the labels of each target."""

    kind: Literal["pairs"]
    labels: Name = Field(description="The step whose labels are paired.")
    min_gap: Annotated[float, Field(gt=0, le=1)] = 0.3
    max_pairs: PositiveInt | None = None
    match_length: bool = False
    conditioned: bool = Field(
        default=False,
        description="Put the instructions of the target's sides before each prompt, and put the pairs of all targets "
        "together, for a single policy that reads what is preferred in its prompt.",
    )


class TrainStep(Declared):
    """Trains an expert, a policy or a reward model for each target of its pairs. With grpo, targets are the sides.

    With sft, the chosen answers of the pairs are learned.
    """

    kind: Literal["train"]
    method: Literal["dpo", "sft", "reward", "grpo"] = "dpo"
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


class AnswersStep(Declared):
    """Answers prompts with one system, for each combination of sides.

    Without `experts`, `soups` and `policies`, the base answers.
    """

    kind: Literal["answers"]
    prompts: File = Field(description="The file of held-out prompts. A relative path starts at the recipe's folder.")
    num_prompts: PositiveInt | None = Field(default=None, description="Use only the first so many prompts.")
    experts: Name | None = Field(default=None, description="The train step whose experts are mixed.")
    weight: float | None = Field(default=None, description="The weight of each expert.")
    mixing: Literal["weights", "log_probs"] = Field(
        default="weights",
        description="Mix the experts' weights, or the log-probabilities of their tokens (multi-objective decoding).",
    )
    soups: Name | None = Field(default=None, description="The merge step whose models answer.")
    policies: Name | None = Field(
        default=None, description="The train step whose policies answer: one for each combination, or a single one."
    )
    prompted: bool = Field(default=False, description="Put the instructions of the sides before each prompt.")
    num_candidates: PositiveInt = Field(
        default=1, description="Sample so many answers, and take the one with the best mean score of the sides."
    )
    temperature: Annotated[float, Field(ge=0)] = 0.7
    max_new_tokens: PositiveInt = 256
    batch_size: PositiveInt = 64

    @model_validator(mode="after")
    def _check_models(self) -> Self:
        given = [name for name in ("experts", "soups", "policies") if getattr(self, name) is not None]
        if len(given) > 1:
            raise refusal(f"{' and '.join(given)} are given", mend="give one of them, or none for the base")
        if (self.experts is None) != (self.weight is None):
            raise refusal("`experts` and `weight` belong together", mend="give both, or none of the two")
        if self.mixing == "log_probs" and (self.experts is None or self.num_candidates > 1):
            raise refusal(
                "log-probabilities are mixed of experts, for one answer",
                mend="give `experts:` and `weight:`, and no `num_candidates:`",
                key=("mixing",),
            )
        return self


class ReportStep(Declared):
    """Grades the answers of systems to the same prompts, and writes tables, pictures and a page for a browser."""

    kind: Literal["report"]
    systems: tuple[Name, ...] = Field(
        min_length=2, description="The answers steps to compare, in the order of the tables."
    )
    judges: dict[Name, AnyScorer] = Field(
        default_factory=dict,
        description="A scorer for each dimension that labels no pairs, so that the scorers that label are not the only "
        "judges.",
    )
    primary: tuple[Name, Name] = Field(
        description="The systems of the primary comparison, which is named before the run. The first one is also "
        "compared with all others, adjusted for their number."
    )

    @model_validator(mode="after")
    def _check_primary(self) -> Self:
        for name in self.primary:
            if name not in self.systems:
                raise refusal(
                    f"the primary comparison names {name!r}, which is not in `systems`",
                    mend=choose_from(name, self.systems),
                    key=("primary",),
                )
        return self


AnyStep = Annotated[
    RolloutsStep | LabelStep | PairsStep | TrainStep | MergeStep | AnswersStep | ReportStep,
    Field(discriminator="kind"),
]
# Which kinds of step may stand in a field that names a step or several steps.
_FIELDS: Mapping[str, str] = {
    "rollouts": "rollouts",
    "labels": "label",
    "pairs": "pairs",
    "experts": "train",
    "soups": "merge",
    "policies": "train",
    "systems": "answers",
}


class RunRecipe(Declared):
    """The steps of a run. A step that names another step reads its files.

    Steps of the kinds label, pairs and train are made for each target of the labels, and merge for each combination.
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
            for field, needed in named_steps(step):
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


def named_steps(step: Declared) -> list[tuple[str, str]]:
    """Return the names of the steps that a step names, each after the field that names it."""
    named = []
    for field in _FIELDS:
        value = getattr(step, field, None) or ()
        named += [(field, name) for name in ((value,) if isinstance(value, str) else value)]
    return named
