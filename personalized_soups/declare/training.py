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


class SideOverrides(Declared):
    """Values that replace values of the recipe for one side. Values that are left out are not replaced."""

    learning_rate: Positive | None = None
    epochs: Positive | None = None
    max_steps: PositiveInt | None = None
    beta: Positive | None = None
    sft_weight: NotNegative | None = None

    @model_validator(mode="after")
    def _check_one_end(self) -> Self:
        if self.epochs is not None and self.max_steps is not None:
            raise refusal(
                "a side can have either `epochs` or `max_steps`, but both are given", mend="remove one of the two"
            )
        return self


class TrainingRecipe(Declared):
    """All hyper-parameters for training an expert.

    Example:
        >>> load(shipped_recipe("train/tiny.yaml"), TrainingRecipe).dpo.beta
        1.0
    """

    lora: LoraRecipe
    basis: Literal["free", "shared"] = Field(
        default="free",
        description="`shared` trains only B; all experts have the same frozen A, which is drawn from basis_seed.",
    )
    basis_seed: int = Field(default=0, ge=0)
    dpo: DpoRecipe
    optimizer: OptimizerRecipe
    save_steps: PositiveInt = Field(default=100, description="The number of optimizer steps between two checkpoints.")
    dtype: Literal["float32", "bfloat16", "auto"] = Field(
        default="float32",
        description="The dtype of the base model in memory. `auto` uses the dtype of its files.",
    )
    gradient_checkpointing: bool = False
    users: UsersRecipe | None = Field(
        default=None, description="What is learned of each user. The method p-dpo reads it; the method dpo ignores it."
    )
    sides: dict[str, SideOverrides] = Field(
        default_factory=dict, description="Values that differ for one side, by the name of the side."
    )

    def for_side(self, name: str) -> TrainingRecipe:
        """Return a copy of the recipe for the side `name`: its overrides are applied, and `sides` is empty."""
        overrides = self.sides.get(name, SideOverrides()).model_dump(exclude_none=True)
        optimizer: dict[str, Any] = {key: overrides[key] for key in OptimizerRecipe.model_fields if key in overrides}
        if "epochs" in optimizer:
            optimizer["max_steps"] = None
        elif "max_steps" in optimizer:
            optimizer["epochs"] = None
        dpo = {key: overrides[key] for key in DpoRecipe.model_fields if key in overrides}
        return self.replaced(optimizer=self.optimizer.replaced(**optimizer), dpo=self.dpo.replaced(**dpo), sides={})
