"""Between the names of an adapter's tensors and the names of the base model's modules and tensors.

PEFT names a tensor by its place in the wrapped model: what it wraps is called `base_layer` there, so that
`mlp.experts.base_layer.lora_A` is the A of the inner of two wrappers of `mlp.experts` (target_parameters), and
`mha.base_layer.out_proj.lora_A` that of `mha.out_proj`, inside of the wrapped `mha`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from personalized_soups.errors import UnsupportedAdapterError

PREFIX = "base_model.model."

Kind = Literal["linear", "transposed", "embedding", "conv", "parameter"]
Role = Literal["A", "B", "embedding A", "embedding B", "bias of B", "magnitude", "tokens", "whole"]

# Longer names would make the work on their parts long, and no model has them.
_MAX_NAME = 1000
_WRAPPED = "base_layer"
_A = ".lora_A.weight"
_B = ".lora_B.weight"
_EMBEDDING_A = ".lora_embedding_A"
_EMBEDDING_B = ".lora_embedding_B"
_MAGNITUDE = ".lora_magnitude_vector"
_B_BIAS = ".lora_B.bias"
_TOKENS = ".token_adapter.trainable_tokens_delta"
_ENDINGS: Mapping[str, Role] = MappingProxyType({
    _A: "A",
    _B: "B",
    _EMBEDDING_A: "embedding A",
    _EMBEDDING_B: "embedding B",
    _B_BIAS: "bias of B",
    _MAGNITUDE: "magnitude",
    f"{_MAGNITUDE}.weight": "magnitude",
    _TOKENS: "tokens",
})  # fmt: skip

# Several parameters of one module are wrapped in the order in which the module defines them, the last one outermost;
# the file does not name them. The orders of the models in transformers 5.23 and of DBRX.
_ORDERS = (
    (
        "gate_up_proj", "gate_up_proj_bias", "gate_proj", "gate_proj_bias", "up_proj", "up_proj_bias",
        "down_proj", "down_proj_bias",
    ),
    ("w1", "v1", "w2"),
    ("weight", "bias"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorName:
    """A name taken apart.

    `path` names a module of the base model, or for the role `whole` a tensor of it. `depth` counts the wrappers of that
    module around this tensor's own; `around` is the module around it that is wrapped, too, where there is one.
    """

    path: str
    role: Role
    depth: int = 0
    around: str | None = None


def parse_name(tensor: str, *, where: str) -> TensorName:
    """Return what a tensor's name in an adapter file says.

    Raises:
        UnsupportedAdapterError: if PEFT gives no such name.
    """
    if len(tensor) > _MAX_NAME:
        raise unknown_name(f"{tensor[:80]}...", where=where)
    path = tensor.removeprefix(PREFIX)
    ending = next((ending for ending in _ENDINGS if path.endswith(ending)), "")
    steps = path.removesuffix(ending).split(".")
    if path == tensor or not all(steps) or (not ending and any(_is_own(step) for step in steps)):
        raise unknown_name(tensor, where=where)
    last = [] if ending else [steps.pop()]
    depth = 0
    while steps and steps[-1] == _WRAPPED:
        steps.pop()
        depth += 1
    around = steps[: len(steps) - 1 - steps[::-1].index(_WRAPPED)] if _WRAPPED in steps else []
    return TensorName(
        path=".".join([*_unwrapped(steps), *last]),
        role=_ENDINGS.get(ending, "whole"),
        depth=depth,
        around=".".join(_unwrapped(around)) or None,
    )


def unknown_name(tensor: str, *, where: str) -> UnsupportedAdapterError:
    """Return the error for a tensor of which it is not known what it means."""
    return UnsupportedAdapterError(
        f"{tensor}: neither the name of a LoRA factor ({PREFIX}MODULE{_A}) nor of a tensor that the configuration "
        "says is trained: this version does not merge such an adapter",
        where=where,
        mend="save the adapter with PEFT's save_pretrained; a variant of LoRA that saves more than docs/adapters.md "
        "names is not merged",
    )


def factor_names(module: str, kind: Kind = "linear", depth: int = 0) -> tuple[str, str]:
    """Return the names of A and B in an adapter file. For the kind `parameter` the module is the parameter's owner."""
    a, b = (_EMBEDDING_A, _EMBEDDING_B) if kind == "embedding" else (_A, _B)
    path = f"{PREFIX}{module}{f'.{_WRAPPED}' * depth}"
    return f"{path}{a}", f"{path}{b}"


def magnitude_name(module: str) -> str:
    """Return the name of a module's magnitude (DoRA) in an adapter file."""
    return f"{PREFIX}{module}{_MAGNITUDE}"


def b_bias_name(module: str) -> str:
    """Return the name of the bias of a module's B (lora_bias) in an adapter file."""
    return f"{PREFIX}{module}{_B_BIAS}"


def tokens_name(module: str) -> str:
    """Return the name of an embedding's trained rows (trainable_token_indices) in an adapter file."""
    return f"{PREFIX}{module}{_TOKENS}"


def a_name(module: str) -> str:
    """Return the name of a linear module's A in an adapter file."""
    return factor_names(module)[0]


def b_name(module: str) -> str:
    """Return the name of a linear module's B in an adapter file."""
    return factor_names(module)[1]


def base_weight_name(module: str) -> str:
    """Return the name of the base weight that a module's delta is added to."""
    return f"{module}.weight"


def parameters_of(module: str, targets: Sequence[str]) -> list[str]:
    """Return the parameters of a module that `target_parameters` names, in no order.

    PEFT takes a parameter whose full name is a target or ends in `.TARGET`.
    """
    found = []
    for target in targets:
        owner, _, parameter = target.rpartition(".")
        if not owner or module == owner or module.endswith(f".{owner}"):
            found.append(parameter)
    return sorted(set(found))


def wrapping_order(parameters: Sequence[str]) -> list[str]:
    """Return the parameters of one module from the outermost wrapper inwards; nothing where the order is not known."""
    for order in _ORDERS:
        if set(parameters) <= set(order):
            return sorted(parameters, key=order.index, reverse=True)
    return list(parameters) if len(parameters) == 1 else []


def _unwrapped(steps: Sequence[str]) -> list[str]:
    return [step for step in steps if step != _WRAPPED]


def _is_own(step: str) -> bool:
    """Return whether a step of a name is PEFT's own, so that the tensor belongs to no module of the base."""
    return step.startswith("lora_") or step == "token_adapter"
