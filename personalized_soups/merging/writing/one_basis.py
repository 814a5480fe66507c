"""Many users' soups of experts on one basis, from the product straight to the files: A as it is, B's block by block.

U users, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from personalized_soups.merging.computing.module_soups import ModuleSoup, Soups
from personalized_soups.merging.planning.plan import PlannedModule
from personalized_soups.merging.writing.adapter_writer import AdapterWriter, MergedModule, told_whose
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


class ProductWriter:
    """Writes modules for which is_plain_product holds; several threads at once, each with buffers of its own."""

    def __init__(self, soups: Soups, writers: Sequence[AdapterWriter]) -> None:
        self._soups = soups
        self._writers = writers
        self._sums = BlockSums()

    def write(self, module: PlannedModule) -> None:
        """Compute and write one module of every user.

        Raises:
            InputError: naming file and tensor where an expert holds NaN or infinity.
            UsageError: naming the user whose soup does not fit into the dtype.
        """
        stack = self._soups.bank.read(module.name)
        scalings = torch.tensor(stack.scalings, dtype=torch.float64)
        weights_UE = torch.tensor([plan.weights for plan in self._soups.plans], dtype=torch.float64) * scalings
        first = stack.factors[0]
        for writer in self._writers:
            writer.begin(MergedModule.of(ModuleSoup(module, first), writer.plan))
        for start, sums_UC in self._sums.blocks(weights_UE, [each.b_OR for each in stack.factors]):
            for writer, sums in zip(self._writers, sums_UC, strict=True):
                with told_whose(writer.plan):
                    writer.add(module, start, sums)
