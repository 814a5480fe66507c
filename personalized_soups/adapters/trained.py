"""The tensors of an adapter that are trained as a whole, not as LoRA factors. Only headers are read, not tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from personalized_soups.adapters.modules import Header, LoraModule
from personalized_soups.adapters.names import PREFIX, TensorName, unknown_name

# PEFT also saves the complete input and output embeddings if one of them is adapted or was resized for new tokens.
_EMBEDDINGS = frozenset({"embed_tokens", "lm_head", "wte", "embed_in", "embed_out"})

# PEFT wraps each module of modules_to_save. The wrapper keeps the base's module and the trained module under these two
# names. PEFT saves the trained tensors under a third name, without such a step. In some cases it saves all three: all
# names that end in `.bias` (bias="all"), and all tensors of an embedding that was resized or that
# save_embedding_layers=True saved. PEFT loads only the tensor whose name has no such step.
_WRAPPERS = ("original_module", "modules_to_save")

Origin = Literal["bias", "lora_bias", "modules_to_save", "trainable_token_indices", "use_dora", "saved embedding"]


@dataclass(frozen=True, slots=True)
class TrainedTensor:
    """One tensor that is trained as a whole.

    Let w be the weight of an expert in a soup, v the saved tensor, and t the target, which is the base's tensor. The
    kind says what the soup adds to t:

    - added (lora_bias): `w * scaling * v`;
    - replaced (bias, modules_to_save, a saved embedding): `w * (v - t)`;
    - rows (trainable_token_indices): `w * (v - t[rows])`, added to these rows of t.

    The kind magnitude (DoRA) is different: the delta of `module` is added first, and then each output's row is scaled
    to the norm v.

    Attributes:
        kind: how the tensor changes its target.
        name: the tensor's name in the adapter's file.
        target: the name of the target in the base.
        shape: the tensor's shape.
        origin: the setting of PEFT for which the tensor was saved.
        rows: the token ids of the trained rows, for the kind `rows`.
        scaling: the scaling of B, for the kind `added`.
        module: the module to which a bias of B or a magnitude belongs.
    """

    kind: Literal["added", "replaced", "rows", "magnitude"]
    name: str
    target: str
    shape: tuple[int, ...]
    origin: Origin
    rows: tuple[int, ...] = ()
    scaling: float = 1.0
    module: str | None = None


def trained_of(header: Header, modules: Mapping[str, LoraModule]) -> dict[str, TrainedTensor]:
    """Return the tensors that are trained as a whole, sorted by their names in the file.

    Args:
        header: the headers and the configuration of the adapter.
        modules: the modules that have LoRA factors, from `modules_of`.

    Raises:
        FileFormatError: if a tensor is missing or has another shape than configured.
        UnsupportedAdapterError: if a tensor has an unknown name.
    """
    factors = {name for module in modules.values() for name in (module.a_name, module.b_name)}
    trained = {}
    for name in sorted(header.names.keys() - factors):
        if not _is_copy(header, name):
            trained[name] = _trained(header, name, header.names[name], modules)
    _check_complete(header, trained.values(), modules)
    return trained


def _trained(header: Header, name: str, parts: TensorName, modules: Mapping[str, LoraModule]) -> TrainedTensor:
    shape = header.entry(name).shape
    if math.prod(shape) == 0:
        raise header.fault(f"the tensor {name} is empty: its shape is {list(shape)}")
    if parts.role in {"bias of B", "magnitude"}:
        return _of_module(header, name, parts, modules)
    if parts.role == "tokens":
        rows = _rows(header, name, parts.path)
        if len(shape) != 2 or shape[0] != len(rows):
            raise header.fault(
                f"the tensor {name} has shape {list(shape)}, but the configuration names {len(rows)} tokens"
            )
        return TrainedTensor("rows", name, f"{parts.path}.weight", shape, "trainable_token_indices", rows=rows)
    origin = _origin(header, parts, modules)
    if origin is None:
        raise unknown_name(name, where=header.where)
    return TrainedTensor("replaced", name, parts.path, shape, origin)


def _of_module(header: Header, name: str, parts: TensorName, modules: Mapping[str, LoraModule]) -> TrainedTensor:
    """Return a bias of B or a magnitude. Both belong to a module with LoRA factors."""
    config = header.config
    module = modules.get(parts.path)
    is_bias = parts.role == "bias of B"
    key: Origin = "lora_bias" if is_bias else "use_dora"
    if not (config.lora_bias if is_bias else config.use_dora):
        raise header.fault(f"the file has the tensor {name}, but {key} is false in the configuration")
    # parameters and torch's MultiheadAttention have neither magnitudes nor biases of B; embeddings have no biases of B
    if module is None or module.base_name != f"{module.name}.weight" or (is_bias and module.kind == "embedding"):
        raise unknown_name(name, where=header.where)
    shape = header.entry(name).shape
    if math.prod(shape) != module.out_features:  # the shape is [O], or [1, O, 1, 1] for a convolution
        raise header.fault(
            f"the tensor {name} has shape {list(shape)}, but the module has {module.out_features} outputs"
        )
    flat = (module.out_features,)
    if is_bias:
        scaling = module.scaling
        return TrainedTensor("added", name, f"{parts.path}.bias", flat, key, scaling=scaling, module=module.name)
    return TrainedTensor("magnitude", name, module.base_name, flat, key, module=module.name)


def _rows(header: Header, name: str, module: str) -> tuple[int, ...]:
    """Return the tokens whose rows are trained. As in PEFT, a key matches all modules whose names end in the key."""
    tokens = header.config.trainable_tokens
    if not isinstance(tokens, Mapping):
        return tokens
    matches = {rows for key, rows in tokens.items() if module.endswith(key)}
    if len(matches) != 1:
        raise header.fault(
            f"{name}: trainable_token_indices has {len(matches)} lists for {module}, but one was expected"
        )
    return matches.pop()


def _origin(header: Header, parts: TensorName, modules: Mapping[str, LoraModule]) -> Origin | None:
    """Return the setting for which PEFT saved a tensor of the base model, or None if there is no such setting."""
    config = header.config
    module, _, attribute = parts.path.rpartition(".")
    steps = module.split(".")
    owners = [".".join(steps[: end + 1]) for end in range(len(steps))]
    if any(step in _WRAPPERS for step in steps):
        return None
    if any(owner.endswith(config.modules_to_save) for owner in owners):
        return "modules_to_save"
    if attribute == "bias" and (config.bias == "all" or (config.bias == "lora_only" and parts.depth)):
        return "bias"
    is_embedding = steps[-1] in _EMBEDDINGS or (module in modules and modules[module].kind == "embedding")
    if attribute in {"weight", "bias"} and is_embedding:
        return "saved embedding"
    return None


def _is_copy(header: Header, name: str) -> bool:
    """Return whether `name` is a copy in a wrapper of modules_to_save. The file has the trained tensor as well."""
    steps = name.split(".")
    return any(
        step in _WRAPPERS and ".".join([*steps[:place], *steps[place + 1 :]]) in header.names
        for place, step in enumerate(steps)
    )


def _check_complete(header: Header, trained: Iterable[TrainedTensor], modules: Mapping[str, LoraModule]) -> None:
    config = header.config
    present = {(tensor.origin, tensor.module) for tensor in trained}
    for module in modules.values():
        takes = module.base_name == f"{module.name}.weight"
        if config.use_dora and takes and ("use_dora", module.name) not in present:
            raise header.fault(f"use_dora is true, but the file has no magnitude for {PREFIX}{module.name}")
        if config.lora_bias and takes and module.kind != "embedding" and ("lora_bias", module.name) not in present:
            raise header.fault(f"lora_bias is true, but the file has no bias for {module.b_name}")
    if config.trainable_tokens and ("trainable_token_indices", None) not in present:
        raise header.fault("trainable_token_indices names tokens, but the file has no rows for them")
