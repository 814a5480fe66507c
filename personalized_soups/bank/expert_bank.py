"""The bank: the stacked factors of the chosen experts, module by module, from which every soup is made.

E experts, R rank of one expert, K sum of ranks, I in features, O out features.
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

# Bytes to compare first: the A's of experts that do not share A differ within them.
_PROBE_BYTES = 4096


@dataclass(frozen=True, eq=False, slots=True)
class StackedModule:
    """One module's factors of all experts that adapt it, without weights.

    Attributes:
        name: the module's name.
        experts: the experts' positions in the bank.
        factors: the factors of each of these experts; they may share the files' pages.
        basis: a number for each of these experts, the same for experts whose A's are equal byte for byte.
    """

    name: str
    experts: tuple[int, ...]
    factors: tuple[Factors, ...]
    basis: tuple[int, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Each expert's rank at this module."""
        return tuple(each.rank for each in self.factors)

    @property
    def scalings(self) -> tuple[float, ...]:
        """Each expert's scaling at this module."""
        return tuple(each.scaling for each in self.factors)

    @property
    def a_KI(self) -> Tensor:  # noqa: N802
        """The experts' A's stacked by rows, a new tensor."""
        return torch.cat([each.a_RI for each in self.factors], dim=0)

    @property
    def b_OK(self) -> Tensor:  # noqa: N802
        """The experts' B's stacked by columns, without their scalings, a new tensor."""
        return torch.cat([each.b_OR for each in self.factors], dim=1)


class ExpertBank:
    """The chosen experts, read one module at a time. The experts must be compatible; this is not checked.

    Args:
        experts: the experts, in the order of the weights.
        device: the device of the factors.
    """

    def __init__(self, experts: Sequence[Expert], *, device: torch.device | str = "cpu") -> None:
        self.experts = tuple(experts)
        self.device = torch.device(device)

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """The modules that at least one expert adapts, sorted."""
        return tuple(sorted({name for expert in self.experts for name in expert.adapter.modules}))

    @cached_property
    def shares_basis(self) -> bool:
        """Whether all experts adapt the same modules and have the same A in each, byte for byte."""
        return all(len(self.members(name)) == len(self.experts) and not any(self.basis(name)) for name in self.modules)

    def members(self, module: str) -> tuple[int, ...]:
        """Return the positions of the experts that adapt a module."""
        return tuple(index for index, expert in enumerate(self.experts) if module in expert.adapter.modules)

    def basis(self, module: str) -> tuple[int, ...]:
        """Return one number for each of `members(module)`, the same for experts whose A's are equal byte for byte.

        The numbers are 0, 1, ... in order of first appearance. Of A's that differ, only the first bytes are read.
        """
        stored = [self.experts[index].adapter.a_bytes(module) for index in self.members(module)]
        return group_numbers(stored, _are_equal)

    def stacked_rank(self, module: str) -> int:
        """Return the rank of a module's stack: the sum of the members' ranks, an A that several share counted once."""
        ranks = [self.experts[index].adapter.modules[module].rank for index in self.members(module)]
        return sum(ranks[index] for index in SharedRows.of(self.basis(module), ranks).firsts)

    def read(self, module: str, dtype: torch.dtype = torch.float32) -> StackedModule:
        """Return a module's stack in `dtype` on the bank's device.

        Raises:
            InputError: if a value is NaN or infinite, with file and tensor.
        """
        members = self.members(module)
        return StackedModule(
            name=module,
            experts=members,
            factors=tuple(self.factors(index, module, dtype) for index in members),
            basis=self.basis(module),
        )

    def factors(self, expert: int, module: str, dtype: torch.dtype = torch.float32) -> Factors:
        """Return one expert's factors of a module in `dtype` on the bank's device; they may share the file's pages.

        Raises:
            InputError: if a value is NaN or infinite, with file and tensor.
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
