"""`Persona`: a simulated user, who answers questions by declared preferences."""

from __future__ import annotations

import math
from typing import Annotated, Self

from pydantic import Field, model_validator

from personalized_soups.declare.declared import Declared, KeyPath, refusal
from personalized_soups.declare.dimension import Catalogue, Name
from personalized_soups.errors import DeclarationError, choose_from

Phrase = Annotated[str, Field(min_length=1)]


class Change(Declared):
    """A change of a persona's preferences."""

    after: int = Field(ge=0, description="The number of answers before the change.")
    weights: dict[Name, float] = Field(
        min_length=1, description="The weights after the change. They replace all others."
    )


class Persona(Declared):
    """A simulated user. The reward of an answer is a weighted sum of its scores. The answer with more reward is better.

    An answer is scored in each dimension, from -1 at the low end to 1 at the high end. An invalid answer scores 0 in
    every dimension, and loses the reward `invalid`.

    Example:
        >>> persona = Persona(weights={"friendly": 1.0, "informativeness": -0.5})
        >>> persona.by_dimension(load(shipped_recipe("dimensions/tiny.yaml"), Catalogue))
        {'style': 1.0, 'informativeness': -0.5}
    """

    name: str = Field(default="persona", min_length=1, description="The name of the simulated user.")
    weights: dict[Name, float] = Field(
        default={},
        description="The weight of each dimension or side. A positive weight of a dimension prefers its high end. "
        "A positive weight of a side prefers that side.",
    )
    phrases: dict[Phrase, float] = Field(
        default={},
        description="A weight for each occurrence of a text, such as `,`. It makes users whose taste no dimension "
        "measures.",
    )
    invalid: float = Field(default=2.0, ge=0, description="The reward that an invalid answer loses.")
    temperature: float = Field(
        default=0.0,
        ge=0,
        description="The temperature of logistic answers: `a` is chosen with probability "
        "sigmoid((reward of a - reward of b) / temperature). With 0, the better answer is always chosen.",
    )
    noise: float = Field(default=0.0, ge=0, lt=0.5, description="The probability that the other answer is chosen.")
    ties_within: float = Field(
        default=0.0, ge=0, description="Two answers are a tie if their rewards differ by no more."
    )
    skips: float = Field(default=0.0, ge=0, lt=1, description="The probability that a question is skipped.")
    change: Change | None = Field(default=None, description="A change of the weights after some answers.")
    seed: int = Field(default=0, ge=0, description="The seed of random answers.")

    @model_validator(mode="after")
    def _check_taste(self) -> Self:
        if not any(self.weights.values()) and not any(self.phrases.values()):
            raise refusal(
                "all weights are 0, so the persona has no preference",
                mend="give a weight such as `friendly: 1.0`",
                key=("weights",),
            )
        for key, values in (("weights", self.weights), ("phrases", self.phrases)):
            for name, value in values.items():
                if not math.isfinite(value):
                    raise refusal(f"the weight {value!r} is not finite", mend="write a number", key=(key, name))
        return self

    def by_dimension(self, catalogue: Catalogue, *, num_answers: int = 0) -> dict[str, float]:
        """Return the weight of each dimension's high end after some answers. Weights of one dimension are added.

        Raises:
            DeclarationError: if a weight names neither a dimension nor a side of the catalogue.
        """
        change = self.change
        is_changed = change is not None and num_answers >= change.after
        weights, where = (
            (change.weights, ("change", "weights")) if change and is_changed else (self.weights, ("weights",))
        )
        total: dict[str, float] = {}
        for name, weight in weights.items():
            dimension, sign = self._resolved(name, catalogue, (*where, name))
            total[dimension] = total.get(dimension, 0.0) + sign * weight
        return total

    def _resolved(self, name: str, catalogue: Catalogue, path: KeyPath) -> tuple[str, float]:
        if name in catalogue.dimensions:
            return name, 1.0
        if (dimension := catalogue.dimension_of(name)) is not None:
            return dimension, 1.0 if catalogue.sides[name].end == "high" else -1.0
        raise DeclarationError(
            f"unknown dimension or side {name!r}",
            where=self.place(*path),
            mend=choose_from(name, {*catalogue.dimensions, *catalogue.sides}),
        )
