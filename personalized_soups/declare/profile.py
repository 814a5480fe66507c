"""`Profile`: the mixing weight of each expert for one user."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from personalized_soups.declare.declared import Declared, refusal
from personalized_soups.declare.loader import load, load_data
from personalized_soups.errors import UsageError, choose_from
from personalized_soups.methods.plugins import is_method_name, method_names
from personalized_soups.methods.table import METHODS


def _check_method(name: str) -> str:
    if not is_method_name(name):
        raise refusal(f"{name!r} is not a known merge method", mend=choose_from(name, method_names()))
    return name


# The JSON schema must be the same on every machine. So it lists the names of the built-in methods and also accepts any
# other string, which may name a method of an installed package.
MethodName = Annotated[
    str,
    AfterValidator(_check_method),
    Field(json_schema_extra={"anyOf": [{"enum": list(METHODS)}, {"type": "string"}]}),
]

# Weights cancel if their sum is at most this share of the sum of their magnitudes. Dividing by such a sum would amplify
# rounding errors.
_CANCELLED = 1e-6

# A larger weight is a typing error. Up to this limit, no product of a weight, a scaling and a factor overflows float64.
MAX_WEIGHT = 1e30


class Profile(Declared):
    """The mixing weight of each expert for one user, and the method that merges the experts.

    Example:
        >>> profile = Profile(user="ada", weights={"friendly": 0.6, "concise": 0.3})
        >>> profile.resolved_weights()
        {'friendly': 0.6, 'concise': 0.3}
    """

    user: str = Field(default="anonymous", min_length=1, description="The user's name, which is recorded in soup.json.")
    method: MethodName = Field(default="linear", description="The merge method.")
    options: dict[str, float] = Field(
        default={},
        description="Options of the method, such as `density: 0.3`. docs/reference/methods.md lists them.",
    )
    normalize: Literal["none", "sum"] = Field(
        default="none", description="`sum` divides the weights by their sum. `none` uses them unchanged."
    )
    weights: dict[str, float] = Field(
        min_length=1, description="The mixing weight of each expert, by the expert's name. A weight may be negative."
    )
    allow_opposed: bool = Field(default=False, description="Allow weights on two sides of one dimension.")
    rank: Annotated[int, Field(gt=0)] | None = Field(
        default=None, description="The rank to which the merged adapter is truncated. Without it, the adapter is exact."
    )

    @field_validator("weights")
    @classmethod
    def _check_weights(cls, weights: dict[str, float]) -> dict[str, float]:
        if not all(name.strip() for name in weights):
            raise refusal("an expert's name is empty", mend="name the expert: `friendly: 0.6`")
        if not any(weights.values()):
            raise refusal(
                "all weights are zero, so there is nothing to merge", mend="give one expert a weight other than 0"
            )
        for name, weight in weights.items():
            if abs(weight) > MAX_WEIGHT:
                raise refusal(
                    f"the weight of {name!r} is {weight:g}, but it must be between -{MAX_WEIGHT:g} and {MAX_WEIGHT:g}",
                    mend="write a weight such as 0.6",
                    key=(name,),
                )
        return weights

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        if self.method not in METHODS:
            return (
                self  # only the package knows its options, and reading a profile imports no package: plan_merge checks
            )
        try:
            METHODS[self.method].resolved(self.options)
        except UsageError as error:
            raise refusal(error.what, mend=error.mend, key=("options", error.where)) from None
        return self

    @model_validator(mode="after")
    def _check_sum(self) -> Self:
        self.resolved_weights()
        return self

    @staticmethod
    def parse_weights(text: str) -> dict[str, float]:
        """Parse a text such as `friendly=0.6,concise=0.3` and return the weight of each expert.

        Raises:
            UsageError: if the text is invalid. The message names the invalid part.
        """
        weights: dict[str, float] = {}
        for part in text.split(","):
            name, equals, number = (piece.strip() for piece in part.partition("="))
            if not (name and equals and number):
                raise _bad_weights(f"{part.strip()!r} is not `name=number`")
            if name in weights:
                raise _bad_weights(f"the expert {name!r} is repeated")
            try:
                weights[name] = float(number)
            except ValueError:
                raise _bad_weights(f"the weight of {name!r} is not a number: {number!r}") from None
            if not math.isfinite(weights[name]):
                raise _bad_weights(f"the weight of {name!r} is not finite: {number!r}")
        return weights

    @classmethod
    def from_option(cls, text: str, **fields: Any) -> Self:
        """Return a profile with the weights in `text`, such as `friendly=0.6,concise=0.3`, and with the other `fields`.

        Raises:
            UsageError: if the text is invalid.
            DeclarationError: if a field is invalid.
        """
        return load_data({**fields, "weights": cls.parse_weights(text)}, cls, "weights")

    def resolved_weights(self) -> dict[str, float]:
        """Return the weights for the merge. They are divided by their sum if the profile has `normalize: sum`."""
        if self.normalize == "none":
            return dict(self.weights)
        total = math.fsum(self.weights.values())
        if abs(total) <= _CANCELLED * math.fsum(abs(weight) for weight in self.weights.values()):
            raise refusal(
                f"the weights sum to {total:g}, so `normalize: sum` cannot divide by their sum",
                mend="write `normalize: none`, or weights that do not cancel",
                key=("normalize",),
            )
        return {name: weight / total for name, weight in self.weights.items()}


def load_profile(path: Path | str) -> Profile:
    """Read a profile from a YAML or JSON file.

    Raises:
        DeclarationError: if the file cannot be read or is invalid.

    Example:
        >>> load_profile(shipped_recipe("profiles/example.yaml")).weights
        {'elementary': 0.6, 'concise': 0.6, 'friendly': 0.6}
    """
    return load(Path(path), Profile)


def _bad_weights(what: str) -> UsageError:
    return UsageError(what, where="weights", mend="write weights=elementary=0.6,concise=0.6")
