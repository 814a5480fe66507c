"""The options of merge methods. Each option is a number with a default value and bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Option:
    """An option of merge methods: one number.

    Attributes:
        name: the option's name in a profile and on the command line.
        keyword: the name of the keyword argument of the method's function.
        default: the value if no value is given.
        least: the lower bound. It is itself allowed, unless `is_open` is set.
        most: the upper bound. It is itself allowed.
        about: one sentence that describes the effect of the option.
        is_open: whether the value must be greater than `least`.
        is_whole: whether the value must be a whole number.
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
        """The bounds in words, such as `above 0 and at most 1`."""
        kind = "a whole number " if self.is_whole else ""
        return f"{kind}{'above' if self.is_open else 'at least'} {self.least:g} and at most {self.most:.16g}"

    def allows(self, value: float) -> bool:
        """Return whether `value` is within the bounds. NaN is never within the bounds."""
        above = self.least < value if self.is_open else self.least <= value
        return above and value <= self.most and not (self.is_whole and value != int(value))


OPTIONS: Mapping[str, Option] = MappingProxyType({
    option.name: option
    for option in (
        Option("density", "density", 0.5, 0.0, 1.0, "Share of entries to keep.", is_open=True),
        Option("epsilon", "epsilon", 0.1, 0.0, 1.0, "Half the width of della's keep-probabilities around density."),
        Option("lambda", "lambda_", 1.0, 0.0, 1e30, "Factor on the elected result.", is_open=True),
        # float64 holds whole numbers exactly only up to 2^53
        Option("seed", "seed", 0, 0, 2**53, "Random seed. The same seed gives the same soup.", is_whole=True),
    )
})  # fmt: skip
