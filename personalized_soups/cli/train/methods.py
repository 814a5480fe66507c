"""The training methods of `psoups train`, and the options that belong to one of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from personalized_soups.cli.bases import catalogue_of, recipe_of
from personalized_soups.errors import UsageError, choose_from

if TYPE_CHECKING:
    from personalized_soups.declare.dimension import Catalogue
    from personalized_soups.declare.training import TrainingRecipe

METHODS = ("dpo", "p-dpo")


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


def check_method(
    method: str, side: str | None, dimensions: Path | None, users: UserOptions, on: Path | None = None
) -> None:
    """Check that the method is known, and that all arguments belong to it.

    Raises:
        UsageError: if they do not.
    """
    if method not in METHODS:
        raise UsageError(f"unknown method {method!r}", where="--method", mend=choose_from(method, METHODS))
    if method == "dpo":
        if users.given:
            raise UsageError(
                "options of a user model are given, but the method dpo trains none",
                where=", ".join(users.given),
                mend=f"add --method p-dpo, or remove {', '.join(users.given)}",
            )
        if side is None:
            raise UsageError(
                "no side is given", where="SIDE", mend="name the side that the pairs prefer, e.g. psoups train concise"
            )
    elif on is not None:
        raise UsageError(
            "--on is for experts; a user model is trained on a base alone",
            where="--on",
            mend="merge the adapter into the base first (psoups merge --into-base), and give the result as --base",
        )
    elif side is not None or dimensions is not None:
        given = ["SIDE"] * (side is not None) + ["--dimensions"] * (dimensions is not None)
        raise UsageError(
            "the method p-dpo learns the preference of each user from the field `user` of the pairs, and has no side",
            where=", ".join(given),
            mend=f"remove {' and '.join(given)}",
        )


def expert_declarations(
    side: str, base: str, dimensions: Path | None, recipe: Path | None
) -> tuple[Catalogue, TrainingRecipe]:
    """Load and check the catalogue and the recipe. Errors in these files are raised before torch is imported."""
    from personalized_soups.declare.dimension import Catalogue
    from personalized_soups.declare.loader import load
    from personalized_soups.declare.training import TrainingRecipe

    catalogue = load(catalogue_of(base, dimensions), Catalogue)
    declared = load(recipe_of(base, recipe), TrainingRecipe)
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
