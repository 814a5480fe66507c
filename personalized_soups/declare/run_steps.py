"""The kinds of step that a run's recipe declares."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import AfterValidator, Field, model_validator

from personalized_soups.declare.declared import Declared, refusal
from personalized_soups.declare.dimension import AnyScorer, Name
from personalized_soups.declare.profile import MethodName
from personalized_soups.declare.prompt_set import Split
from personalized_soups.errors import choose_from


def _check_not_zero(weight: float) -> float:
    if weight == 0:
        raise refusal("the weight is 0, which leaves out the experts", mend="write another weight, such as 0.6")
    return weight


PositiveInt = Annotated[int, Field(gt=0)]
Weight = Annotated[float, AfterValidator(_check_not_zero)]
File = Annotated[str, Field(pattern=r"\S")]
Targets: TypeAlias = Literal["sides", "combinations", "everyone", "dimensions"]


class Prompts(Declared):
    """Which prompts a step uses."""

    prompts: File = Field(description="The file of prompts. A relative path starts at the folder of the recipe.")
    split: Split | None = Field(
        default=None,
        description="Use only the prompts of this split. Each line of the file then has a kind, a subject and a split.",
    )
    skip_prompts: int = Field(default=0, ge=0, description="Leave out so many prompts at the beginning.")
    num_prompts: PositiveInt | None = Field(default=None, description="Use only so many prompts.")


class RolloutsStep(Prompts):
    """Samples answers to prompts from the base."""

    kind: Literal["rollouts"]
    num_samples: PositiveInt = 2
    instructed: int = Field(
        default=0, ge=0, description="How many of the answers to a prompt are sampled under a side's instruction."
    )
    temperature: Annotated[float, Field(ge=0)] = 1.0
    max_new_tokens: PositiveInt = 256
    batch_size: PositiveInt = 64


class _Targeted(Declared):
    """What answers are rated for. A score is the mean of those towards the target's sides."""

    targets: Targets = Field(
        default="sides",
        description="What is preferred: each side, for experts; each combination of one side of each dimension, for "
        "one policy each; what all users prefer on average, whichever sides they prefer, for a single policy; or the "
        "high side of each dimension, for one backbone each, which is weighted negatively for a user of the low side.",
    )
    beta: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="With the targets `dimensions`, the share of a backbone's own dimension in its score; the other "
        "dimensions share the rest evenly (Bone Soups). With 1, it has no other (Rewarded Soups).",
    )

    @model_validator(mode="after")
    def _check_beta(self) -> Self:
        if self.beta != 1 and self.targets != "dimensions":
            raise refusal(
                f"`beta` is {self.beta:g}, but the targets are {self.targets}",
                mend="remove `beta:`, or write `targets: dimensions`",
                key=("beta",),
            )
        return self


class LabelStep(_Targeted):
    """Labels sampled answers for each target, by the scorers of its sides or by a judge.

    The steps that use these labels, pairs and train, are made for each target, too.
    """

    kind: Literal["label"]
    rollouts: Name = Field(description="The step whose answers are labelled.")
    combinations: tuple[tuple[Name, ...], ...] = Field(
        default=(), description="With the targets `combinations`, only these. Each has one side of each dimension."
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
        if self.combinations and self.targets != "combinations":
            raise refusal(
                f"`combinations` are given, but the targets are {self.targets}",
                mend="remove `combinations:`, or write `targets: combinations`",
                key=("combinations",),
            )
        if self.judge is not None and self.beta != 1:
            raise refusal(
                "a judge cannot weigh dimensions against each other",
                mend="remove `judge:`, so that scorers rate the answers, or remove `beta:`",
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


class TrainStep(_Targeted):
    """Trains an expert, a policy or a reward model for each target of its pairs. Only grpo has targets of its own.

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
        if self.method != "grpo" and self.model_fields_set & {"targets", "beta"}:
            raise refusal(
                f"the method {self.method} has the targets of its pairs",
                mend="write `targets:` in the step that labels the answers",
                key=("targets",),
            )
        return self


class ExpertsStep(Declared):
    """Takes experts that were trained before: one for each side."""

    kind: Literal["experts"]
    folder: File = Field(description="The folder of the experts. A relative path starts at the recipe's folder.")


class MergeStep(Declared):
    """Merges the experts of each combination of sides, one side of each dimension."""

    kind: Literal["merge"]
    experts: Name = Field(description="The step whose experts are merged.")
    method: MethodName = "linear"
    weight: Weight = Field(description="The weight of each expert.")


class _Generating(Prompts):
    """How a step generates answers to held-out prompts."""

    temperature: Annotated[float, Field(ge=0)] = 0.7
    max_new_tokens: PositiveInt = 256
    batch_size: PositiveInt = 64


class ChooseStep(_Generating):
    """Chooses the merge method and the weight of experts by their answers to validation prompts.

    The choice has the largest share of answers that are valid and on the wanted side of every dimension.
    """

    kind: Literal["choose"]
    experts: Name = Field(description="The step whose experts are mixed.")
    weights: dict[MethodName, Annotated[tuple[Weight, ...], Field(min_length=1)]] = Field(
        min_length=1, description="The weights of an expert to try, for each merge method."
    )


class _Weighted(_Generating):
    """At which weight a step mixes experts."""

    weight: Weight | None = Field(default=None, description="The weight of each expert.")
    choice: Name | None = Field(
        default=None, description="The choose step whose weight the experts have, in place of `weight`."
    )


class AnswersStep(_Weighted):
    """Answers prompts with one system, for each combination of sides.

    Without `experts`, `soups` and `policies`, the base answers.
    """

    kind: Literal["answers"]
    experts: Name | None = Field(default=None, description="The step whose experts are mixed.")
    method: MethodName | None = Field(
        default=None, description="The merge method. Left out, it is linear, or with `choice` the chosen one."
    )
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

    @model_validator(mode="after")
    def _check_models(self) -> Self:
        given = [name for name in ("experts", "soups", "policies") if getattr(self, name) is not None]
        if len(given) > 1:
            raise refusal(f"{' and '.join(given)} are given", mend="give one of them, or none for the base")
        _check_weight(self.experts, self.weight, self.choice)
        if self.method is not None and self.experts is None:
            raise refusal("`method` is for experts", mend="give `experts:`, or remove `method:`", key=("method",))
        if self.mixing == "log_probs" and (self.experts is None or self.num_candidates > 1 or self.method is not None):
            raise refusal(
                "log-probabilities are mixed of experts, for one answer",
                mend="give `experts:` and `weight:`, and no `num_candidates:` or `method:`",
                key=("mixing",),
            )
        return self


def _check_weight(experts: Name | None, weight: float | None, choice: Name | None) -> None:
    given = (weight is not None) + (choice is not None)
    if given != (experts is not None):
        raise refusal(
            "`experts` belongs together with `weight`, or with `choice`",
            mend="give `experts:` and one of the other two",
        )


class _Mixing(_Weighted):
    """Which experts a step mixes, and at which weight."""

    experts: Name = Field(description="The step whose experts are mixed.")

    @model_validator(mode="after")
    def _check_one_weight(self) -> Self:
        _check_weight(self.experts, self.weight, self.choice)
        return self


class SweepStep(_Mixing):
    """Answers prompts while the weight moves from one side of a dimension to the other, by the method linear.

    It is done for each dimension and each combination of sides of the other dimensions.
    """

    kind: Literal["sweep"]
    num_steps: int = Field(default=5, ge=2, description="The number of mixtures along a dimension, with both ends.")


class InterferenceStep(_Mixing):
    """Answers prompts with each expert alone, and with each pair of experts of two dimensions, by the method linear."""

    kind: Literal["interference"]


class ReportStep(Declared):
    """Grades the answers of systems to the same prompts, and writes tables, pictures and a page for a browser."""

    kind: Literal["report"]
    systems: tuple[Name, ...] = Field(
        min_length=2, description="The answers steps to compare, in the order of the tables."
    )
    combinations: tuple[tuple[Name, ...], ...] = Field(
        default=(), description="Report on these combinations only. By default, on all that every system has answered."
    )
    judges: dict[Name, AnyScorer] = Field(
        default_factory=dict,
        description="A scorer for each dimension that labels no pairs, so that the scorers that label are not the only "
        "judges.",
    )
    reward_models: Name | None = Field(
        default=None, description="A train step whose reward models of the sides are the judges, in place of `judges`."
    )
    fluency: Name | None = Field(
        default=None,
        description="A rollouts step. Answers that are less fluent than its answers are invalid, by bounds that accept "
        "97% of them.",
    )
    fronts: tuple[Name, ...] = Field(
        default=(), description="The sweep and answers steps whose Pareto fronts are compared."
    )
    interference: Name | None = Field(
        default=None, description="The interference step whose experts are reported on, alone and in pairs."
    )
    primary: tuple[Name, Name] = Field(
        description="The systems of the primary comparison, which is named before the run. The first one is also "
        "compared with all others, adjusted for their number."
    )

    @model_validator(mode="after")
    def _check_judges(self) -> Self:
        if self.judges and self.reward_models is not None:
            raise refusal("`judges` and `reward_models` are given", mend="give one of them", key=("reward_models",))
        return self

    @model_validator(mode="after")
    def _check_primary(self) -> Self:
        for name in self.primary:
            if name not in self.systems:
                raise refusal(
                    f"the primary comparison names {name!r}, which is not in `systems`",
                    mend=choose_from(name, self.systems),
                    key=("primary",),
                )
        if len(set(self.primary)) < len(self.primary):
            raise refusal(
                f"the primary comparison names {self.primary[0]!r} twice", mend="name two systems", key=("primary",)
            )
        repeated = [name for name, count in Counter(self.systems).items() if count > 1]
        if repeated:
            raise refusal(f"{repeated[0]!r} occurs twice", mend="name each system once", key=("systems",))
        return self
