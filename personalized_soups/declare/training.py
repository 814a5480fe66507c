"""The training recipe of an expert, which has all hyper-parameters of the training."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from personalized_soups.declare.declared import Declared, refusal

Positive = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]

UserModelKind: TypeAlias = Literal["individual", "cluster", "uninformative"]


class LoraRecipe(Declared):
    """The settings of the LoRA adapter."""

    rank: PositiveInt
    alpha: Positive = Field(
        description="The scaling of the adapter is alpha / rank, or alpha / sqrt(rank) with rslora."
    )
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    rslora: bool = False


class DpoRecipe(Declared):
    """The loss: DPO's sigmoid loss, plus `sft_weight` times the mean negative log-probability of the chosen answer."""

    beta: Positive
    sft_weight: NotNegative = 1.0
    max_length: PositiveInt = Field(
        description="The maximum number of tokens of prompt and answer. Longer pairs are truncated."
    )


class OptimizerRecipe(Declared):
    """The settings of AdamW, the schedule of its learning rate, and the length of the training."""

    learning_rate: Positive
    weight_decay: NotNegative = 0.0
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = Field(default=0, ge=0)
    max_grad_norm: Positive = 1.0
    epochs: Positive | None = None
    max_steps: PositiveInt | None = None
    batch_size: PositiveInt = Field(description="The number of pairs in one forward pass of one process.")
    gradient_accumulation: PositiveInt = 1

    @model_validator(mode="after")
    def _check_one_end(self) -> Self:
        if (self.epochs is None) == (self.max_steps is None):
            found = "neither is given" if self.epochs is None else "both are given"
            raise refusal(
                f"the recipe needs either `epochs` or `max_steps`, but {found}", mend="write one of them: `epochs: 1`"
            )
        return self


class UsersRecipe(Declared):
    """What is learned of each user in addition to the adapter: soft tokens before the prompt (P-RLHF)."""

    model: UserModelKind = Field(
        default="individual",
        description="`individual`: own soft tokens for each user. `cluster`: a mixture of shared soft tokens for each "
        "user. `uninformative`: the same soft tokens for all users.",
    )
    tokens: PositiveInt = Field(default=10, description="The number of soft tokens before the prompt.")
    clusters: PositiveInt = Field(default=5, description="The number of shared sets of soft tokens, for `cluster`.")
    alpha: float = Field(
        default=0.5, ge=0, le=1, description="The weight of the user's own loss; the generic user's has 1 - alpha."
    )
    learning_rate_factor: Positive = Field(
        default=10.0, description="The learning rate of the soft tokens, divided by that of the adapter."
    )


class OptimizerOverrides(Declared):
    """Values that replace values of the recipe for one side. Values that are left out are not replaced."""

    learning_rate: Positive | None = None
    epochs: Positive | None = None
    max_steps: PositiveInt | None = None

    @model_validator(mode="after")
    def _check_one_end(self) -> Self:
        if self.epochs is not None and self.max_steps is not None:
            raise refusal(
                "a side can have either `epochs` or `max_steps`, but both are given", mend="remove one of the two"
            )
        return self


class SideOverrides(OptimizerOverrides):
    """Values that replace values of a recipe of DPO for one side."""

    beta: Positive | None = None
    sft_weight: NotNegative | None = None


class AdapterRecipe(Declared):
    """The hyper-parameters that every training of a LoRA adapter has."""

    lora: LoraRecipe
    basis: Literal["free", "shared", "core"] = Field(
        default="free",
        description="`shared` trains only B; all experts have the same frozen A, which is drawn from basis_seed. "
        "`core` also draws a frozen basis of B, and trains a square matrix between A and this basis: rank x rank "
        "numbers for each module.",
    )
    basis_seed: int = Field(default=0, ge=0)
    optimizer: OptimizerRecipe
    save_steps: PositiveInt = Field(default=100, description="The number of optimizer steps between two checkpoints.")
    dtype: Literal["float32", "bfloat16", "auto"] = Field(
        default="float32",
        description="The dtype of the base model in memory. `auto` uses the dtype of its files.",
    )
    gradient_checkpointing: bool = False

    def with_overrides(self, overrides: OptimizerOverrides) -> dict[str, Any]:
        """Return the fields of this recipe that a side's overrides replace."""
        optimizer: dict[str, Any] = {
            key: value
            for key, value in overrides.model_dump(exclude_none=True).items()
            if key in OptimizerRecipe.model_fields
        }
        if "epochs" in optimizer:
            optimizer["max_steps"] = None
        elif "max_steps" in optimizer:
            optimizer["epochs"] = None
        return {"optimizer": self.optimizer.replaced(**optimizer), "sides": {}}


class TrainingRecipe(AdapterRecipe):
    """All hyper-parameters for training an expert by DPO.

    Example:
        >>> load(shipped_recipe("train/tiny.yaml"), TrainingRecipe).dpo.beta
        1.0
    """

    dpo: DpoRecipe
    users: UsersRecipe | None = Field(
        default=None, description="What is learned of each user. The method p-dpo reads it; the method dpo ignores it."
    )
    sides: dict[str, SideOverrides] = Field(
        default_factory=dict, description="Values that differ for one side, by the name of the side."
    )

    def for_side(self, name: str) -> TrainingRecipe:
        """Return a copy of the recipe for the side `name`: its overrides are applied, and `sides` is empty."""
        overrides = self.sides.get(name, SideOverrides())
        dpo = {
            key: value
            for key, value in overrides.model_dump(exclude_none=True).items()
            if key in DpoRecipe.model_fields
        }
        return self.replaced(dpo=self.dpo.replaced(**dpo), **self.with_overrides(overrides))


class OneLossRecipe(AdapterRecipe):
    """A recipe of which each side can replace the values of the optimizer, and no values of the loss."""

    sides: dict[str, OptimizerOverrides] = Field(
        default_factory=dict, description="Values that differ for one side, by the name of the side."
    )

    def for_side(self, name: str) -> Self:
        """Return a copy of the recipe for the side `name`: its overrides are applied, and `sides` is empty."""
        return self.replaced(**self.with_overrides(self.sides.get(name, OptimizerOverrides())))


class RewardModelRecipe(Declared):
    """The loss of a reward model: `-log sigmoid(r(chosen) - r(rejected))` (Bradley and Terry 1952)."""

    max_length: PositiveInt = Field(
        description="The maximum number of tokens of prompt and answer. Longer texts are truncated."
    )
    center: NotNegative = Field(
        default=0.01,
        description="The weight of the mean of (r(chosen) + r(rejected))^2, which keeps rewards near 0 (Eisenstein et "
        "al. 2023, arXiv:2312.09244).",
    )


class RewardRecipe(OneLossRecipe):
    """All hyper-parameters for training a reward model: a base with LoRA and one output."""

    reward: RewardModelRecipe


class PolicyRecipe(Declared):
    """How a policy learns from rewards of its own answers, by GRPO (Shao et al. 2024, arXiv:2402.03300).

    In each step, the policy samples a group of answers to each prompt. An answer's advantage is its reward minus the
    mean of its group, divided by the group's standard deviation if `scale` is true.
    """

    beta: NotNegative = Field(default=0.04, description="The weight of the KL divergence to the reference policy.")
    num_generations: int = Field(default=8, ge=2, description="The number of answers in a group.")
    max_new_tokens: PositiveInt = Field(default=64, description="The largest number of tokens of an answer.")
    temperature: Positive = 1.0
    clip: Positive = Field(default=0.2, description="How far the ratio of new to old probabilities may move from 1.")
    scale: bool = Field(default=True, description="Whether to divide by the standard deviation of the group.")


class GrpoRecipe(OneLossRecipe):
    """All hyper-parameters for training an adapter by RL. `optimizer.batch_size` counts answers, not prompts."""

    grpo: PolicyRecipe

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if self.optimizer.batch_size % self.grpo.num_generations:
            raise refusal(
                f"the batch of {self.optimizer.batch_size} answers does not hold whole groups of "
                f"{self.grpo.num_generations}",
                mend=f"write a batch_size that is a multiple of {self.grpo.num_generations}",
                key=("optimizer", "batch_size"),
            )
        return self


class CompletionsRecipe(Declared):
    """The loss of SFT: the mean negative log-probability of the completions' tokens."""

    max_length: PositiveInt = Field(
        description="The maximum number of tokens of prompt and completion. Longer texts are truncated."
    )


class SftRecipe(OneLossRecipe):
    """All hyper-parameters for training an adapter by SFT. `optimizer.batch_size` counts completions."""

    sft: CompletionsRecipe
