"""What vLLM loads: ranks, and the kinds of modules that it supports."""

from __future__ import annotations

from collections.abc import Sequence

from personalized_soups.adapters.library import Expert
from personalized_soups.errors import SoupError, UsageError

# The values that vLLM's --max-lora-rank can have (vllm/config/lora.py, 0.32).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def vllm_max_lora_rank(rank: int) -> int | None:
    """Return the smallest --max-lora-rank with which vLLM loads an adapter of `rank`; None where none is enough."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def check_vllm_rank(rank: int) -> None:
    """Raise if vLLM loads no adapter of this rank.

    Raises:
        UsageError: naming the highest rank that it loads.
    """
    if vllm_max_lora_rank(rank) is None:
        raise UsageError(
            f"the merged adapter has rank {rank}, vLLM loads up to {VLLM_RANKS[-1]}",
            where="target=vllm",
            mend="give rank=64, or a lower energy share",
        )


def unfit_for_vllm(experts: Sequence[Expert]) -> list[SoupError]:
    """Return what vLLM does not load, or passes over without a word, for each expert that has some of it.

    Source: vllm/lora/peft_helper.py of vLLM 0.32 (modules_to_save, DoRA, bias) and its lists of supported layers;
    adapters of target_parameters leave its mixtures as they are (vllm-project/vllm#41384).
    """
    found: list[SoupError] = []
    for expert in experts:
        whole = [f"{each.name} ({each.origin})" for each in expert.adapter.trained.values()]
        kinds = [
            f"{module.name} (a {'convolution' if module.kind == 'conv' else 'parameter'})"
            for module in expert.adapter.modules.values()
            if module.kind in {"conv", "parameter"}
        ]
        if whole or kinds:
            found.append(
                UsageError(
                    f"{expert.name}: vLLM does not take {(whole + kinds)[0]}",
                    where=str(expert.folder),
                    mend="leave target=vllm out, or serve the soup as a full model: into_base=BASE",
                )
            )
    return found
