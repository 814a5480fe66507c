"""The ranks and the kinds of modules that vLLM 0.32 can load."""

from __future__ import annotations

from collections.abc import Sequence

from personalized_soups.adapters.library import Expert
from personalized_soups.errors import SoupError, UsageError

# The values of vLLM's --max-lora-rank (vllm/config/lora.py).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def vllm_max_lora_rank(rank: int) -> int | None:
    """Return the lowest --max-lora-rank with which vLLM loads an adapter of this rank; None if the rank is too high."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def check_vllm_rank(rank: int) -> None:
    """Check that vLLM can load an adapter of this rank.

    Raises:
        UsageError: if the rank is higher than every rank that vLLM loads.
    """
    if vllm_max_lora_rank(rank) is None:
        raise UsageError(
            f"the merged adapter has rank {rank}, but vLLM loads only ranks up to {VLLM_RANKS[-1]}",
            where="target=vllm",
            mend="give rank=64, or a lower energy share such as energy=0.9",
        )


def unfit_for_vllm(experts: Sequence[Expert]) -> list[SoupError]:
    """Return an error for each expert that has a tensor or module that vLLM rejects or silently ignores.

    The source is vllm/lora/peft_helper.py (modules_to_save, DoRA, bias) and vLLM's lists of supported layers. vLLM
    ignores the factors of target_parameters (vllm-project/vllm#41384).
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
                    f"expert {expert.name}: vLLM does not support {(whole + kinds)[0]}",
                    where=str(expert.folder),
                    mend="leave out target=vllm, or write a full model for vLLM: into_base=BASE",
                )
            )
    return found
