"""A soup as one LoRA adapter that PEFT, transformers and vLLM load.

R rank, I in features, O out features.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personalized_soups.adapters.config import CONFIG_FILE
from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.adapters.lora import WEIGHTS_FILE
from personalized_soups.adapters.names import a_name, b_name
from personalized_soups.adapters.provenance import (
    SOUP_FILE,
    InputRecord,
    SoupRecord,
    TruncationRecord,
    library_versions,
    write_record,
)
from personalized_soups.bank import ExpertBank
from personalized_soups.declare.profile import Profile
from personalized_soups.errors import UsageError
from personalized_soups.files.atomic import new_folder
from personalized_soups.files.digest import BackgroundDigests
from personalized_soups.files.writer import spec_of, write_safetensors
from personalized_soups.merging.plan import MergePlan, PlannedModule, plan_merge, resolve_device, torch_dtype
from personalized_soups.methods.factors import Factors
from personalized_soups.methods.lowrank import truncate
from personalized_soups.methods.table import Method


@dataclass(frozen=True, eq=False, slots=True)
class MergedAdapter:
    """A soup held as an adapter: `tensors` by their names in the file, on the CPU; `config` as PEFT reads it."""

    plan: MergePlan
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    record: SoupRecord

    def write(self, folder: Path | str, overwrite: bool = False) -> Path:
        """Write the adapter folder, all or nothing, and return it.

        Raises:
            OutputExistsError: if the folder is there (and, with `overwrite`, is not of this tool's making).
            UsageError: if the folder is one of the experts, or inside or around one.
            RunError: if the disk is full.
        """
        folder = Path(folder)
        check_output_apart(folder, [expert.folder for expert in self.plan.experts])
        with new_folder(folder, overwrite) as scratch:
            specs = [spec_of(name, tensor) for name, tensor in self.tensors.items()]
            write_safetensors(scratch / WEIGHTS_FILE, specs, self.tensors.items(), {"format": "pt"})
            text = json.dumps(self.config, indent=2, ensure_ascii=False)
            (scratch / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
            write_record(scratch, self.record)
        return folder


@dataclass(frozen=True, eq=False, slots=True)
class SoupFactors:
    """One module's soup with scaling 1, and the squared Frobenius norms of its delta and of what truncation lost."""

    module: PlannedModule
    factors: Factors
    energy: float
    lost: float


def merge(
    library: ExpertLibrary,
    profile: Profile,
    *,
    method: str | Method | None = None,
    rank: int | None = None,
    dtype: str | None = None,
    device: str = "auto",
    same_base: bool = False,
) -> MergedAdapter:
    """Return the soup of `profile` as one adapter; `.write(folder)` makes the folder. The base is never loaded.

    The scaling is baked into B, `r == lora_alpha`, all modules have one rank (lower ones are padded with zeros).
    Arithmetic: float64 for the coefficients, one rounding to `dtype`; A's are not changed unless `rank` truncates.

    Args:
        library: where the experts are.
        profile: who it is for.
        method: overrides the profile's.
        rank: overrides the profile's: at most this rank, with the error in the record.
        dtype: float32, bfloat16 or float16; the experts' own where left out.
        device: where the arithmetic is done: auto (the CPU), cpu, cuda.
        same_base: take it that all experts have one base.

    Raises:
        SoupError: everything that plan_merge raises; InputError where an expert holds NaN or infinity; UsageError
            where the soup does not fit into `dtype`.
    """
    plan = plan_merge(library, profile, method=method, rank=rank, dtype=dtype, same_base=same_base)
    target = resolve_device(device)
    experts = [library[expert.name] for expert in plan.experts]
    with BackgroundDigests(path for expert in experts for path in expert.adapter.files) as digests:
        tensors: dict[str, Tensor] = {}
        truncation: dict[str, float] = {}
        energy = lost = 0.0
        for soup in soup_factors(plan, ExpertBank(experts, device=target)):
            tensors.update(_named_tensors(soup, plan))
            truncation[soup.module.name] = (soup.lost / soup.energy) ** 0.5 if soup.energy > 0 else 0.0
            energy, lost = energy + soup.energy, lost + soup.lost
        inputs = input_records(plan, library, digests.results())
    record = SoupRecord(
        kind="adapter",
        profile=profile.model_dump(mode="json"),
        method=plan.method.name,
        encoding=plan.encoding,
        experts=inputs,
        base=plan.base,
        rank=plan.rank,
        dtype=plan.dtype,
        device=str(target),
        truncation=None
        if plan.encoding != "truncated"
        else TruncationRecord(rank=plan.rank, total=(lost / energy) ** 0.5 if energy > 0 else 0.0, modules=truncation),
        vllm_max_lora_rank=plan.vllm_max_lora_rank,
        versions=library_versions("torch", "numpy"),
        files=tuple(sorted((CONFIG_FILE, WEIGHTS_FILE, SOUP_FILE))),
    )
    return MergedAdapter(plan, tensors, _config(plan), record)


def soup_factors(
    plan: MergePlan, bank: ExpertBank, modules: Sequence[PlannedModule] | None = None
) -> Iterator[SoupFactors]:
    """Yield each module's soup as factors of its planned rank, on the bank's device; memory: one module at a time.

    `modules` are some of the plan's; all where left out.

    Factors are float32 where nothing is truncated (then `energy` and `lost` are 0, not computed), else float64.
    """
    function = plan.method.load()
    truncates = plan.encoding == "truncated"
    for module in plan.modules if modules is None else modules:
        stack = bank.read(module.name, torch.float64 if truncates else torch.float32)
        weights = [plan.weights[index] for index in stack.experts]
        # a module that an expert lacks contributes zero: the sum of the weights stays that of all experts
        total = {"total": math.fsum(plan.weights)} if plan.method.divides_by_sum else {}
        basis = {"basis": stack.basis} if plan.method.family == "linear" else {}
        factors: Factors = function(stack.factors(), weights, **total, **basis)
        if not truncates:
            yield SoupFactors(module, factors, 0.0, 0.0)
        elif module.rank < module.full_rank:
            truncated = truncate(factors, module.rank)
            yield SoupFactors(module, truncated.factors, truncated.energy, truncated.lost)
        else:
            yield SoupFactors(module, factors, _energy(factors), 0.0)


def input_records(plan: MergePlan, library: ExpertLibrary, digests: Mapping[Path, str]) -> tuple[InputRecord, ...]:
    """Return what soup.json says of each expert that took part."""
    return tuple(
        InputRecord(
            name=expert.name,
            folder=expert.folder,
            weight=expert.weight,
            blake3={path.name: digests[path] for path in library[expert.name].adapter.files},
        )
        for expert in plan.experts
    )


def check_output_apart(folder: Path, inputs: list[str]) -> None:
    """Raise if an output folder is an input folder, or inside or around one: writing it would destroy the input.

    Raises:
        UsageError: naming the input.
    """
    output = folder.resolve()
    for name in inputs:
        source = Path(name).resolve()
        if output == source or source in output.parents or output in source.parents:
            raise UsageError(
                f"the output folder overlaps the input {source}", where=str(folder), mend="choose another output folder"
            )


def _named_tensors(soup: SoupFactors, plan: MergePlan) -> Iterator[tuple[str, Tensor]]:
    dtype = torch_dtype(plan.dtype)
    missing = plan.rank - soup.factors.rank
    for name, tensor, dim in (
        (a_name(soup.module.name), soup.factors.a_RI, 0),
        (b_name(soup.module.name), soup.factors.b_OR, 1),
    ):
        rounded = tensor.to("cpu", dtype)
        if not bool(torch.isfinite(rounded).all()):
            raise UsageError(
                f"{name}: the soup has values up to {tensor.abs().max().item():g}, beyond {plan.dtype}",
                where="--dtype",
                mend="take --dtype float32 or bfloat16, or smaller weights",
            )
        if missing:
            shape = list(rounded.shape)
            shape[dim] = missing
            rounded = torch.cat([rounded, rounded.new_zeros(shape)], dim=dim)
        yield name, rounded.contiguous()


def _energy(factors: Factors) -> float:
    """Return the squared Frobenius norm of a delta without forming it: the sum of (B^T B) * (A A^T)."""
    return float(((factors.b_OR.T @ factors.b_OR) * (factors.a_RI @ factors.a_RI.T)).sum().clamp(min=0))


def _config(plan: MergePlan) -> dict[str, Any]:
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": plan.base.name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": plan.rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": plan.rank,
        "rank_pattern": {},
        "revision": plan.revision,
        "target_modules": list(plan.target_modules),
        "task_type": plan.task_type,
        "use_dora": False,
        "use_rslora": False,
    }
