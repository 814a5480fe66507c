"""Compute the soups of many users if all experts share their A's.

Each A is copied, and one matrix product computes the B's of all users.

Shapes: U = number of users, E = number of experts, C = number of values of B in a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from personalized_soups.merging.computing.module_soups import ModuleSoup, Soups
from personalized_soups.merging.planning.plan import PlannedModule
from personalized_soups.methods.product import BlockSums


def is_plain_product(soups: Soups) -> bool:
    """Return whether each module of all soups consists only of the shared A and a weighted sum of the experts' B's."""
    plan = soups.plan
    # one user or one expert needs no product; blocks of mixtures are interleaved, and other ranks need padding; a soup
    # that includes a base adapter has other ranks, because `module.rank` does not count those of the adapter
    return (
        len(soups.plans) > 1
        and len(plan.experts) > 1
        and (plan.method.family, plan.encoding) == ("linear", "stacked")
        and plan.shares_basis
        and plan.layout.is_plain
        and all(module.rank == plan.rank and module.like.blocks == 1 for module in plan.modules)
    )


class OneBasisSums:
    """Computes soups for which `is_plain_product` returns True. Several threads may call `of` at once."""

    def __init__(self, soups: Soups) -> None:
        self._soups = soups
        # thread-local: each thread has its own buffers
        self._sums = BlockSums()

    def of(self, module: PlannedModule) -> tuple[ModuleSoup, Iterator[tuple[int, Tensor]]]:
        """Return a soup of the module with the A of all users, and an iterator over blocks of the users' B's.

        The B of the returned soup is that of an expert and is not used. For each block, the iterator yields the index
        of the block's first value in the flattened B, and the values of all users as a tensor `[U, C]`. The next block
        overwrites this tensor.

        Raises:
            InputError: if an expert holds NaN or infinity. The message names the file and the tensor.
        """
        stack = self._soups.bank.read(module.name)
        # the coefficients s_e w_e are computed in float64, so each is rounded only once to float32
        scalings_E = torch.tensor(stack.scalings, dtype=torch.float64)
        weights_UE = torch.tensor([plan.weights for plan in self._soups.plans], dtype=torch.float64) * scalings_E
        blocks = self._sums.blocks(weights_UE, [each.b_OR for each in stack.factors])
        return ModuleSoup(module, stack.factors[0]), blocks
