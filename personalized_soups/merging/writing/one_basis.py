"""Write the adapters of many users whose experts share their A's.

The B's of all users are computed block by block, and each block is written to the users' files at once.

Shapes: U = number of users, C = number of values of B in a block.
"""

from __future__ import annotations

from collections.abc import Sequence

from personalized_soups.merging.computing.merged_modules import MergedModule
from personalized_soups.merging.computing.module_soups import Soups
from personalized_soups.merging.computing.one_basis import OneBasisSums
from personalized_soups.merging.planning.checks import naming_user
from personalized_soups.merging.planning.plan import PlannedModule
from personalized_soups.merging.writing.adapter_writer import AdapterWriter


class OneBasisWriter:
    """Writes the modules of soups for which `is_plain_product` returns True. Several threads may call `write` at once.

    Args:
        soups: the soups of all users.
        writers: the writer of each user, in the order of `soups.plans`.
    """

    def __init__(self, soups: Soups, writers: Sequence[AdapterWriter]) -> None:
        self._sums = OneBasisSums(soups)
        self._writers = writers

    def write(self, module: PlannedModule) -> None:
        """Compute and write one module for every user.

        Raises:
            InputError: if an expert holds NaN or infinity. The message names the file and the tensor.
            UsageError: if a value of a user's soup does not fit into the dtype. The message names the user.
        """
        soup, blocks = self._sums.of(module)
        for writer in self._writers:
            writer.begin(MergedModule.of(soup, writer.plan))
        for start, sums_UC in blocks:
            for writer, sums_C in zip(self._writers, sums_UC, strict=True):
                with naming_user(writer.plan):
                    writer.add(module, start, sums_C)
