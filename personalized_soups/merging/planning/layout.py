"""The layout of a merged adapter: the names of the adapter's tensors, and the content of adapter_config.json.

The layout follows from the headers and configurations of the experts. PEFT wraps each adapted module, and a tensor's
name contains the wrappers around it (see adapters/names.py). So the names depend on the modules that all experts
together adapt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from personalized_soups.adapters.config import Biases
from personalized_soups.adapters.library import Expert
from personalized_soups.adapters.modules import LoraModule
from personalized_soups.adapters.names import (
    PREFIX,
    b_bias_name,
    factor_names,
    magnitude_name,
    parameters_of,
    tokens_name,
    wrapping_order,
)
from personalized_soups.errors import SoupError, UsageError

_WRAPPED = "base_layer"


@dataclass(frozen=True, slots=True)
class Layout:
    """The names of all tensors of a merged adapter, and the kinds of tensors that it has besides the low-rank factors.

    Attributes:
        target_modules: the value of `target_modules` in adapter_config.json, sorted.
        target_parameters: the full names of the adapted mixture-of-experts parameters, sorted.
        fan_in_fan_out: whether any adapted module stores its weight transposed.
        bias: the biases that the experts trained, as a value of PEFT's option `bias`.
        lora_bias: whether any B has a bias.
        use_dora: whether any module has a magnitude (DoRA).
        modules_to_save: the names of modules that experts saved whole, sorted.
        tokens: the trained rows of each embedding, by the embedding's name.
        wrappers: how often PEFT wraps each module of the base, by the module's name.
    """

    target_modules: tuple[str, ...]
    target_parameters: tuple[str, ...]
    fan_in_fan_out: bool
    bias: Biases
    lora_bias: bool
    use_dora: bool
    modules_to_save: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]]
    wrappers: Mapping[str, int]

    @property
    def config(self) -> dict[str, Any]:
        """The entries of adapter_config.json that depend on the layout. Rare entries are present only if needed."""
        table: dict[str, Any] = {
            "bias": self.bias,
            "fan_in_fan_out": self.fan_in_fan_out,
            "modules_to_save": list(self.modules_to_save) or None,
            "target_modules": list(self.target_modules),
            "use_dora": self.use_dora,
        }
        if self.lora_bias:
            table["lora_bias"] = True
        if self.target_parameters:
            table["target_parameters"] = list(self.target_parameters)
        if self.tokens:
            table["trainable_token_indices"] = {module: list(rows) for module, rows in self.tokens.items()}
        return table

    @property
    def is_plain(self) -> bool:
        """Whether every module has only its two factors."""
        return not (self.lora_bias or self.use_dora)

    def named(self, module: LoraModule) -> LoraModule:
        """Return a copy of an expert's module in which the factors have their names in the merged adapter."""
        owner, depth = module.name, 0
        if module.kind == "parameter":
            owner, _, parameter = module.name.rpartition(".")
            order = self.order_of(owner)
            depth = order.index(parameter) if order else 0
        a_name, b_name = factor_names(self._path(owner), module.kind, depth)
        return replace(module, a_name=a_name, b_name=b_name)

    def order_of(self, owner: str) -> list[str]:
        """Return the adapted parameters of the module `owner`, from the outermost wrapper to the innermost.

        The list is empty if the order in which PEFT wraps the parameters is unknown.
        """
        return wrapping_order(parameters_of(owner, self.target_parameters))

    def magnitude_name(self, module: str) -> str:
        """Return the name of a module's DoRA magnitude in the merged adapter."""
        return magnitude_name(self._path(module))

    def b_bias_name(self, module: str) -> str:
        """Return the name of the bias of a module's B (lora_bias) in the merged adapter."""
        return b_bias_name(self._path(module))

    def whole_name(self, target: str) -> str:
        """Return the name in the merged adapter of the tensor that replaces the base's tensor `target`."""
        module, _, attribute = target.rpartition(".")
        wrapped = f".{_WRAPPED}" * self.wrappers.get(module, 0)
        return f"{PREFIX}{self._path(module)}{wrapped}.{attribute}"

    def rows_name(self, module: str) -> str:
        """Return the name in the merged adapter of the trained rows of the embedding `module`."""
        return tokens_name(self._path(module))

    def _path(self, module: str) -> str:
        """Return the path of a module in the wrapped model, including the wrappers of the modules that contain it."""
        steps = module.split(".")
        path = []
        for end, step in enumerate(steps, start=1):
            path.append(step)
            if end < len(steps):
                path += [_WRAPPED] * self.wrappers.get(".".join(steps[:end]), 0)
        return ".".join(path)


def layout_of(experts: Sequence[Expert]) -> Layout:
    """Return the layout of the merged adapter of these experts."""
    configs = [expert.adapter.config for expert in experts]
    modules = _modules(experts)
    trained = [tensor for expert in experts for tensor in expert.adapter.trained.values()]
    biases = {config.bias for config in configs}
    tokens: dict[str, set[int]] = {}
    for tensor in trained:
        if tensor.kind == "rows":
            tokens.setdefault(tensor.target.removesuffix(".weight"), set()).update(tensor.rows)
    is_parameter = {name: module.kind == "parameter" for name, module in modules.items()}
    return Layout(
        target_modules=_targets(experts, [name for name in modules if not is_parameter[name]]),
        target_parameters=tuple(name for name in modules if is_parameter[name]),
        fan_in_fan_out=any(module.kind == "transposed" for module in modules.values()),
        bias="all" if "all" in biases else "lora_only" if "lora_only" in biases else "none",
        lora_bias=any(tensor.kind == "added" for tensor in trained),
        use_dora=any(tensor.kind == "magnitude" for tensor in trained),
        modules_to_save=tuple(sorted({name for config in configs for name in config.modules_to_save})),
        tokens={module: tuple(sorted(rows)) for module, rows in sorted(tokens.items())},
        wrappers=Counter(name.rpartition(".")[0] if is_parameter[name] else name for name in modules),
    )


def named_modules(experts: Sequence[Expert], layout: Layout) -> list[LoraModule]:
    """Return the modules that at least one expert adapts, sorted by name.

    In each module the factors have their names in the merged adapter.
    """
    return [layout.named(module) for module in _modules(experts).values()]


def conflicts(experts: Sequence[Expert], layout: Layout) -> list[SoupError]:
    """Return an error for each combination of the experts' tensors that PEFT cannot load as one adapter.

    The limits apply only to adapters: a soup that is folded into a base may have every combination.
    """
    conflicts = []
    modules = _modules(experts)
    for name, module in modules.items():
        if module.kind == "parameter" and not layout.order_of(name.rpartition(".")[0]):
            conflicts.append(
                f"the order in which PEFT wraps {name} and the other adapted parameters of the same module is unknown"
            )
        if layout.lora_bias and module.kind in {"embedding", "parameter"}:
            conflicts.append(
                f"one expert has biases of B (lora_bias), but another adapts {name}, and a module of the kind "
                f"{module.kind} cannot have such a bias"
            )
        if layout.use_dora and module.kind == "parameter":
            conflicts.append(
                f"one expert has DoRA magnitudes, but another adapts the parameter {name}, and a parameter cannot have "
                "a DoRA magnitude"
            )
        if name.endswith(layout.modules_to_save):
            conflicts.append(f"one expert adapts {name}, but another saves it whole (modules_to_save)")
    for name in layout.tokens:
        if name in modules:
            conflicts.append(f"one expert adapts {name}, but another trains some of its rows (trainable_token_indices)")
        if name.endswith(layout.modules_to_save):
            conflicts.append(
                f"one expert saves {name} whole (modules_to_save), but another trains some of its rows "
                "(trainable_token_indices)"
            )
    if layout.lora_bias and layout.use_dora:
        conflicts.append("one expert has DoRA magnitudes, but another has biases of B (lora_bias)")
    return [
        UsageError(
            f"{conflict}, so PEFT could not load the merged adapter",
            where=", ".join(expert.name for expert in experts),
            mend="fold the soup into the base model: into_base=BASE",
        )
        for conflict in conflicts
    ]


def missing_base(experts: Sequence[Expert]) -> list[SoupError]:
    """Return an error for each expert that has a tensor whose merge needs the base model."""
    faults: list[SoupError] = []
    for expert in experts:
        tensor = next((tensor for tensor in expert.adapter.trained.values() if tensor.kind != "added"), None)
        if tensor is not None:
            what = "is relative to the base" if tensor.kind == "magnitude" else "replaces values of the base"
            faults.append(
                UsageError(
                    f"expert {expert.name}: the tensor {tensor.name} ({tensor.origin}) {what}, but no base is given",
                    where=str(expert.folder),
                    mend="give the base model (base=BASE), or fold the soup into it (into_base=BASE)",
                )
            )
    return faults


def _modules(experts: Sequence[Expert]) -> dict[str, LoraModule]:
    """Return the modules that at least one expert adapts, by name, in sorted order.

    If several experts adapt a module, the module of the first of these experts is returned.
    """
    modules: dict[str, LoraModule] = {}
    for expert in experts:
        for name, module in expert.adapter.modules.items():
            modules.setdefault(name, module)
    return dict(sorted(modules.items()))


def _targets(experts: Sequence[Expert], modules: Sequence[str]) -> tuple[str, ...]:
    """Return a value of `target_modules` that matches exactly the adapted modules.

    If the configurations of all experts list their targets, the union of the lists matches the union of the modules.
    The full names of the modules are returned if a configuration has a regular expression, excludes layers, or does not
    list all adapted modules (with ensure_weight_tying, the output embedding is not listed).
    """
    listed: set[str] = set()
    for expert in experts:
        targets = expert.adapter.config.target_modules
        if targets is None:
            return tuple(sorted(modules))
        listed.update(targets)
    if not all(any(f".{name}".endswith(f".{target}") for target in listed) for name in modules):
        return tuple(sorted(modules))
    return tuple(sorted(listed))
