"""Conversion between the names of an adapter's tensors and those of the base model's modules and tensors.

PEFT names a tensor by its path in the wrapped model, in which a wrapped module is called `base_layer`:
`mlp.experts.base_layer.lora_A` is the A of the inner of two wrappers of `mlp.experts` (target_parameters), and
`mha.base_layer.out_proj.lora_A` is the A of `mha.out_proj` inside the wrapped `mha`.

Training tools also wrap modules and leave the wrapper's attribute in the names: `_orig_mod` of torch.compile in
`model._orig_mod.layers.0`. These steps are removed anywhere in a name. Two of them, `module` and `_module`, can also be
ordinary names. They are kept until a comparison with a base model or other experts decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from personalized_soups.errors import UnsupportedAdapterError

PREFIX = "base_model.model."

# The attributes in which training tools keep the wrapped module. No model has a module of such a name.
WRAPPERS = frozenset({
    "_orig_mod",  # torch.compile: torch._dynamo.eval_frame.OptimizedModule
    "_fsdp_wrapped_module",  # FSDP of torch, fairscale and torch_xla
    "_fpw_module",  # the same, of fairscale and of torch before 1.13
    "_checkpoint_wrapped_module",  # torch.distributed.algorithms._checkpoint (activation checkpointing, offloading)
    "_forward_module",  # Lightning Fabric
    "_orig_module",  # torch.distributed._composable.replicate, torch_xla's FSDPv2
})  # fmt: skip

# Wrappers whose attributes can also be ordinary names: DataParallel, DistributedDataParallel, DeepSpeed's engine and
# torch's AveragedModel (`module`), Opacus (`_module`).
MAYBE_WRAPPERS = frozenset({"module", "_module"})

# The attributes in which the classes of transformers keep the inner model (base_model_prefix, and the language model of
# a multimodal model). A class for another task, or the inner model alone, names the same tensors without these
# attributes or with others. The names of parts of which a model may have several (vision_model, encoder, talker) are
# not included.
_MODEL_STEPS = frozenset({"model", "transformer", "language_model", "base_model", "gpt_neox", "backbone"})

# Two experts' names that differ only in these steps are taken as names of the same module, and the experts are
# rejected. The larger set is only used for that comparison, never to find a tensor in a base.
_COMPOSITE_STEPS = _MODEL_STEPS | {"text_model", "thinker", "vlm", "bert", "roberta", "bloom", "rwkv"}

Kind = Literal["linear", "transposed", "embedding", "conv", "parameter"]
Role = Literal["A", "B", "embedding A", "embedding B", "bias of B", "magnitude", "tokens", "whole"]

# No model has longer names, and parsing them would be slow.
_MAX_NAME = 1000
_WRAPPED = "base_layer"
_A = ".lora_A.weight"
_B = ".lora_B.weight"
_EMBEDDING_A = ".lora_embedding_A"
_EMBEDDING_B = ".lora_embedding_B"
_MAGNITUDE = ".lora_magnitude_vector"
_B_BIAS = ".lora_B.bias"
_TOKENS = ".token_adapter.trainable_tokens_delta"
_TOKENS_BASE = ".token_adapter.base_layer."
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

# PEFT wraps several parameters of one module in the order of their definition, the last one outermost, and the file
# does not have their names. These are the orders of the models in transformers 5.23 and of DBRX.
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
    """A parsed name.

    Attributes:
        path: a module of the base model; for the role `whole`, a tensor of it.
        role: the tensor's role.
        depth: the number of wrappers of that module around this tensor's wrapper.
        around: the innermost enclosing module that is wrapped as well, or None.
    """

    path: str
    role: Role
    depth: int = 0
    around: str | None = None


def parse_name(tensor: str, *, where: str) -> TensorName:
    """Return the parts of a tensor's name in an adapter file.

    Raises:
        UnsupportedAdapterError: if it is not a name that PEFT gives.
    """
    if len(tensor) > _MAX_NAME:
        raise unknown_name(f"{tensor[:80]}...", where=where)
    # an embedding with trained tokens is wrapped as well, by another name
    whole = _from_prefix(without_wrappers(tensor)).replace(_TOKENS_BASE, f".{_WRAPPED}.")
    path = whole.removeprefix(PREFIX)
    ending = next((ending for ending in _ENDINGS if path.endswith(ending)), "")
    steps = path.removesuffix(ending).split(".")
    if path == whole or not all(steps) or (not ending and any(_is_own(step) for step in steps)):
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


def without_wrappers(name: str, *, maybe: bool = False) -> str:
    """Return a name without the wrappers of training tools.

    Args:
        name: the name of a module or a tensor.
        maybe: also remove the steps that can be ordinary names (`module`).
    """
    gone = WRAPPERS | MAYBE_WRAPPERS if maybe else WRAPPERS
    # the last step is the module or tensor itself, not a wrapper
    *around, last = name.split(".")
    return ".".join([*(step for step in around if step not in gone), last])


def is_wrapped(name: str) -> bool:
    """Return whether a name, or a regular expression for names, has a wrapper of a training tool."""
    return any(wrapper in name for wrapper in WRAPPERS)


def name_in_training(tensor: str) -> str:
    """Return the module name of a LoRA factor with all wrappers, as PEFT saw it if they existed before PEFT's own."""
    ending = next((ending for ending in _ENDINGS if tensor.endswith(ending)), "")
    return ".".join(_unwrapped(tensor.removesuffix(ending).partition(PREFIX)[2].split(".")))


def core_name(name: str, steps: frozenset[str] = _MODEL_STEPS) -> str:
    """Return the part of a name that is the same in all classes of a model, without wrappers.

    `model.language_model.layers.0.mlp.up_proj`, `model.layers.0.mlp.up_proj` and `layers.0.mlp.up_proj` have the same
    core.
    """
    parts = without_wrappers(name, maybe=True).split(".")
    while len(parts) > 1 and parts[0] in steps:
        parts.pop(0)
    return ".".join(parts)


def composite_core(name: str) -> str:
    """Return the core of a name for comparisons between experts; see _COMPOSITE_STEPS."""
    return core_name(name, _COMPOSITE_STEPS)


def are_model_steps(path: str) -> bool:
    """Return whether a path consists only of attributes of the inner model, such as `model.language_model`."""
    return all(step in _MODEL_STEPS for step in path.split(".")) if path else True


def unknown_name(tensor: str, *, where: str) -> UnsupportedAdapterError:
    """Return the error for a tensor whose meaning is unknown."""
    return UnsupportedAdapterError(
        f"the tensor {tensor} is neither a LoRA factor (such as {PREFIX}MODULE{_A}) nor a tensor that the "
        "configuration trains, so this version cannot merge the adapter",
        where=where,
        mend="save the adapter with PEFT's save_pretrained, and use only the variants of LoRA that "
        "docs/reference/adapters.md lists",
    )


def factor_names(module: str, kind: Kind = "linear", depth: int = 0) -> tuple[str, str]:
    """Return the names of A and B in an adapter file. For the kind `parameter`, give the module that owns it."""
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
    """Return the parameters of a module that `target_parameters` names, sorted.

    As in PEFT, a target matches a parameter whose full name is the target or ends in `.TARGET`.
    """
    matches = []
    for target in targets:
        owner, _, parameter = target.rpartition(".")
        if not owner or module == owner or module.endswith(f".{owner}"):
            matches.append(parameter)
    return sorted(set(matches))


def wrapping_order(parameters: Sequence[str]) -> list[str]:
    """Return the parameters of one module from the outermost wrapper inwards; empty if the order is unknown."""
    for order in _ORDERS:
        if set(parameters) <= set(order):
            return sorted(parameters, key=order.index, reverse=True)
    return list(parameters) if len(parameters) == 1 else []


def _from_prefix(tensor: str) -> str:
    """Return a tensor's name without wrappers before and within PEFT's prefix.

    The prefix is PEFT's model and its tuner, so a `module` before or between these two can only be a wrapper.
    """
    steps = tensor.split(".")
    outer, inner = PREFIX.removesuffix(".").split(".")
    for place, step in enumerate((outer, inner)):
        while place < len(steps) and steps[place] in MAYBE_WRAPPERS:
            del steps[place]
        if place >= len(steps) or steps[place] != step:
            return tensor
    return ".".join(steps)


def _unwrapped(steps: Sequence[str]) -> list[str]:
    return [step for step in steps if step != _WRAPPED]


def _is_own(step: str) -> bool:
    """Return whether a step of a name is PEFT's own, so that the tensor is not one of the base."""
    return step.startswith("lora_") or step == "token_adapter"
