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
    """A soup in the form of one adapter. The tensors are computed only when they are read or written.

    Attributes:
        plan: the plan of the merge.
        library: the experts.
        device: the device that computes the soup.
    """

    plan: MergePlan
    library: ExpertLibrary
    device: torch.device

    def each(self, finish: Callable[[MergedModule], Result]) -> Iterator[Result]:
        """Yield `finish(module)` for every module, in the plan's order. Only a few modules are in memory at once.

        `finish` runs on the thread that computed the module, and several threads run at once. If the plan has an energy
        share, each module has its own rank. Otherwise all modules have the plan's rank: factors of a lower rank are
        padded with zeros.

        Raises:
            InputError: if a tensor of an expert holds NaN or infinity.
            UsageError: if a value of the soup does not fit into the soup's dtype.
        """
        return self._computed[0].each(lambda soups: finish(MergedModule.of(soups[0], self.plan)))

    def modules(self) -> Iterator[MergedModule]:
        """Yield every module, in the plan's order. The memory and the errors are those of `each`."""
        return self.each(lambda module: module)

    @property
    def whole(self) -> WholeTensors | None:
        """The soup's tensors that do not come from low-rank factors; None if the plan has no base."""
        return self._computed[1][0] if self._computed[1] else None

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """All tensors of the adapter on the CPU, by their names in the file. All are in memory at once."""
        modules = list(self.modules())
        ranks = common_ranks(self.plan, {module.name: module.rank for module in modules})
        named = {name: tensor for module in modules for name, tensor in module.padded(ranks[module.name]).named()}
        return {**named, **({} if self.whole is None else self.whole.tensors())}

    def check(self, folder: Path | str | None = None, overwrite: bool = False) -> None:
        """Raise the errors that `write` would raise, as far as the files' headers show them. Nothing is written.

        Args:
            folder: the new folder. With None, only the inputs are checked.
            overwrite: allow that the folder exists, if this tool wrote it.

        Raises:
            SoupError: as `write`, except for errors in the tensors' values and a full disk.
        """
        if folder is not None:
            check_output_apart(Path(folder), self.plan.input_folders)
            check_replaceable(Path(folder).absolute(), overwrite=overwrite)
        on_base([self.plan], ExpertBank(self._experts))

    def write(self, folder: Path | str, overwrite: bool = False, durable: bool = False) -> Path:
        """Write the adapter folder and return its path. Only a few modules are in memory at once.

        The folder appears only when it is complete.

        Args:
            folder: the new folder.
            overwrite: replace the folder if it exists and this tool wrote it.
            durable: flush all bytes to the disk before the folder appears.

        Raises:
            InputError: if a tensor of an expert holds NaN or infinity.
            OutputExistsError: if the folder exists. With `overwrite`, only if this tool did not write the folder.
            UsageError: if the folder is the folder of an expert or of the base, or is inside or around such a folder.
                Also if a value of the soup does not fit into the soup's dtype.
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
    """Return the soup of `profile` (the weighted sum of the experts) as one adapter. `.write(folder)` writes it.

    The base model is never loaded as a whole. In the adapter `r == lora_alpha`, because the scaling is multiplied into
    B. With `options.energy` each module has its own rank. Otherwise all modules have one rank: factors of a lower rank
    are padded with zeros. The coefficients are computed in float64, and every tensor is rounded once to the adapter's
    dtype. If the soup is a plain sum that is not truncated, the A's of the experts are copied.

    Args:
        library: the experts.
        profile: the user's weights.
        options: the choices that override those of the profile. The default is `MergeOptions()`.

    Raises:
        UsageError: if the device is unknown or missing.
        SoupError: all errors of `plan_merge`.

    Example:
        >>> library = ExpertLibrary.open("experts")
        >>> soup = merge(library, Profile(user="ada", weights={"friendly": 0.6, "concise": 0.4}))
        >>> soup.write("ada").name
        'ada'
    """
    options = options or MergeOptions()
    plan = plan_merge(library, profile, options)
    return MergedAdapter(plan, library, arithmetic_device(plan, options.device))
