"""What an adapter trains whole beside its low-rank changes, by its tensors' headers and its configuration alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from personalized_soups.adapters.modules import Header, LoraModule
from personalized_soups.adapters.names import PREFIX, TensorName, unknown_name

# PEFT saves input and output embeddings beside the factors where one is adapted, or was resized for new tokens.
_EMBEDDINGS = frozenset({"embed_tokens", "lm_head", "wte", "embed_in", "embed_out"})

# A module of modules_to_save keeps the base's own and the trained one under these names. PEFT saves the trained one
# without them, and all three where it saves more than it has to: whatever ends in `.bias` (bias="all"), and everything
# that an embedding holds (one that was resized, or save_embedding_layers=True). It reads only the one without them.
_WRAPPERS = ("original_module", "modules_to_save")

Origin = Literal["bias", "lora_bias", "modules_to_save", "trainable_token_indices", "use_dora", "saved embedding"]


@dataclass(frozen=True, slots=True)
class TrainedTensor:
    """One tensor that is trained whole: `name` in the adapter's file, `target` in the base, `origin` in PEFT.

    With an expert's weight w and the saved value v, it adds to the base's value t of the target
    - added (lora_bias): `w * scaling * v`;
    - replaced (bias, modules_to_save, a saved embedding): `w * (v - t)`;
    - rows (trainable_token_indices): `w * (v - t[rows])` to those rows.
    A magnitude (DoRA) is what the norm of each output's row is set to once `module` has changed the target.
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
    """Return what is trained whole, by the names in the file, sorted.

    Raises:
        FileFormatError: if a tensor is missing or of another shape than configured.
        UnsupportedAdapterError: if it is not known what a tensor means.
    """
    factors = {name for module in modules.values() for name in (module.a_name, module.b_name)}
    found = {}
    for name in sorted(header.names.keys() - factors):
        if not _is_copy(header, name):
            found[name] = _trained(header, name, header.names[name], modules)
    _check_complete(header, found.values(), modules)
    return found


def _trained(header: Header, name: str, parts: TensorName, modules: Mapping[str, LoraModule]) -> TrainedTensor:
    shape = header.entry(name).shape
    if math.prod(shape) == 0:
        raise header.fault(f"{name}: it is empty, {list(shape)}")
    if parts.role in {"bias of B", "magnitude"}:
        return _of_module(header, name, parts, modules)
    if parts.role == "tokens":
        rows = _rows(header, name, parts.path)
        if len(shape) != 2 or shape[0] != len(rows):
            raise header.fault(f"{name}: its shape is {list(shape)}, the configuration names {len(rows)} tokens")
        return TrainedTensor("rows", name, f"{parts.path}.weight", shape, "trainable_token_indices", rows=rows)
    origin = _origin(header, parts, modules)
    if origin is None:
        raise unknown_name(name, where=header.where)
    return TrainedTensor("replaced", name, parts.path, shape, origin)


def _of_module(header: Header, name: str, parts: TensorName, modules: Mapping[str, LoraModule]) -> TrainedTensor:
    """Return a bias of B or a magnitude: it belongs to a low-rank change."""
    config = header.config
    module = modules.get(parts.path)
    is_bias = parts.role == "bias of B"
    key: Origin = "lora_bias" if is_bias else "use_dora"
    if not (config.lora_bias if is_bias else config.use_dora):
        raise header.fault(f"{name}: the configuration says {key} is false")
    # neither a parameter nor torch's attention takes either; an embedding takes no bias
    if module is None or module.base_name != f"{module.name}.weight" or (is_bias and module.kind == "embedding"):
        raise unknown_name(name, where=header.where)
    shape = header.entry(name).shape
    if math.prod(shape) != module.out_features:  # [O]; of a convolution [1, O, 1, 1]
        raise header.fault(f"{name}: its shape is {list(shape)}, the module has {module.out_features} outputs")
    flat = (module.out_features,)
    if is_bias:
        scaling = module.scaling
        return TrainedTensor("added", name, f"{parts.path}.bias", flat, key, scaling=scaling, module=module.name)
    return TrainedTensor("magnitude", name, module.base_name, flat, key, module=module.name)


def _rows(header: Header, name: str, module: str) -> tuple[int, ...]:
    """Return the tokens whose rows are trained; PEFT takes the modules whose names end in a key of the table."""
    tokens = header.config.trainable_tokens
    if not isinstance(tokens, Mapping):
        return tokens
    found = {rows for key, rows in tokens.items() if module.endswith(key)}
    if len(found) != 1:
        raise header.fault(f"{name}: trainable_token_indices has {len(found)} lists for {module}")
    return found.pop()


def _origin(header: Header, parts: TensorName, modules: Mapping[str, LoraModule]) -> Origin | None:
    """Return why PEFT saved a tensor of the base model, or None where it has no reason to."""
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
    """Return whether a tensor is one that modules_to_save keeps beside the trained one, which is in the file, too."""
    steps = name.split(".")
    return any(
        step in _WRAPPERS and ".".join([*steps[:place], *steps[place + 1 :]]) in header.names
        for place, step in enumerate(steps)
    )


def _check_complete(header: Header, trained: Iterable[TrainedTensor], modules: Mapping[str, LoraModule]) -> None:
    config = header.config
    held = {(each.origin, each.module) for each in trained}
    for module in modules.values():
        takes = module.base_name == f"{module.name}.weight"
        if config.use_dora and takes and ("use_dora", module.name) not in held:
            raise header.fault(f"{module.name}: use_dora is true, but {PREFIX}{module.name} has no magnitude")
        if config.lora_bias and takes and module.kind != "embedding" and ("lora_bias", module.name) not in held:
            raise header.fault(f"{module.name}: lora_bias is true, but {module.b_name} has no bias")
    if config.trainable_tokens and ("trainable_token_indices", None) not in held:
        raise header.fault("trainable_token_indices names tokens, but the file holds no rows for them")
