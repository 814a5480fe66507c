"""Measurements of experts' tensors: norms, angles, overlaps and signs. They are computed module by module.

Shapes: E = number of experts, O = out_features, I = in_features, N = number of sampled rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from personalized_soups.adapters.base_model import BaseModel
from personalized_soups.adapters.placement import blocks_of
from personalized_soups.bank.expert_bank import ExpertBank
from personalized_soups.errors import InputError
from personalized_soups.methods.blocks import row_blocks
from personalized_soups.methods.factors import Factors
from personalized_soups.methods.overlap import inner_products, opposed_energies, row_overlaps
from personalized_soups.methods.streams import Stream


@dataclass(eq=False, slots=True)
class Measures:
    """Measurements of every pair of experts, summed over the modules that both experts adapt in the same shape.

    All matrices are float64 `[E, E]` on the CPU.

    Attributes:
        products: the inner products of the deltas.
        faults: the errors about NaN or infinity, by the expert's position in the bank.
    """

    products: Tensor
    _inputs: _Mean
    _outputs: _Mean
    _opposed: Tensor
    _energies: Tensor
    faults: dict[int, list[InputError]] = field(default_factory=dict)

    @classmethod
    def of(cls, bank: ExpertBank, num_rows: int, progress: Callable[[int, int], None] | None = None) -> Measures:
        """Measure the experts. Each module of each expert is read once.

        One module of all experts and `num_rows` dense rows of that module are in memory at a time.

        Args:
            bank: the experts. Modules of different shapes are not compared.
            num_rows: the number of sampled rows of each module in which signs are counted. In a module with fewer rows,
                all rows are used.
            progress: a function that is called with the number of modules that have been read and the number of all
                modules.
        """
        count = len(bank.experts)
        zeros = [torch.zeros(count, count, dtype=torch.float64) for _ in range(3)]
        measures = cls(zeros[0], _Mean(count), _Mean(count), zeros[1], zeros[2])
        for number, name in enumerate(bank.modules, 1):
            measures._add_module(bank, name, num_rows)
            if progress is not None:
                progress(number, len(bank.modules))
        for index, expert in enumerate(bank.experts):
            for name in expert.adapter.trained:
                try:
                    expert.adapter.trained_tensor(name)
                except InputError as fault:
                    measures.faults.setdefault(index, []).append(fault)
        return measures

    def norm(self, expert: int) -> float:
        """Return the Frobenius norm of an expert's deltas, with all modules as one vector."""
        return math.sqrt(float(self.products[expert, expert]))

    def cosine(self, first: int, second: int) -> float | None:
        """Return the cosine of the angle between the deltas of two experts, or None if a delta is 0."""
        norms = self.norm(first) * self.norm(second)
        return max(-1.0, min(1.0, float(self.products[first, second]) / norms)) if norms > 0 else None

    def inputs(self, first: int, second: int) -> float | None:
        """Return the mean overlap of the row spaces of two experts' A's, or None if no overlap is defined."""
        return self._inputs.of(first, second)

    def outputs(self, first: int, second: int) -> float | None:
        """Return the mean overlap of the column spaces of two experts' B's, or None if no overlap is defined."""
        return self._outputs.of(first, second)

    def opposed(self, first: int, second: int) -> float | None:
        """Return the share of the squared norm that is in entries where the signs of two experts differ.

        The share is the mean of the two experts' shares. Return None if a delta is 0.
        """
        energies = self._energies[first, second], self._energies[second, first]
        if not all(float(energy) > 0 for energy in energies):
            return None
        shares = self._opposed[first, second] / energies[0], self._opposed[second, first] / energies[1]
        return float(shares[0] + shares[1]) / 2

    def _add_module(self, bank: ExpertBank, name: str, num_rows: int) -> None:
        groups: dict[tuple[int, ...], dict[int, Factors]] = {}
        for index in bank.members(name):
            module = bank.experts[index].adapter.modules[name]
            try:
                factors = bank.factors(index, name, torch.float64)
            except InputError as fault:
                self.faults.setdefault(index, []).append(fault)
                continue
            groups.setdefault((module.blocks, module.out_features, module.in_features), {})[index] = factors
        for (blocks, out_features, _), group in groups.items():
            rows_N = sampled_rows(name, out_features, num_rows)
            for parts in zip(*(blocks_of(factors, blocks) for factors in group.values()), strict=True):
                self._add(list(group), parts, rows_N)

    def _add(self, experts: Sequence[int], factors: Sequence[Factors], rows_N: Tensor) -> None:
        positions = torch.tensor(experts)
        at = (positions[:, None], positions)
        self.products[at] += inner_products(factors)
        self._inputs.add(at, row_overlaps([part.a_RI for part in factors]))
        self._outputs.add(at, row_overlaps([part.b_OR.T for part in factors]))
        opposed_EE, energy_E = opposed_energies(factors, rows_N)
        # scale from the sampled rows to all rows, so that each module counts in proportion to its size
        scale = factors[0].b_OR.shape[0] / len(rows_N)
        self._opposed[at] += opposed_EE * scale
        self._energies[at] += energy_E[:, None].expand_as(opposed_EE) * scale


class _Mean:
    """The mean over modules of a value per pair of experts. A value may be missing (NaN) in some modules."""

    def __init__(self, count: int) -> None:
        self._sums = torch.zeros(count, count, dtype=torch.float64)
        self._counts = torch.zeros(count, count, dtype=torch.float64)

    def add(self, at: tuple[Tensor, Tensor], values: Tensor) -> None:
        self._sums[at] += values.nan_to_num(0.0)
        self._counts[at] += (~values.isnan()).double()

    def of(self, first: int, second: int) -> float | None:
        count = float(self._counts[first, second])
        return float(self._sums[first, second]) / count if count else None


def sampled_rows(module: str, out_features: int, num_rows: int) -> Tensor:
    """Return the rows of a module in which signs are counted, in ascending order.

    If the module has more than `num_rows` rows, the rows are a random sample with a fixed seed.
    """
    if out_features <= num_rows:
        return torch.arange(out_features)
    return Stream.of(0, module, "sampled rows").uniform((out_features,)).argsort(stable=True)[:num_rows].sort().values


def base_norms(model: BaseModel, names: Iterable[str]) -> Mapping[str, float]:
    """Return the Frobenius norm of each of the named base tensors, by the tensor's name.

    Tensors that the base does not have are left out.
    """
    norms = {}
    for name in names:
        stored = model.find(name)
        if stored is not None:
            tensor = model.checkpoint.tensor(stored)
            matrix = tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.flatten(1)
            squares = (float(torch.linalg.vector_norm(matrix[rows].double())) ** 2 for rows in row_blocks(matrix))
            norms[name] = math.sqrt(math.fsum(squares))
    return norms
