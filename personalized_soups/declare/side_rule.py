"""The rule that a profile must not give weights to two sides of one dimension, unless it has `allow_opposed: true`."""

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
    """The properties of an expert that the rule needs. `adapters.library.Expert` has them."""

    @property
    def name(self) -> str:
        """The name of the expert in profiles."""

    @property
    def side(self) -> str | None:
        """The side for which the expert was trained, or None if it is unknown."""

    @property
    def dimension(self) -> str | None:
        """The dimension of the expert's side, or None if it is unknown."""


class Opposed(NamedTuple):
    """Two experts that were trained for two sides of one dimension."""

    first: str
    second: str
    dimension: str


@dataclass(frozen=True, slots=True)
class SideRule:
    """Finds opposed experts, which were trained for different sides of one dimension.

    An expert without a dimension is not opposed to any expert. Two experts for the same side are not opposed.

    Attributes:
        dimension_of: the dimension of each expert whose dimension is known, by the expert's name.
        side_of: the side of each expert, by the expert's name. An expert that is not listed has the name of its side.

    Example:
        >>> rule = SideRule({"friendly": "style", "unfriendly": "style"})
        >>> rule.opposed(["friendly", "unfriendly"])
        Opposed(first='friendly', second='unfriendly', dimension='style')
    """

    dimension_of: Mapping[str, str] = field(default_factory=dict)
    side_of: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, experts: Iterable[Sided]) -> SideRule:
        """Return the rule for the given experts.

        The dimension of an expert is recorded in its expert.json. If it is not, the dimension is looked up in the
        shipped catalogue, by the expert's side or, if the side is unknown, by the expert's name.
        """
        listed = list(experts)
        return cls(_dimensions_of(listed), {expert.name: expert.side for expert in listed if expert.side is not None})

    def opposed(self, names: Collection[str]) -> Opposed | None:
        """Return the first two opposed experts among `names`, or None if no two of them are opposed."""
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
        """Check that a profile does not weigh two sides of one dimension, unless it has `allow_opposed: true`.

        Raises:
            DeclarationError: if it does. The place of the error is the weight of the second expert.
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
        # Parsing the catalogue is slow, so it is parsed only if its text contains the name of the side.
        if side in text and (dimension := _catalogue(recipe).dimension_of(side)) is not None:
            dimensions[expert.name] = dimension
    return dimensions


@cache
def _catalogue(recipe: Path) -> Catalogue:
    return load(recipe, Catalogue)
