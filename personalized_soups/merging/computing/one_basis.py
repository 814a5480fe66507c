"""Many users' soups of experts that share one basis: A is copied, and one product gives the B's of all users.

U users, E experts, C values of B.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from personalized_soups.merging.computing.module_soups import ModuleSoup, Soups
from personalized_soups.merging.planning.plan import PlannedModule
from personalized_soups.methods.product import BlockSums


def is_plain_product(soups: Soups) -> bool:
    """Return whether every module of every soup is A and one product of the B's, and nothing else."""
    plan = soups.plan
    return (
        len(soups.plans) > 1
        and len(plan.experts) > 1
        and (plan.method.family, plan.encoding) == ("linear", "stacked")
        and plan.shares_basis
        and plan.layout.is_plain
        and all(module.rank == plan.rank and module.like.blocks == 1 for module in plan.modules)
    )


class OneBasisSums:
    """The soups of all users for which is_plain_product holds; several threads may call it, each on its own buffers."""

    def __init__(self, soups: Soups) -> None:
        self._soups = soups
        self._sums = BlockSums()

    def of(self, module: PlannedModule) -> tuple[ModuleSoup, Iterator[tuple[int, Tensor]]]:
        """Return a module's soup whose A all users have, and an iterator over all users' B's, block by block.

        The iterator yields the number of the first value of B in the block, and the values of all users, `[U, C]`. The
        next block overwrites them.

        Raises:
            InputError: if an expert holds NaN or infinity; it names the file and the tensor.
        """
        stack = self._soups.bank.read(module.name)
        # s_e w_e in float64: each coefficient is exact to 2^-53 before the float32 products
        scalings_E = torch.tensor(stack.scalings, dtype=torch.float64)
        weights_UE = torch.tensor([plan.weights for plan in self._soups.plans], dtype=torch.float64) * scalings_E
        blocks = self._sums.blocks(weights_UE, [each.b_OR for each in stack.factors])
        return ModuleSoup(module, stack.factors[0]), blocks
