"""The training methods of `psoups train`, and the options that belong to one of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_args

from personalized_soups.cli.bases import catalogue_of, recipe_of
from personalized_soups.errors import UsageError, choose_from

if TYPE_CHECKING:
    from personalized_soups.declare.dimension import Catalogue
    from personalized_soups.declare.training import AdapterRecipe, TrainingRecipe

RecipeT = TypeVar("RecipeT", bound="AdapterRecipe")

# Shipped recipes of a kind have its prefix: tiny.yaml is for DPO, and reward-tiny.yaml for reward models.
_PREFIXES = {"TrainingRecipe": "", "RewardRecipe": "reward-", "GrpoRecipe": "grpo-", "SftRecipe": "sft-"}
METHODS = ("dpo", "sft", "reward", "grpo", "p-dpo")
_MERGE_FIRST = "merge the adapter into the base first (psoups merge --into-base), and give the result as --base"


@dataclass(frozen=True, slots=True)
class UserOptions:
    """The options of a user model. None means that the recipe decides.

    Attributes:
        model: the kind of user model.
        tokens: the number of soft tokens.
        clusters: the number of clusters.
        alpha: the weight of the user's own loss.
    """

    model: str | None
    tokens: int | None
    clusters: int | None
    alpha: float | None

    @property
    def given(self) -> list[str]:
        """The names of the given options."""
        values = {
            "--user-model": self.model,
            "--user-tokens": self.tokens,
            "--clusters": self.clusters,
            "--alpha": self.alpha,
        }
        return [name for name, value in values.items() if value is not None]


@dataclass(frozen=True, slots=True)
class RewardOptions:
    """The options of RL.

    Attributes:
        weights: the weight of each reward, as text; None for the side's scorer alone.
        models: the reward models, each as `NAME=FOLDER`.
        instruction: the text before each prompt.
    """

    weights: str | None
    models: list[str]
    instruction: str

    @property
    def given(self) -> list[str]:
        """The names of the given options."""
        values = {"--reward": self.weights, "--reward-model": self.models, "--instruction": self.instruction}
        return [name for name, value in values.items() if value]

    def parsed(self) -> tuple[dict[str, float] | None, dict[str, str]]:
        """Return the weights and the reward models by name.

        Raises:
            UsageError: if a text has another form.
        """
        from personalized_soups.declare.profile import Profile

        weights = None if self.weights is None else Profile.parse_weights(self.weights)
        models = {}
        for text in self.models:
            name, sign, place = text.partition("=")
            if not (name and sign and place):
                raise UsageError(
                    f"{text!r} is not a name and a folder",
                    where="--reward-model",
                    mend="write e.g. --reward-model good=rewards/good",
                )
            models[name] = place
        return weights, models


@dataclass(frozen=True, slots=True)
class MethodOptions:
    """The options of `psoups train` that belong to some of the methods.

    Attributes:
        method: the method.
        side: the side, or for grpo with rewards the name of a policy.
        dimensions: the catalogue.
        on: the adapter on top of which the adapter is trained.
        users: the options of a user model.
        rewards: the options of RL.
    """

    method: str
    side: str | None
    dimensions: Path | None
    on: Path | None
    users: UserOptions
    rewards: RewardOptions

    def check(self) -> None:
        """Check that the method is known, and that all options belong to it.

        Raises:
            UsageError: if they do not.
        """
        if self.method not in METHODS:
            raise UsageError(
                f"unknown method {self.method!r}", where="--method", mend=choose_from(self.method, METHODS)
            )
        if self.method != "p-dpo":
            self._reject(self.users.given, "p-dpo", "options of a user model", "trains none")
        if self.method != "grpo":
            self._reject(self.rewards.given, "grpo", "options of rewards", "has none")
        if self.on is not None and self.method in {"reward", "p-dpo"}:
            what = "reward model" if self.method == "reward" else "user model"
            raise UsageError(
                f"--on is for experts; a {what} is trained on a base alone", where="--on", mend=_MERGE_FIRST
            )
        if self.method == "p-dpo":
            self._reject_side()
        elif self.side is None:
            raise UsageError(
                "no side is given", where="SIDE", mend="name the side that the pairs prefer, e.g. psoups train concise"
            )

    def _reject(self, given: list[str], method: str, what: str, why: str) -> None:
        if given:
            raise UsageError(
                f"{what} are given, but the method {self.method} {why}",
                where=", ".join(given),
                mend=f"add --method {method}, or remove {', '.join(given)}",
            )

    def _reject_side(self) -> None:
        given = ["SIDE"] * (self.side is not None) + ["--dimensions"] * (self.dimensions is not None)
        if given:
            raise UsageError(
                "the method p-dpo learns the preference of each user from the field `user` of the pairs, and has no "
                "side",
                where=", ".join(given),
                mend=f"remove {' and '.join(given)}",
            )


def side_declarations(
    side: str | None, base: str, dimensions: Path | None, recipe: Path | None, kind: type[RecipeT]
) -> tuple[Catalogue, RecipeT]:
    """Load and check the catalogue and the recipe. Errors in these files are raised before torch is imported.

    Args:
        side: the side to train for, which the catalogue must have. None checks no side.
        base: the base, as the user gave it.
        dimensions: the catalogue; None for the shipped one that suits the base.
        recipe: the recipe; None for the shipped one of this kind that suits the base.
        kind: the kind of the recipe.
    """
    from personalized_soups.declare.dimension import Catalogue
    from personalized_soups.declare.loader import load

    catalogue = load(catalogue_of(base, dimensions), Catalogue)
    declared = load(recipe_of(base, recipe, prefix=_PREFIXES[kind.__name__]), kind)
    if side is not None:
        catalogue.side(side)
    return catalogue, declared


def user_recipe(base: str, recipe: Path | None, options: UserOptions) -> TrainingRecipe:
    """Load the recipe, and put the options in the place of its values.

    Raises:
        DeclarationError: if the recipe is invalid.
        UsageError: if the kind of user model is unknown, or --clusters is given for a kind without clusters.
    """
    from personalized_soups.declare.loader import load
    from personalized_soups.declare.training import TrainingRecipe, UserModelKind, UsersRecipe

    declared = load(recipe_of(base, recipe), TrainingRecipe)
    kinds = get_args(UserModelKind)
    if options.model is not None and options.model not in kinds:
        raise UsageError(
            f"unknown user model {options.model!r}", where="--user-model", mend=choose_from(options.model, kinds)
        )
    values = {"model": options.model, "tokens": options.tokens, "clusters": options.clusters, "alpha": options.alpha}
    users = (declared.users or UsersRecipe()).replaced(
        **{name: value for name, value in values.items() if value is not None}
    )
    if options.clusters is not None and users.model != "cluster":
        raise UsageError(
            f"--clusters is given, but the user model {users.model!r} has no clusters",
            where="--clusters",
            mend="add --user-model cluster, or remove --clusters",
        )
    return declared.replaced(users=users)
