"""The experts and their measurements, from which the doctor's rules derive findings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from personalized_soups.bank.expert_bank import ExpertBank
from personalized_soups.merging.doctor.diagnosis import Pile
from personalized_soups.merging.doctor.measures import Measures


@dataclass(frozen=True, eq=False, slots=True)
class MeasuredExperts:
    """The experts whose files are valid, and their measurements.

    An expert is identified by its position in the bank.

    Attributes:
        bank: the experts.
        measures: the measurements of the experts' tensors.
        weights: the weight of each expert in the profile. None without a profile.
        dimensions: the preference dimension of each expert that has a dimension, by the expert's name.
        base_norms: the Frobenius norm of each base tensor that the experts change, by the tensor's name. None without a
            base.
        duplicates: the pairs of experts whose weight files are equal byte for byte, with the lower position first.
    """

    bank: ExpertBank
    measures: Measures
    weights: tuple[float, ...] | None
    dimensions: Mapping[str, str]
    base_norms: Mapping[str, float] | None
    duplicates: frozenset[tuple[int, int]]

    @property
    def chosen(self) -> tuple[int, ...]:
        """The experts in the soup: those with a weight other than 0. Without a profile, all experts."""
        every = range(len(self.bank.experts))
        return tuple(every) if self.weights is None else tuple(index for index in every if self.weights[index] != 0)

    @property
    def measured(self) -> tuple[int, ...]:
        """The experts in the soup that contain neither NaN nor infinity."""
        return tuple(index for index in self.chosen if index not in self.measures.faults)

    @property
    def shares_basis(self) -> bool:
        """Whether all experts in the soup have the same A in each module."""
        return ExpertBank([self.bank.experts[index] for index in self.chosen]).shares_basis

    @property
    def pile(self) -> Pile | None:
        """The norms of the profile's weighted sum.

        None without a profile, if all weights are 0, or if an expert in the soup contains NaN or infinity.
        """
        if self.weights is None or len(self.measured) < max(len(self.chosen), 1):
            return None
        weights = [self.weights[index] for index in self.measured]
        products = self.measures.products.tolist()
        # |sum w d|^2 = sum_ij w_i w_j <d_i, d_j>
        square = math.fsum(
            weights[i] * weights[j] * products[first][second]
            for i, first in enumerate(self.measured)
            for j, second in enumerate(self.measured)
        )
        parts = [self.part(index) for index in self.measured]
        return Pile(math.sqrt(max(square, 0.0)), math.hypot(*parts), math.fsum(parts))

    def name(self, index: int) -> str:
        """Return the name of the expert at a position."""
        return self.bank.experts[index].name

    def part(self, index: int) -> float:
        """Return the norm `|w d|` of an expert's weighted delta. Without a profile, the weight w is 1."""
        weight = 1.0 if self.weights is None else abs(self.weights[index])
        return weight * self.measures.norm(index)

    def relative(self, index: int) -> float | None:
        """Return the norm of an expert's delta divided by the norm of the base tensors that the expert changes.

        Return None without a base, if the base lacks one of these tensors, or if the norms are not usable (0, NaN or
        infinite).
        """
        if self.base_norms is None or index in self.measures.faults:
            return None
        names = {module.base_name for module in self.bank.experts[index].adapter.modules.values()}
        if not names <= self.base_norms.keys():
            return None
        whole = math.hypot(*(self.base_norms[name] for name in names))
        return self.measures.norm(index) / whole if 0 < whole < math.inf else None

    def are_of_one_dimension(self, first: int, second: int) -> bool:
        """Return whether two experts are sides of the same dimension.

        A profile usually gives a weight to only one of two such experts.
        """
        dimension = self.dimensions.get(self.name(first))
        return dimension is not None and dimension == self.dimensions.get(self.name(second))
