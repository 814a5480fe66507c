"""The plan of a merge. It holds all decisions, which are made from the files' headers before a tensor is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from personalized_soups.adapters.modules import LoraModule
from personalized_soups.adapters.provenance import BaseAdapterRecord, BaseRecord, MethodRecord
from personalized_soups.declare.profile import Profile
from personalized_soups.devices import MERGE_DEVICES, DtypeName, resolve_device, torch_dtype
from personalized_soups.merging.planning.layout import Layout
from personalized_soups.merging.planning.vllm import vllm_max_lora_rank
from personalized_soups.methods.method import Method

PlannedEncoding = Literal["stacked", "truncated", "folded"]
Target = Literal["peft", "vllm"]


@dataclass(frozen=True, slots=True)
class PlannedExpert:
    """One expert of a merge.

    Attributes:
        name: the expert's name in the library.
        folder: the expert's folder, as an absolute path.
        weight: the mixing weight that the merge method uses, after the profile's normalization.
    """

    name: str
    folder: str
    weight: float


@dataclass(frozen=True, slots=True)
class PlannedModule:
    """One module of a merge.

    A mixture-of-experts parameter has several blocks, and each block has its own factors. The ranks below are then the
    ranks of one block.

    Attributes:
        like: the module of one expert, with the names that the module's factors have in the merged adapter.
        experts: the names of the experts that adapt this module.
        full_rank: the rank of the experts' soup before truncation; 0 if only the base adapter adapts this module.
        rank: the maximum rank of the experts' soup after truncation.
        on_rank: the rank of the base adapter in this module, which is written in addition to `rank`; 0 if the plan does
            not include the adapter, or the adapter does not adapt this module.
    """

    like: LoraModule
    experts: tuple[str, ...]
    full_rank: int
    rank: int
    on_rank: int = 0

    @property
    def written_rank(self) -> int:
        """The maximum rank of the module in the merged adapter."""
        return self.rank + self.on_rank

    @property
    def name(self) -> str:
        """The module's name in the base model."""
        return self.like.name

    @property
    def out_features(self) -> int:
        """The number of rows of B."""
        return self.like.out_features

    @property
    def in_features(self) -> int:
        """The number of columns of A. For a convolution, this includes the positions of the kernel."""
        return self.like.in_features


@dataclass(frozen=True, slots=True)
class MergePlan:
    """All decisions of a merge. A plan holds no tensors, and `lines()` returns the plan as readable text.

    Attributes:
        profile: the user's profile, without changes.
        method: the merge method.
        method_source: the module and the digest of the file that define the merge method; None for a built-in method.
        options: the options of the merge method, including the defaults of options that are not given.
        target: the program that will load the merged adapter.
        energy: the share of each module's squared Frobenius norm that truncation keeps; None if no share is given.
        encoding: how the soup is written. A `stacked` soup has factors that are not truncated, a `truncated` soup has
            truncated factors, and a `folded` soup is added to the base.
        experts: the experts with weights other than 0, sorted by name.
        modules: the modules that any expert or the included base adapter adapts, sorted by name.
        rank: the rank of the merged adapter. With `energy`, this is the maximum rank of a module.
        dtype: the dtype of the merged adapter. A folded model keeps the dtypes of its base.
        fits_vllm: whether vLLM supports every kind of module and tensor that the experts have.
        base: the name and the fingerprint of the base model, as far as they are known.
        base_folder: the folder of the base if a base is given for a merged adapter, else None.
        revision: the base's revision in the experts' configurations; None if the experts have different revisions.
        task_type: PEFT's task type in the experts' configurations; None if the experts have different task types.
        layout: the names and shapes of the merged adapter's tensors, and its configuration.
        shares_basis: whether all experts have the same A at every module.
        on: the adapter on top of which the experts were trained; None if there is none, or no file names it.
        on_folder: the folder of this adapter, as an absolute path, if the soup includes its delta; else None.
    """

    profile: Profile
    method: Method
    method_source: MethodRecord | None
    options: Mapping[str, float]
    target: Target
    energy: float | None
    encoding: PlannedEncoding
    experts: tuple[PlannedExpert, ...]
    modules: tuple[PlannedModule, ...]
    rank: int
    dtype: DtypeName
    fits_vllm: bool
    base: BaseRecord
    base_folder: str | None
    revision: str | None
    task_type: str | None
    layout: Layout
    shares_basis: bool
    on: BaseAdapterRecord | None = None
    on_folder: str | None = None

    @property
    def weights(self) -> tuple[float, ...]:
        """The experts' weights, in the order of `experts`."""
        return tuple(expert.weight for expert in self.experts)

    @property
    def input_folders(self) -> tuple[str, ...]:
        """The folders that the merge reads: those of the experts, the included base adapter, and an adapter's base."""
        others = (folder for folder in (self.on_folder, self.base_folder) if folder is not None)
        return (*(expert.folder for expert in self.experts), *others)

    @property
    def num_bytes(self) -> int:
        """The size of the merged adapter's factors in bytes. With `energy`, this is the maximum size."""
        numbers = sum(
            self.rank * module.like.blocks * (module.in_features + module.out_features) for module in self.modules
        )
        return numbers * torch_dtype(self.dtype).itemsize

    @property
    def vllm_max_lora_rank(self) -> int | None:
        """The lowest --max-lora-rank with which vLLM loads the merged adapter; None if vLLM cannot load the adapter."""
        return vllm_max_lora_rank(self.rank) if self.fits_vllm else None

    def lines(self) -> list[str]:
        """Return the plan as lines of readable text."""
        experts = " + ".join(f"{expert.weight:g} {expert.name}" for expert in self.experts)
        basis = ", one shared basis" if self.shares_basis else ""
        share = "" if self.energy is None else f"at most, {self.energy:g} of each module's energy, "
        held = f"rank {self.rank}, {share}{self.num_bytes} bytes of {self.dtype}"
        options = "".join(f", {name} {value:g}" for name, value in self.options.items())
        if self.on is not None:
            included = "included once" if self.on_folder is not None else "not included, so load it as well"
            experts += f", on top of {self.on.name} ({included})"
        lines = [
            f"soup:     {experts}",
            f"method:   {self.method.name}: {self.method.formula}{options}",
            f"encoding: {self.encoding}{basis}" + ("" if self.encoding == "folded" else f", {held}"),
            f"base:     {self.base.name or 'not named'}",
            f"modules:  {len(self.modules)}",
        ]
        if self.encoding != "folded":
            most = self.vllm_max_lora_rank
            lines.append(f"vLLM:     {'cannot load this' if most is None else f'--max-lora-rank {most}'}")
        return lines


def arithmetic_device(plan: MergePlan, device: str) -> torch.device:
    """Return the device that computes a plan: the CPU for sums of factors, else `device`.

    A GPU would not make sums of factors faster. The sums would have to be copied back to be written, and the CPU
    computes them about as fast as it copies them. A plan with DoRA is computed on `device`, because DoRA also needs
    products with the base.

    Raises:
        UsageError: if the device is unknown or missing.
    """
    target = resolve_device(device, kinds=MERGE_DEVICES)
    is_sum_of_factors = plan.encoding == "stacked" and not plan.layout.use_dora
    return torch.device("cpu") if is_sum_of_factors else target
