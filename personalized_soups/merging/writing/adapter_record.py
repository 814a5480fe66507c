"""The JSON files of a merged adapter: adapter_config.json and soup.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from personalized_soups.adapters.provenance import (
    InputRecord,
    SoupRecord,
    TruncationRecord,
    library_versions,
)
from personalized_soups.files.file_names import CONFIG_FILE, SOUP_FILE, WEIGHTS_FILE
from personalized_soups.merging.computing.merged_modules import Loss
from personalized_soups.merging.planning.plan import MergePlan
from personalized_soups.merging.planning.vllm import vllm_max_lora_rank


def adapter_record(
    plan: MergePlan,
    device: torch.device,
    ranks: Mapping[str, int],
    losses: Mapping[str, Loss],
    inputs: tuple[InputRecord, ...],
) -> SoupRecord:
    """Return the content of soup.json for a merged adapter.

    Args:
        plan: the plan of the merge.
        device: the device that computed the soup.
        ranks: the rank of each module in the file, by the module's name.
        losses: the truncation error of each module, by the module's name.
        inputs: the records of the experts.
    """
    rank = max(ranks.values())
    total = Loss(sum(loss.energy for loss in losses.values()), sum(loss.lost for loss in losses.values()))
    in_order = [module.name for module in plan.modules]
    truncation = TruncationRecord(
        rank=rank,
        energy=plan.energy,
        total=total.relative_error,
        modules={name: losses[name].relative_error for name in in_order},
        ranks={name: ranks[name] for name in in_order if ranks[name] != rank},
    )
    return SoupRecord(
        kind="adapter",
        profile=plan.profile.model_dump(mode="json"),
        method=plan.method.name,
        method_source=plan.method_source,
        options=dict(plan.options),
        encoding=plan.encoding,
        target=plan.target,
        experts=inputs,
        base=plan.base,
        base_folder=plan.base_folder,
        on=plan.on,
        on_folder=plan.on_folder,
        rank=rank,
        dtype=plan.dtype,
        device=str(device),
        truncation=truncation if plan.encoding == "truncated" else None,
        vllm_max_lora_rank=vllm_max_lora_rank(rank) if plan.fits_vllm else None,
        versions=library_versions("torch", "numpy"),
        files=tuple(sorted((CONFIG_FILE, WEIGHTS_FILE, SOUP_FILE))),
    )


def adapter_config(plan: MergePlan, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the content of adapter_config.json. Alpha equals the rank in every module, so PEFT's scaling is 1."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {name: rank for name, rank in ranks.items() if rank != usual}
    table = {
        **plan.layout.config,
        "alpha_pattern": pattern,
        "base_model_name_or_path": plan.base.name,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": usual,
        "rank_pattern": pattern,
        "revision": plan.revision,
        "task_type": plan.task_type,
        "use_rslora": False,
    }
    return dict(sorted(table.items()))
