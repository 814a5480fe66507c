"""The numbers that a merge method accepts, with their defaults and bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Option:
    """One number that a method can be given.

    Args:
        name: as people write it in a profile or on the command line.
        keyword: the functions' argument.
        default: where it is not given.
        least: the lower bound; itself left out where `is_open` is set.
        most: the upper bound, itself allowed.
        about: what it does.
        is_open: whether the value must be above `least`.
        is_whole: whether it must be a whole number.
    """

    name: str
    keyword: str
    default: float
    least: float
    most: float
    about: str
    is_open: bool = False
    is_whole: bool = False

    @property
    def bounds(self) -> str:
        """What may be given, in words."""
        kind = "a whole number " if self.is_whole else ""
        return f"{kind}{'above' if self.is_open else 'at least'} {self.least:g} and at most {self.most:.16g}"

    def allows(self, value: float) -> bool:
        """Return whether `value` is within the bounds; NaN is not."""
        above = self.least < value if self.is_open else self.least <= value
        return above and value <= self.most and not (self.is_whole and value != int(value))


OPTIONS: Mapping[str, Option] = MappingProxyType({
    option.name: option
    for option in (
        Option("density", "density", 0.5, 0.0, 1.0, "The share of entries that is kept.", is_open=True),
        Option("epsilon", "epsilon", 0.1, 0.0, 1.0, "Half the width of della's keep-probabilities, about density."),
        Option("lambda", "lambda_", 1.0, 0.0, 1e30, "Scales what an election gives.", is_open=True),
        # a whole number beyond 2^53 would not survive as a float
        Option("seed", "seed", 0, 0, 2**53, "Of the random draws; the same seed, the same soup.", is_whole=True),
    )
})  # fmt: skip
