"""Conversion between the names of an adapter's tensors and those of the base model's modules and tensors.

PEFT names a tensor by its path in the wrapped model. A wrapper keeps the wrapped module as `base_layer`, so names can
contain this step:

- `mlp.experts.base_layer.lora_A` is the A of the inner one of two wrappers of `mlp.experts` (target_parameters);
- `mha.base_layer.out_proj.lora_A` is the A of `mha.out_proj`, and `mha` is wrapped as well.

Training tools also wrap modules and leave the wrapper's attribute in the names. An example is `_orig_mod` of
torch.compile in `model._orig_mod.layers.0`. This module removes such steps anywhere in a name. Two of them, `module`
and `_module`, can also be ordinary names. They are kept until a comparison with a base model or other experts decides.

The steps of a name are its parts between dots. The core of a name is the name without the first steps that differ
between the classes of transformers; see `core_name`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from personalized_soups.errors import UnsupportedAdapterError

PREFIX = "base_model.model."

# The attributes in which training tools keep the wrapped module. No model has a module with one of these names.
WRAPPERS = frozenset({
    "_orig_mod",  # torch.compile: torch._dynamo.eval_frame.OptimizedModule
    "_fsdp_wrapped_module",  # FSDP of torch, fairscale and torch_xla
    "_fpw_module",  # FSDP of fairscale and of torch before 1.13
    "_checkpoint_wrapped_module",  # torch.distributed.algorithms._checkpoint (activation checkpointing, offloading)
    "_forward_module",  # Lightning Fabric
    "_orig_module",  # torch.distributed._composable.replicate, torch_xla's FSDPv2
})  # fmt: skip

# Wrappers whose attributes can also be ordinary names: DataParallel, DistributedDataParallel, DeepSpeed's engine and
# torch's AveragedModel (`module`), Opacus (`_module`).
MAYBE_WRAPPERS = frozenset({"module", "_module"})

# The attributes in which the classes of transformers keep the inner model (base_model_prefix, or the language model of
# a multimodal model). Names of the same tensor differ in these steps if one model is of another class or is the inner
# model alone. Parts of which a model may have several (vision_model, encoder, talker) are not included.
_MODEL_STEPS = frozenset({"model", "transformer", "language_model", "base_model", "gpt_neox", "backbone"})

# If the names of two experts differ only in these steps, they are taken as names of the same module, and the experts
# are rejected. This larger set is used only for this comparison, never to find a tensor in a base.
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

# If several parameters of one module are adapted, PEFT wraps the module once for each, in the order in which the module
# defines the parameters. The last parameter has the outermost wrapper. The file does not contain the parameters' names,
# so these are the orders of the models in transformers 5.23 and of DBRX.
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
    """The parsed name of a tensor in an adapter file.

    Attributes:
        path: the module of the base model to which the tensor belongs. For the role `whole`, the base model's tensor.
        role: the tensor's role.
        depth: the number of other wrappers of the module around the tensor's own wrapper.
        around: the innermost enclosing module that is wrapped as well, or None.
    """

    path: str
    role: Role
    depth: int = 0
    around: str | None = None


def parse_name(tensor: str, *, where: str) -> TensorName:
    """Parse the name of a tensor in an adapter file.

    Args:
        tensor: the name.
        where: the file, for the error.

    Raises:
        UnsupportedAdapterError: if PEFT does not use such a name.
    """
    if len(tensor) > _MAX_NAME:
        raise unknown_name(f"{tensor[:80]}...", where=where)
    # an embedding with trained tokens has a wrapper with another name
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
    """Return whether a name, or a regular expression for names, contains a wrapper of a training tool."""
    return any(wrapper in name for wrapper in WRAPPERS)


def name_in_training(tensor: str) -> str:
    """Return the name of a LoRA factor's module with the wrappers of training tools, as it was when PEFT wrapped it."""
    ending = next((ending for ending in _ENDINGS if tensor.endswith(ending)), "")
    return ".".join(_unwrapped(tensor.removesuffix(ending).partition(PREFIX)[2].split(".")))


def core_name(name: str, steps: frozenset[str] = _MODEL_STEPS) -> str:
    """Return the core of a name, which is the same in all classes of a model. It contains no wrappers.

    `model.language_model.layers.0.mlp.up_proj`, `model.layers.0.mlp.up_proj` and `layers.0.mlp.up_proj` have the same
    core.
    """
    parts = without_wrappers(name, maybe=True).split(".")
    while len(parts) > 1 and parts[0] in steps:
        parts.pop(0)
    return ".".join(parts)


def composite_core(name: str) -> str:
    """Return the core of a name for comparisons between experts, with `_COMPOSITE_STEPS` removed from its start."""
    return core_name(name, _COMPOSITE_STEPS)


def are_model_steps(path: str) -> bool:
    """Return whether a path consists only of attributes of the inner model, such as `model.language_model`."""
    return all(step in _MODEL_STEPS for step in path.split(".")) if path else True


def unknown_name(tensor: str, *, where: str) -> UnsupportedAdapterError:
    """Return the error for a tensor that has an unknown name."""
    return UnsupportedAdapterError(
        f"the tensor {tensor} is neither a LoRA factor (such as {PREFIX}MODULE{_A}) nor a tensor that the "
        "configuration trains, so this version cannot merge the adapter",
        where=where,
        mend="save the adapter with PEFT's save_pretrained, and use only the variants of LoRA that "
        "docs/reference/adapters.md lists",
    )


def factor_names(module: str, kind: Kind = "linear", depth: int = 0) -> tuple[str, str]:
    """Return the names of A and B in an adapter file. For the kind `parameter`, `module` is the parameter's module."""
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
    """Return the name of the base's weight to which a module's delta is added."""
    return f"{module}.weight"


def parameters_of(module: str, targets: Sequence[str]) -> list[str]:
    """Return the sorted names of a module's parameters that are adapted.

    As in PEFT, a target matches a parameter if the parameter's full name is the target or ends in `.TARGET`.

    Args:
        module: the module's name.
        targets: the `target_parameters` of the configuration.
    """
    matches = []
    for target in targets:
        owner, _, parameter = target.rpartition(".")
        if not owner or module == owner or module.endswith(f".{owner}"):
            matches.append(parameter)
    return sorted(set(matches))


def wrapping_order(parameters: Sequence[str]) -> list[str]:
    """Return the parameters of one module, the one with the outermost wrapper first, or [] if the order is unknown."""
    for order in _ORDERS:
        if set(parameters) <= set(order):
            return sorted(parameters, key=order.index, reverse=True)
    return list(parameters) if len(parameters) == 1 else []


def _from_prefix(tensor: str) -> str:
    """Return a tensor's name without wrappers before and within PEFT's prefix `base_model.model.`.

    The prefix stands for PEFT's model and its tuner. A step `module` before or between these two can only be a wrapper.
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
    """Return whether only PEFT uses a step of a name, so that the tensor is not a tensor of the base."""
    return step.startswith("lora_") or step == "token_adapter"
