"""Merge a profile into one LoRA adapter, which PEFT, transformers and vLLM load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from personalized_soups.adapters.library import Expert, ExpertLibrary
from personalized_soups.bank.expert_bank import ExpertBank
from personalized_soups.declare.profile import Profile
from personalized_soups.files.atomic import check_replaceable, check_target, new_folder
from personalized_soups.files.digest import BackgroundDigests
from personalized_soups.merging.computing.merged_modules import MergedModule, common_ranks
from personalized_soups.merging.computing.module_soups import Soups
from personalized_soups.merging.computing.whole_tensors import WholeTensors, on_base
from personalized_soups.merging.planning.options import MergeOptions
from personalized_soups.merging.planning.plan import MergePlan, arithmetic_device
from personalized_soups.merging.planning.planner import plan_merge
from personalized_soups.merging.writing.adapter_writer import AdapterWriter
from personalized_soups.merging.writing.inputs import check_output_apart, input_records

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class MergedAdapter:
    """A soup that can be written as an adapter. Nothing is computed before the tensors are read or written.

    Attributes:
        plan: the plan of the merge.
        library: the experts.
        device: where the arithmetic runs.
    """

    plan: MergePlan
    library: ExpertLibrary
    device: torch.device

    def each(self, finish: Callable[[MergedModule], Result]) -> Iterator[Result]:
        """Yield `finish(module)` for every module, in the plan's order. Memory: the few modules in use.

        `finish` runs on the thread that computed the module, and several threads run at once. All modules have the
        plan's rank (lower ranks are padded with zeros), unless an energy share gives each module its own.

        Raises:
            InputError: if an expert holds NaN or infinity.
            UsageError: if the soup does not fit into its dtype.
        """
        return self._computed[0].each(lambda soups: finish(MergedModule.of(soups[0], self.plan)))

    def modules(self) -> Iterator[MergedModule]:
        """Yield every module, in the plan's order. Memory and errors: as `each`."""
        return self.each(lambda module: module)

    @property
    def whole(self) -> WholeTensors | None:
        """The tensors that experts trained whole; None if the plan has no base."""
        return self._computed[1][0] if self._computed[1] else None

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor, by its name in the file, on the CPU. All are in memory at once."""
        modules = list(self.modules())
        ranks = common_ranks(self.plan, {module.name: module.rank for module in modules})
        named = {name: tensor for module in modules for name, tensor in module.padded(ranks[module.name]).named()}
        return {**named, **({} if self.whole is None else self.whole.tensors())}

    def check(self, folder: Path | str | None = None, overwrite: bool = False) -> None:
        """Raise the errors of `write` that the files' headers show. Nothing is written.

        Args:
            folder: the new folder; None checks the inputs alone.
            overwrite: replace the folder if this tool wrote it.

        Raises:
            SoupError: as `write`, except for errors in the tensors' values and a full disk.
        """
        if folder is not None:
            check_output_apart(Path(folder), self.plan.input_folders)
            check_replaceable(Path(folder).absolute(), overwrite=overwrite)
        on_base([self.plan], ExpertBank(self._experts))

    def write(self, folder: Path | str, overwrite: bool = False, durable: bool = False) -> Path:
        """Write the adapter folder, all or nothing, and return it. Memory: the few modules in use.

        Args:
            folder: the new folder.
            overwrite: replace the folder if this tool wrote it.
            durable: write all bytes to the disk before the folder appears.

        Raises:
            InputError: if an expert holds NaN or infinity.
            OutputExistsError: if the folder exists; with `overwrite`, if it exists and this tool did not write it.
            UsageError: if the folder is an expert's, or inside or around one; if the soup does not fit into its dtype.
            RunError: if the disk is full.
        """
        folder = Path(folder)
        check_output_apart(folder, self.plan.input_folders)
        check_target(folder, overwrite=overwrite)
        read = [path for expert in self._experts for path in expert.adapter.files]
        with (
            new_folder(folder, overwrite, durable=durable) as scratch,
            BackgroundDigests(read) as digests,
            AdapterWriter(scratch, self.plan, self.whole) as writer,
        ):
            for _ in self.each(writer.put):
                pass
            writer.finish(self.device, input_records(self.plan, self.library, digests.results()))
        return folder

    @cached_property
    def _computed(self) -> tuple[Soups, list[WholeTensors]]:
        return on_base([self.plan], ExpertBank(self._experts, device=self.device))

    @property
    def _experts(self) -> list[Expert]:
        return [self.library[expert.name] for expert in self.plan.experts]


def merge(library: ExpertLibrary, profile: Profile, options: MergeOptions | None = None) -> MergedAdapter:
    """Return the soup of `profile` as one adapter; `.write(folder)` writes the folder. The base is never loaded whole.

    The scaling is multiplied into B and `r == lora_alpha`. All modules have one rank (lower ranks are padded with
    zeros), unless `options.energy` gives each module its own. Arithmetic: float64 for the coefficients, one rounding to
    the dtype. Without truncation, every A is copied unchanged.

    Args:
        library: the experts.
        profile: the user's weights.
        options: the choices that override the profile's; the defaults if left out.

    Raises:
        SoupError: all errors of plan_merge; UsageError if the device is unknown or missing.

    Example:
        >>> library = ExpertLibrary.open("experts")
        >>> soup = merge(library, Profile(user="ada", weights={"friendly": 0.6, "concise": 0.4}))
        >>> soup.write("ada").name
        'ada'
    """
    options = options or MergeOptions()
    plan = plan_merge(library, profile, options)
    return MergedAdapter(plan, library, arithmetic_device(plan, options.device))
