"""The preference catalogue: dimensions, their sides, and each side's instruction and scorer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from personalized_soups.declare.declared import Declared, refusal
from personalized_soups.errors import DeclarationError, choose_from

# Names of sides become names of folders and are written in `weights="name=0.6,..."`. All file systems and shells accept
# these characters.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
Phrases = tuple[Annotated[str, Field(pattern=r"\S")], ...]  # a blank phrase would match everywhere


class MarkersScorer(Declared):
    """Counts words and phrases: value = high / (high + low), or 0.5 if the answer has none of them."""

    kind: Literal["markers"]
    high: Phrases = Field(min_length=1, description="Words or phrases of the high end.")
    low: Phrases = Field(description="Words or phrases of the low end. May be empty if the scorer belongs to a side.")

    @model_validator(mode="after")
    def _check_disjoint(self) -> Self:
        shared = {phrase.lower() for phrase in self.high} & {phrase.lower() for phrase in self.low}
        if shared:
            raise refusal(f"{min(shared)!r} is under both `high` and `low`", mend="remove it from one of the two lists")
        return self


class LengthScorer(Declared):
    """Counts words: the value is 0 up to `low` words, 1 from `high` words, and linear in between."""

    kind: Literal["length"]
    low: int = Field(ge=0, description="The number of words up to which the value is 0.")
    high: int = Field(ge=1, description="The number of words from which the value is 1.")

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        _check_order(self.low, self.high)
        return self


class ReadabilityScorer(Declared):
    """Flesch-Kincaid grade: the value is 0 up to grade `low`, 1 from grade `high`, and linear in between.

    Each group of vowels counts as a syllable.
    """

    kind: Literal["readability"]
    low: float = Field(description="The grade up to which the value is 0.")
    high: float = Field(description="The grade from which the value is 1.")

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        _check_order(self.low, self.high)
        return self


class PythonScorer(Declared):
    """A function `(prompt: str, answer: str) -> Scored` in any module that Python can import."""

    kind: Literal["python"]
    function: str = Field(
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", description="The function, written as `package.module:function`."
    )


class PluginScorer(Declared):
    """A scorer that an installed package provides, in the entry-point group `personalized_soups.scorers`."""

    kind: Literal["plugin"]
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="The name of the entry point.")


class ClassifierScorer(Declared):
    """A classifier of texts that `psoups scorer train` has trained. The value is the probability of the high class."""

    kind: Literal["classifier"]
    path: str = Field(
        min_length=1, description="The folder of the classifier. A relative path starts at the catalogue's folder."
    )


AnyScorer: TypeAlias = MarkersScorer | LengthScorer | ReadabilityScorer | PythonScorer | PluginScorer | ClassifierScorer
ScorerSpec = Annotated[
    AnyScorer,
    Field(discriminator="kind", description="The scorer of an answer; its values are in [0, 1]."),
]


class Side(Declared):
    """One end of a dimension, such as `concise`. The expert that is trained for a side has the name of the side."""

    label: str | None = Field(
        default=None,
        min_length=1,
        description="A short label, such as the paper's P1A. It is unique in the catalogue.",
    )
    instruction: str = Field(min_length=1, description="The instruction that states the preference in a prompt.")
    end: Literal["low", "high"] = Field(
        default="high", description="The end of the scorer's scale that this side prefers."
    )
    scorer: ScorerSpec | None = Field(
        default=None, description="The scorer of this side. Without it, the dimension's scorer is used."
    )


class Dimension(Declared):
    """A preference in which users differ, such as the length of answers. It has one or more sides."""

    about: str = Field(min_length=1, description="A description of the dimension in one sentence.")
    scorer: ScorerSpec | None = Field(default=None, description="The scorer of every side that has no own scorer.")
    about_length: bool = Field(
        default=False,
        description="Whether the sides differ in the length of answers. Then pairs are not matched by length. A "
        "dimension with a scorer of the kind `length` is always about length.",
    )
    sides: dict[Name, Side] = Field(min_length=1)


class Catalogue(Declared):
    """All dimensions for which experts are trained. The names of sides are unique in the catalogue.

    Example:
        >>> catalogue = load(shipped_recipe("dimensions/psoups.yaml"), Catalogue)
        >>> catalogue.dimension_of("concise")
        'informativeness'
    """

    dimensions: dict[Name, Dimension] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_unique(self) -> Self:
        for what, names in (
            ("side", [name for dimension in self.dimensions.values() for name in dimension.sides]),
            ("label", self._labels),
        ):
            repeated = [name for name, count in Counter(names).items() if count > 1]
            if repeated:
                mend = f"give every side of the catalogue its own {'name' if what == 'side' else 'label'}"
                raise refusal(f"the {what} {repeated[0]!r} occurs more than once in the catalogue", mend=mend)
        return self

    @property
    def sides(self) -> dict[str, Side]:
        """All sides by name, in the order of the file."""
        return {name: side for dimension in self.dimensions.values() for name, side in dimension.sides.items()}

    def side(self, name: str) -> tuple[str, Side]:
        """Return the side named `name`, preceded by the name of its dimension.

        Raises:
            DeclarationError: if no side has this name. The error suggests the most similar name.
        """
        for dimension, declared in self.dimensions.items():
            if name in declared.sides:
                return dimension, declared.sides[name]
        raise DeclarationError(
            f"unknown side {name!r}", where=self.place("dimensions"), mend=choose_from(name, self.sides)
        )

    def dimension_of(self, expert: str) -> str | None:
        """Return the name of the dimension that has a side named `expert`, or None if there is no such side."""
        return next((name for name, dimension in self.dimensions.items() if expert in dimension.sides), None)

    def instructions(self, sides: Sequence[str]) -> str:
        """Return the instructions of some sides as one text, which preference prompting puts before the prompt.

        Raises:
            DeclarationError: if a side is not in the catalogue.
        """
        return " ".join(self.side(side)[1].instruction for side in sides)

    def is_about_length(self, side: str) -> bool:
        """Return whether the dimension of a side declares `about_length`, or the side's scorer measures length.

        Raises:
            DeclarationError: if the side is unknown, or neither the side nor its dimension has a scorer.
        """
        dimension, _ = self.side(side)
        return self.dimensions[dimension].about_length or isinstance(self.scorer_of(side), LengthScorer)

    @property
    def _labels(self) -> list[str]:
        sides = [side for dimension in self.dimensions.values() for side in dimension.sides.values()]
        return [side.label for side in sides if side.label is not None]

    def scorer_of(self, name: str) -> AnyScorer:
        """Return the scorer of the side `name`. A side without a scorer has the scorer of its dimension.

        Raises:
            DeclarationError: if the side is unknown, or neither the side nor its dimension has a scorer.
        """
        dimension, side = self.side(name)
        scorer = side.scorer or self.dimensions[dimension].scorer
        if scorer is None:
            raise DeclarationError(
                f"the side {name!r} has no scorer",
                where=self.place("dimensions", dimension, "sides", name),
                mend=f"add a `scorer:` to the side or to the dimension {dimension!r}",
            )
        return scorer


def _check_order(low: float, high: float) -> None:
    if low >= high:
        raise refusal(
            f"low ({low:g}) is not below high ({high:g})",
            mend="exchange the two numbers; to invert the scale of a side, write `end: low`",
        )
