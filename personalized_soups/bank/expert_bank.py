"""The bank: for each module, the stacked LoRA factors of the chosen experts.

Every soup (the weighted sum of the experts) is computed from the bank.

Shapes: R = rank of one expert, K = sum of the experts' ranks, I = in_features, O = out_features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from personalized_soups.adapters.library import Expert
from personalized_soups.files.header import TensorEntry
from personalized_soups.methods.factors import Factors
from personalized_soups.methods.shared_a import SharedRows, group_numbers

# The number of bytes that are compared first. If two experts do not share A, their A's differ in these bytes.
_PROBE_BYTES = 4096


@dataclass(frozen=True, eq=False, slots=True)
class StackedModule:
    """The factors of all experts that adapt one module. Mixing weights are not included.

    Attributes:
        name: the name of the module.
        experts: the positions in the bank of the experts that adapt the module.
        factors: the factors of each expert in `experts`. They may share memory with the mapped adapter files.
        basis: one number for each expert in `experts`. Experts with the same number have byte-identical A's.
    """

    name: str
    experts: tuple[int, ...]
    factors: tuple[Factors, ...]
    basis: tuple[int, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each expert in this module."""
        return tuple(each.rank for each in self.factors)

    @property
    def scalings(self) -> tuple[float, ...]:
        """The scaling of each expert in this module."""
        return tuple(each.scaling for each in self.factors)

    @property
    def a_KI(self) -> Tensor:  # noqa: N802
        """The A's of all experts, stacked by rows in a new tensor."""
        return torch.cat([each.a_RI for each in self.factors], dim=0)

    @property
    def b_OK(self) -> Tensor:  # noqa: N802
        """The B's of all experts, stacked by columns in a new tensor. They are not multiplied by the scalings."""
        return torch.cat([each.b_OR for each in self.factors], dim=1)


class ExpertBank:
    """Reads the factors of the chosen experts one module at a time.

    The bank does not check that the experts are compatible.

    Args:
        experts: the experts, in the order of the mixing weights.
        device: the device of the factors.
    """

    def __init__(self, experts: Sequence[Expert], *, device: torch.device | str = "cpu") -> None:
        self.experts = tuple(experts)
        self.device = torch.device(device)

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """The names of the modules that at least one expert adapts, sorted."""
        return tuple(sorted({name for expert in self.experts for name in expert.adapter.modules}))

    @cached_property
    def shares_basis(self) -> bool:
        """Whether all experts adapt the same modules and have byte-identical A's in each module."""
        return all(len(self.members(name)) == len(self.experts) and not any(self.basis(name)) for name in self.modules)

    def members(self, module: str) -> tuple[int, ...]:
        """Return the positions in the bank of the experts that adapt a module."""
        return tuple(index for index, expert in enumerate(self.experts) if module in expert.adapter.modules)

    def basis(self, module: str) -> tuple[int, ...]:
        """Return one number for each expert in `members(module)`. Equal numbers mean byte-identical A's.

        The numbers are 0, 1, ... in order of first appearance. If two A's differ in their first bytes, the rest of them
        is not read.
        """
        stored = [self.experts[index].adapter.a_bytes(module) for index in self.members(module)]
        return group_numbers(stored, _are_equal)

    def stacked_rank(self, module: str) -> int:
        """Return the total rank of the distinct A's of a module. An A that several experts share is counted once."""
        ranks = [self.experts[index].adapter.modules[module].rank for index in self.members(module)]
        return sum(ranks[index] for index in SharedRows.of(self.basis(module), ranks).firsts)

    def read(self, module: str, dtype: torch.dtype = torch.float32) -> StackedModule:
        """Read the factors of all experts that adapt a module, in `dtype` and on the device of the bank.

        Raises:
            InputError: if a value is NaN or infinite. The message names the file and the tensor.
        """
        members = self.members(module)
        return StackedModule(
            name=module,
            experts=members,
            factors=tuple(self.factors(index, module, dtype) for index in members),
            basis=self.basis(module),
        )

    def factors(self, expert: int, module: str, dtype: torch.dtype = torch.float32) -> Factors:
        """Return the factors of one expert in a module, in `dtype` and on the device of the bank.

        The factors may share memory with the mapped adapter file.

        Args:
            expert: the position of the expert in the bank.
            module: the name of the module.
            dtype: the dtype of the factors.

        Raises:
            InputError: if a value is NaN or infinite. The message names the file and the tensor.
        """
        read = self.experts[expert].adapter.factors(module, dtype)
        return Factors(read.a_RI.to(self.device), read.b_OR.to(self.device), read.scaling)


def _are_equal(one: tuple[TensorEntry, memoryview], other: tuple[TensorEntry, memoryview]) -> bool:
    """Return whether two stored A's have the same dtype, shape and bytes."""
    (entry, data), (other_entry, other_data) = one, other
    if (entry.dtype, entry.shape) != (other_entry.dtype, other_entry.shape):
        return False
    if data[:_PROBE_BYTES] != other_data[:_PROBE_BYTES]:
        return False
    return bool(np.array_equal(np.frombuffer(data, np.uint8), np.frombuffer(other_data, np.uint8)))
