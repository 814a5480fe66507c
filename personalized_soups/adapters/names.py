"""Between the names of an adapter's tensors and the names of the base model's modules and tensors."""

from __future__ import annotations

from typing import Literal

from personalized_soups.errors import UnsupportedAdapterError

PREFIX = "base_model.model."
_A = ".lora_A.weight"
_B = ".lora_B.weight"

# What a tensor that is neither A nor B means, by a part of its name.
_VARIANTS = (
    ("lora_magnitude_vector", "DoRA"),
    ("lora_embedding_A", "a LoRA on an embedding"),
    ("lora_embedding_B", "a LoRA on an embedding"),
    ("lora_A.bias", "lora_bias"),
    ("lora_B.bias", "lora_bias"),
    ("modules_to_save", "modules_to_save"),
    ("token_adapter", "trainable_token_indices"),
    ("trainable_tokens", "trainable_token_indices"),
    (".bias", "bias"),
)


def split_name(tensor: str, *, where: str) -> tuple[str, Literal["A", "B"]]:
    """Return the module that a tensor of an adapter belongs to, and which factor it is.

    Raises:
        UnsupportedAdapterError: naming the variant of LoRA that the tensor gives away.
    """
    for ending, factor in ((_A, "A"), (_B, "B")):
        if tensor.startswith(PREFIX) and tensor.endswith(ending) and ".base_layer." not in tensor:
            module = tensor[len(PREFIX) : -len(ending)]
            if module:
                return module, "A" if factor == "A" else "B"
    for part, variant in _VARIANTS:
        if part in tensor:
            raise UnsupportedAdapterError(
                f"{tensor}: the adapter holds {variant}, which this version does not merge",
                where=where,
                mend=f"train the expert without {variant}, as a LoRA on linear layers alone",
            )
    raise UnsupportedAdapterError(
        f"{tensor}: not the name of a LoRA factor ({PREFIX}MODULE{_A} or {_B})",
        where=where,
        mend="save the adapter with PEFT's save_pretrained, on linear layers and without further trained tensors",
    )


def a_name(module: str) -> str:
    """Return the name of a module's A in an adapter file."""
    return f"{PREFIX}{module}{_A}"


def b_name(module: str) -> str:
    """Return the name of a module's B in an adapter file."""
    return f"{PREFIX}{module}{_B}"


def base_weight_name(module: str) -> str:
    """Return the name of the base weight that a module's delta is added to."""
    return f"{module}.weight"
