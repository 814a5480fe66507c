"""Write the soups of many users whose experts share one basis: blocks of B go from the product to the users' files."""

from __future__ import annotations

from collections.abc import Sequence

from personalized_soups.merging.computing.merged_modules import MergedModule
from personalized_soups.merging.computing.module_soups import Soups
from personalized_soups.merging.computing.one_basis import OneBasisSums
from personalized_soups.merging.planning.checks import naming_user
from personalized_soups.merging.planning.plan import PlannedModule
from personalized_soups.merging.writing.adapter_writer import AdapterWriter


class OneBasisWriter:
    """Writes the modules of soups for which is_plain_product holds; several threads may write at once.

    Args:
        soups: the soups of all users.
        writers: each user's writer, in the order of the soups' plans.
    """

    def __init__(self, soups: Soups, writers: Sequence[AdapterWriter]) -> None:
        self._sums = OneBasisSums(soups)
        self._writers = writers

    def write(self, module: PlannedModule) -> None:
        """Compute and write one module for every user.

        Raises:
            InputError: if an expert holds NaN or infinity; it names the file and the tensor.
            UsageError: if a user's soup does not fit into the dtype; it names the user.
        """
        soup, blocks = self._sums.of(module)
        for writer in self._writers:
            writer.begin(MergedModule.of(soup, writer.plan))
        for start, sums_UC in blocks:
            for writer, sums_C in zip(self._writers, sums_UC, strict=True):
                with naming_user(writer.plan):
                    writer.add(module, start, sums_C)
