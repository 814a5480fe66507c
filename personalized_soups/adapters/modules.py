"""The modules of an adapter that have LoRA factors, from the tensors' headers and the configuration.

No tensor is read. Shapes: R = rank, I = in_features, O = out_features.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from personalized_soups.adapters.config import AdapterConfig
from personalized_soups.adapters.names import (
    Kind,
    TensorName,
    base_weight_name,
    is_wrapped,
    name_in_training,
    parameters_of,
    unknown_name,
    wrapping_order,
)
from personalized_soups.errors import FileFormatError, UnsupportedAdapterError
from personalized_soups.files.file_names import CONFIG_FILE
from personalized_soups.files.header import TensorEntry

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_PAIRS = (("A", "B"), ("embedding A", "embedding B"))


@dataclass(frozen=True, slots=True)
class LoraModule:
    """A module or parameter with one pair of LoRA factors A [R, I] and B [O, R]. Its delta is `scaling * B @ A`.

    Attributes:
        name: the name of the module or parameter.
        rank: the configured rank R. If there are several blocks, each block has this rank.
        in_features: I. For a convolution, the size of the kernel times the number of input channels.
        out_features: O.
        scaling: `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA.
        base_name: the tensor of the base to which the delta is added. placement.py computes the rows.
        a_name: A's name in the file.
        b_name: B's name in the file.
        kind: the kind of the layer.
        blocks: the number of matrices in a 3-D parameter of a mixture of experts, else 1. Each matrix has its own
            delta, so A has `rank * blocks` rows.
        kernel: a convolution's kernel size.
    """

    name: str
    rank: int
    in_features: int
    out_features: int
    scaling: float
    base_name: str
    a_name: str
    b_name: str
    kind: Kind = "linear"
    blocks: int = 1
    kernel: tuple[int, ...] = ()

    @property
    def base_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes that the base's tensor may have. For some kinds, the base may store the tensor transposed."""
        shape = (self.out_features, self.in_features)
        if self.kind == "embedding":
            return (shape[::-1],)
        if self.kind == "conv":
            return ((self.out_features, self.in_features // math.prod(self.kernel), *self.kernel),)
        if self.kind == "parameter":
            # PEFT transposes a parameter only if it is 3-D and has more than one matrix
            return ((self.blocks, *shape), (self.blocks, *shape[::-1])) if self.blocks > 1 else (shape, (1, *shape))
        return (shape, shape[::-1])


@dataclass(frozen=True, slots=True)
class Header:
    """The headers of an adapter's weight files, and its configuration.

    Attributes:
        where: the path of the weight file, for errors.
        entries: the header's entry of each tensor, by the tensor's name in the file.
        names: the parsed name of each tensor, by the tensor's name in the file.
        config: the configuration.
    """

    where: str
    entries: Mapping[str, TensorEntry]
    names: Mapping[str, TensorName]
    config: AdapterConfig

    def entry(self, name: str) -> TensorEntry:
        """Return the header's entry of a tensor.

        Raises:
            UnsupportedAdapterError: if the tensor's dtype is not a supported floating-point dtype.
        """
        entry = self.entries[name]
        if entry.dtype not in _FLOATS:
            raise UnsupportedAdapterError(
                f"the tensor {name} has the dtype {entry.dtype}, but one of {', '.join(sorted(_FLOATS))} was expected",
                where=self.where,
                mend="save the adapter in float32, float16 or bfloat16",
            )
        return entry

    def fault(self, what: str) -> FileFormatError:
        """Return the error for a weight file that does not fit the configuration."""
        return FileFormatError(what, where=self.where, mend="save the adapter again with PEFT's save_pretrained")

    def refused(self, what: str, mend: str) -> UnsupportedAdapterError:
        """Return the error for an adapter that this version cannot merge."""
        return UnsupportedAdapterError(f"{what}, so this version cannot merge the adapter", where=self.where, mend=mend)


def modules_of(header: Header) -> dict[str, LoraModule]:
    """Return the modules and parameters that have LoRA factors, by name, sorted.

    Raises:
        FileFormatError: if factors are missing or have other shapes than configured, or if a tensor occurs twice.
        UnsupportedAdapterError: if this version cannot merge one of the modules.
    """
    _check_distinct(header)
    groups: dict[TensorName, dict[str, str]] = {}
    for name, parts in header.names.items():
        if any(parts.role in pair for pair in _PAIRS):
            groups.setdefault(replace(parts, role="whole"), {})[parts.role] = name
    num_pairs = Counter(place.path for place in groups)
    modules = [_module(header, place, pair, num_pairs[place.path]) for place, pair in groups.items()]
    by_name = {module.name: module for module in sorted(modules, key=lambda module: module.name)}
    if len(by_name) != len(modules):
        raise header.fault("two pairs of factors (A and B) belong to the same module")
    return by_name


def _module(header: Header, place: TensorName, pair: Mapping[str, str], num_pairs: int) -> LoraModule:
    parameter = _parameter(header, place, num_pairs)
    if place.around is not None and not parameters_of(place.around, header.config.target_parameters):
        raise header.refused(
            f"{place.path} is adapted inside the adapted module {place.around}, as in torch's MultiheadAttention, "
            "and PEFT would add the delta of its output projection twice",
            f"train the expert without {place.around}",
        )
    if parameter is None and place.depth:
        raise unknown_name(next(iter(pair.values())), where=header.where)
    name = place.path if parameter is None else f"{place.path}.{parameter}"
    roles = _roles(header, name, pair)
    a, b = (header.entry(pair[role]) for role in roles)
    rank, scaling = _rank_and_scaling(header, name, a.name)
    blocks = a.shape[0] // rank if parameter is not None and a.shape else 1
    _check_factors(header, name, a, b, rank * blocks)
    return LoraModule(
        name=name,
        rank=rank,
        in_features=math.prod(a.shape[1:]),
        out_features=b.shape[0],
        scaling=scaling,
        base_name=base_weight_name(name) if parameter is None else name,
        a_name=a.name,
        b_name=b.name,
        kind="parameter" if parameter is not None else _kind(header, roles, a),
        blocks=blocks,
        kernel=a.shape[2:],
    )


def _check_distinct(header: Header) -> None:
    """Raise if two names in the file stand for the same tensor, such as `model._orig_mod.x` and `model.x`."""
    first: dict[TensorName, str] = {}
    for name, parts in header.names.items():
        if (other := first.setdefault(parts, name)) != name:
            raise header.fault(
                f"{other} and {name} are the same tensor when the wrappers of training tools are removed"
            )


def _rank_and_scaling(header: Header, name: str, a_name: str) -> tuple[int, float]:
    """Return the configured rank and scaling of a module.

    PEFT matches rank_pattern and alpha_pattern with the names during training. The file does not say whether these
    names had wrappers, so this function compares both forms.
    """
    config = header.config
    found = config.rank_of(name), config.scaling_of(name)
    if not is_wrapped(a_name) or not (config.rank_pattern or config.alpha_pattern):
        return found
    parameter = name.removeprefix(header.names[a_name].path)
    seen = f"{name_in_training(a_name)}{parameter}"
    in_training = config.rank_of(seen), config.scaling_of(seen)
    if in_training != found and not any(map(is_wrapped, (*config.rank_pattern, *config.alpha_pattern))):
        raise header.refused(
            f"rank_pattern and alpha_pattern give different values for {seen} and {name}",
            "write each pattern as the end of a module name, without `^`, such as q_proj",
        )
    return in_training


def _parameter(header: Header, place: TensorName, num_pairs: int) -> str | None:
    """Return the parameter that a pair of factors adapts, or None if the pair adapts the module itself."""
    parameters = parameters_of(place.path, header.config.target_parameters)
    if not parameters:
        return None
    order = wrapping_order(parameters)
    if len(order) != num_pairs or place.depth >= num_pairs:
        raise header.refused(
            f"{place.path}: target_parameters does not say to which parameter ({', '.join(parameters)}) each of the "
            f"{num_pairs} pairs of factors belongs",
            "give full names in target_parameters, such as mlp.experts.down_proj, and train one parameter per module",
        )
    return order[place.depth]


def _roles(header: Header, name: str, pair: Mapping[str, str]) -> tuple[str, str]:
    for roles in _PAIRS:
        if set(roles) == set(pair):
            return roles
    missing = " and ".join(role for roles in _PAIRS if set(roles) & set(pair) for role in roles if role not in pair)
    raise header.fault(f"{name}: {missing or 'a single pair'} is missing, but the file has {', '.join(pair.values())}")


def _check_factors(header: Header, name: str, a: TensorEntry, b: TensorEntry, rank: int) -> None:
    """Raise unless A has shape [rank, I, kernel...] and B has shape [O, rank, 1...]."""
    if len(a.shape) < 2 or len(a.shape) != len(b.shape) or any(size != 1 for size in b.shape[2:]):
        raise header.fault(f"{name}: B of shape {list(b.shape)} and A of shape {list(a.shape)} cannot be multiplied")
    if math.prod(a.shape) == 0 or math.prod(b.shape) == 0:
        raise header.fault(
            f"{name}: the factors are empty: B has shape {list(b.shape)} and A has shape {list(a.shape)}"
        )
    if len(a.shape) > 2 and a.shape[0] == rank and b.shape[1] < rank and rank % b.shape[1] == 0:
        groups = rank // b.shape[1]
        raise header.refused(
            f"{name} is a convolution with {groups} groups, and its weight has another shape than its delta",
            "train the expert without this layer",
        )
    if a.shape[0] != b.shape[1] or a.shape[0] != rank:
        raise header.fault(
            f"{name}: A has rank {a.shape[0]} and B has rank {b.shape[1]}, but {CONFIG_FILE} says {rank}"
        )


def _kind(header: Header, roles: tuple[str, str], a: TensorEntry) -> Kind:
    if roles == _PAIRS[1]:
        return "embedding"
    if len(a.shape) > 2:
        return "conv"
    return "transposed" if header.config.fan_in_fan_out else "linear"
