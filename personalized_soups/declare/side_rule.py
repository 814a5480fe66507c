"""Opposed experts: a profile may not weigh two sides of one dimension, unless it says so."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple, Protocol

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.loader import load
from personalized_soups.declare.profile import Profile
from personalized_soups.declare.shipped import shipped_recipe
from personalized_soups.errors import DeclarationError


class Sided(Protocol):
    """An expert, as far as the rule looks at it; `adapters.library.Expert` is one."""

    @property
    def name(self) -> str:
        """The name by which profiles weigh the expert."""

    @property
    def side(self) -> str | None:
        """The side that the expert was trained for; None if unknown."""

    @property
    def dimension(self) -> str | None:
        """The dimension of that side; None if unknown."""


class Opposed(NamedTuple):
    """Two experts that were trained for two sides of one dimension."""

    first: str
    second: str
    dimension: str


@dataclass(frozen=True, slots=True)
class SideRule:
    """Finds experts that oppose each other: two sides of one dimension.

    Experts without a dimension oppose nobody. Two experts of one side do not oppose each other.

    Attributes:
        dimension_of: the dimension of each expert that has one, by the expert's name.
        side_of: the side of each expert that is not named after its side.

    Example:
        >>> rule = SideRule({"friendly": "style", "unfriendly": "style"})
        >>> rule.opposed(["friendly", "unfriendly"])
        Opposed(first='friendly', second='unfriendly', dimension='style')
    """

    dimension_of: Mapping[str, str] = field(default_factory=dict)
    side_of: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, experts: Iterable[Sided]) -> SideRule:
        """Return the rule for these experts.

        An expert's dimension is the one in its expert.json. An expert without a dimension takes the dimension that the
        shipped catalogue gives its side or its name.
        """
        listed = list(experts)
        return cls(_dimensions_of(listed), {expert.name: expert.side for expert in listed if expert.side is not None})

    def opposed(self, names: Collection[str]) -> Opposed | None:
        """Return the first two of the named experts that oppose each other, None if no two do."""
        first: dict[str, str] = {}
        for name in names:
            dimension = self.dimension_of.get(name)
            if dimension is None:
                continue
            earlier = first.setdefault(dimension, name)
            if self.side_of.get(earlier, earlier) != self.side_of.get(name, name):
                return Opposed(earlier, name, dimension)
        return None

    def check(self, profile: Profile) -> None:
        """Raise if the profile weighs two sides of one dimension and does not say `allow_opposed: true`.

        Raises:
            DeclarationError: with the place of the second expert's weight.
        """
        if profile.allow_opposed:
            return
        match = self.opposed([name for name, weight in profile.weights.items() if weight != 0])
        if match is not None:
            raise DeclarationError(
                f"{match.first!r} and {match.second!r} are two sides of one dimension, {match.dimension!r}, "
                "but both have a weight",
                where=profile.place("weights", match.second),
                mend="remove one of the two, or set allow_opposed=True (in a profile file: `allow_opposed: true`)",
            )


def _dimensions_of(experts: Sequence[Sided]) -> dict[str, str]:
    dimensions = {expert.name: expert.dimension for expert in experts if expert.dimension is not None}
    unknown = [expert for expert in experts if expert.name not in dimensions]
    if len(experts) < 2 or not unknown:
        return dimensions
    recipe = shipped_recipe("dimensions/psoups.yaml")
    text = recipe.read_text(encoding="utf-8")
    for expert in unknown:
        side = expert.side or expert.name
        # Parsing the YAML takes as long as reading the experts' headers, so a name that the text lacks is skipped.
        if side in text and (dimension := _catalogue(recipe).dimension_of(side)) is not None:
            dimensions[expert.name] = dimension
    return dimensions


@cache
def _catalogue(recipe: Path) -> Catalogue:
    return load(recipe, Catalogue)
