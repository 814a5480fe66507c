"""`SearchSpace`: the numbers that the search changes, and the weights of experts that they stand for.

Shapes: X = coordinates, A = coordinates of one layer group, G = layer groups (1 if all layers have the same weights).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from personalized_soups.declare.expert_weights import Weight
from personalized_soups.declare.side_rule import SideRule
from personalized_soups.users.tuning.objective import Floats

# Weights have this many decimals, so that the weights that are written are exactly those that were measured.
_DECIMALS = 4


@dataclass(frozen=True, slots=True)
class Axis:
    """Experts whose weights are read from the same coordinates.

    Attributes:
        sides: the experts of each side of one dimension. An expert without opposed experts has an axis of its own.
    """

    sides: tuple[tuple[str, ...], ...]

    @property
    def experts(self) -> tuple[str, ...]:
        """All experts of the axis."""
        return tuple(name for side in self.sides for name in side)

    @property
    def is_signed(self) -> bool:
        """Whether one number weighs two opposed experts: the second if it is positive, the first if negative."""
        return [len(side) for side in self.sides] == [1, 1]

    @property
    def num_coordinates(self) -> int:
        """The number of coordinates in each layer group."""
        return 1 if self.is_signed else len(self.experts)

    def decoded(self, x_AG: Floats) -> dict[str, Floats]:
        """Return the weight of each expert in each layer group, [G].

        Only one side of a dimension has weights. Of two opposed experts, the sign of the coordinates' sum decides which
        one. Else the side with the largest coordinate (in magnitude, summed over groups) has weights; they are reduced
        as the second largest side approaches it, so that the weights are continuous where the side changes.
        """
        if len(self.sides) == 1:
            return dict(zip(self.experts, x_AG, strict=True))
        if self.is_signed:
            low, high = self.experts
            return {high: x_AG[0]} if x_AG[0].sum() >= 0 else {low: -x_AG[0]}
        of_expert = dict(zip(self.experts, x_AG, strict=True))
        strengths = [max(float(np.abs(of_expert[name]).sum()) for name in side) for side in self.sides]
        second, first = sorted(strengths)[-2:]
        if first == second:
            return {}
        winner = self.sides[strengths.index(first)]
        return {name: of_expert[name] * (first - second) / first for name in winner}

    def encoded(self, weights: Mapping[str, float], num_groups: int) -> Floats:
        """Return [A, G]: coordinates whose weights are `weights`, if there are any."""
        numbers = [weights.get(name, 0.0) for name in self.experts]
        if self.is_signed:
            low, high = numbers
            numbers = [high or -low]
        return np.repeat(np.array(numbers, dtype=np.float64)[:, None], num_groups, axis=1)


class SearchSpace:
    """Vectors of numbers, and the weights that they mean.

    If opposed sides are not allowed, one signed number weighs two opposed experts. A coordinate is repeated for
    each layer group.

    Attributes:
        axes: the axes of one layer group.
        num_coordinates: the number X of coordinates.

    Args:
        experts: the names of the experts.
        sides: the rule that finds opposed experts. None allows opposed sides, so each expert has a number.
        groups: the patterns of each layer group. None gives all layers the same weights.
    """

    def __init__(
        self, experts: Sequence[str], sides: SideRule | None, groups: Sequence[Sequence[str]] | None = None
    ) -> None:
        self.axes = _axes(experts, sides)
        self._groups = groups
        self._num_groups = 1 if groups is None else len(groups)
        self.num_coordinates = sum(axis.num_coordinates for axis in self.axes) * self._num_groups

    def weights(self, x_X: Floats) -> dict[str, Weight]:
        """Return the weights of a vector, rounded to 4 decimals, without experts whose weights are all 0."""
        rows = x_X.reshape(-1, self._num_groups)
        found: dict[str, Weight] = {}
        start = 0
        for axis in self.axes:
            part = rows[start : start + axis.num_coordinates]
            start += axis.num_coordinates
            for name, of_group in axis.decoded(part).items():
                numbers = [round(float(number), _DECIMALS) + 0.0 for number in of_group]  # + 0.0 makes -0.0 positive
                if any(numbers):
                    found[name] = self._weight(numbers)
        return found

    def vector(self, weights: Mapping[str, float]) -> Floats:
        """Return [X]: a vector whose weights are `weights`.

        Of two opposed experts, at most one can have a weight, which must be positive. If a negative weight is given,
        the vector gives the opposed expert the weight without the sign.
        """
        parts = [axis.encoded(weights, self._num_groups).reshape(-1) for axis in self.axes]
        return np.concatenate(parts)

    def _weight(self, numbers: Sequence[float]) -> Weight:
        if self._groups is None:
            return numbers[0]
        return {pattern: number for group, number in zip(self._groups, numbers, strict=True) for pattern in group}


def _axes(experts: Sequence[str], sides: SideRule | None) -> list[Axis]:
    if sides is None:
        return [Axis(((name,),)) for name in experts]
    by_dimension: dict[tuple[str, str], dict[str, list[str]]] = {}
    for name in experts:
        dimension = sides.dimension_of.get(name)
        # An expert without a dimension is opposed to no expert. It may have the name of a dimension.
        key = ("expert", name) if dimension is None else ("dimension", dimension)
        by_dimension.setdefault(key, {}).setdefault(sides.side_of.get(name, name), []).append(name)
    return [Axis(tuple(map(tuple, by_side.values()))) for by_side in by_dimension.values()]
