"""How a merged adapter is laid out: what its tensors are called, and what adapter_config.json says of them.

Everything here is decided from the experts' headers and configurations. PEFT names a tensor by its place in the wrapped
model (adapters/names.py), so the names depend on what all experts together adapt.
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
    """A merged adapter beside its low-rank factors. `tokens` are the trained rows of embeddings, by module.

    `wrappers` counts how often PEFT wraps each module of the base.
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
        """The keys of adapter_config.json; those that few adapters need stand there only where they are needed."""
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
        """Whether every module has its factors and nothing beside them."""
        return not (self.lora_bias or self.use_dora)

    def named(self, module: LoraModule) -> LoraModule:
        """Return a module, as an expert holds it, with the names that its factors have in the merged adapter."""
        owner, depth = module.name, 0
        if module.kind == "parameter":
            owner, _, parameter = module.name.rpartition(".")
            order = self.order_of(owner)
            depth = order.index(parameter) if order else 0
        a_name, b_name = factor_names(self._path(owner), module.kind, depth)
        return replace(module, a_name=a_name, b_name=b_name)

    def order_of(self, owner: str) -> list[str]:
        """Return a module's adapted parameters from the outermost wrapper inwards; nothing where it is not known."""
        return wrapping_order(parameters_of(owner, self.target_parameters))

    def magnitude_name(self, module: str) -> str:
        """Return the name of a module's magnitude (DoRA)."""
        return magnitude_name(self._path(module))

    def b_bias_name(self, module: str) -> str:
        """Return the name of the bias of a module's B (lora_bias)."""
        return b_bias_name(self._path(module))

    def whole_name(self, target: str) -> str:
        """Return the name of a tensor of the base that is replaced as a whole."""
        module, _, attribute = target.rpartition(".")
        wrapped = f".{_WRAPPED}" * self.wrappers.get(module, 0)
        return f"{PREFIX}{self._path(module)}{wrapped}.{attribute}"

    def rows_name(self, module: str) -> str:
        """Return the name of an embedding's trained rows."""
        return tokens_name(self._path(module))

    def _path(self, module: str) -> str:
        """Return a module's own path, through the wrappers of the modules around it."""
        steps = module.split(".")
        found = []
        for end, step in enumerate(steps, start=1):
            found.append(step)
            if end < len(steps):
                found += [_WRAPPED] * self.wrappers.get(".".join(steps[:end]), 0)
        return ".".join(found)


def layout_of(experts: Sequence[Expert]) -> Layout:
    """Return the layout of what experts adapt and train together."""
    configs = [expert.adapter.config for expert in experts]
    modules = _modules(experts)
    whole = [each for expert in experts for each in expert.adapter.trained.values()]
    biases = {config.bias for config in configs}
    tokens: dict[str, set[int]] = {}
    for each in whole:
        if each.kind == "rows":
            tokens.setdefault(each.target.removesuffix(".weight"), set()).update(each.rows)
    is_parameter = {name: module.kind == "parameter" for name, module in modules.items()}
    return Layout(
        target_modules=_targets(experts, [name for name in modules if not is_parameter[name]]),
        target_parameters=tuple(name for name in modules if is_parameter[name]),
        fan_in_fan_out=any(module.kind == "transposed" for module in modules.values()),
        bias="all" if "all" in biases else "lora_only" if "lora_only" in biases else "none",
        lora_bias=any(each.kind == "added" for each in whole),
        use_dora=any(each.kind == "magnitude" for each in whole),
        modules_to_save=tuple(sorted({name for config in configs for name in config.modules_to_save})),
        tokens={module: tuple(sorted(rows)) for module, rows in sorted(tokens.items())},
        wrappers=Counter(name.rpartition(".")[0] if is_parameter[name] else name for name in modules),
    )


def named_modules(experts: Sequence[Expert], layout: Layout) -> list[LoraModule]:
    """Return every module that an expert adapts, sorted, with the names of the merged adapter."""
    return [layout.named(module) for module in _modules(experts).values()]


def conflicts(experts: Sequence[Expert], layout: Layout) -> list[SoupError]:
    """Return what of the experts PEFT cannot hold together in one adapter; folded into the base it can be."""
    found = []
    modules = _modules(experts)
    for name, module in modules.items():
        if module.kind == "parameter" and not layout.order_of(name.rpartition(".")[0]):
            found.append(f"{name}: the order in which PEFT wraps the parameters beside it is not known")
        if layout.lora_bias and module.kind in {"embedding", "parameter"}:
            found.append(f"{name}: it is of the kind {module.kind}, which takes no lora_bias")
        if layout.use_dora and module.kind == "parameter":
            found.append(f"{name}: it is a parameter, which takes no DoRA")
        if name.endswith(layout.modules_to_save):
            found.append(f"{name}: one expert adapts it, another saves it whole (modules_to_save)")
    for name in layout.tokens:
        if name in modules:
            found.append(f"{name}: one expert adapts it, another trains some of its rows (trainable_token_indices)")
        if name.endswith(layout.modules_to_save):
            found.append(f"{name}: one expert saves it whole, another trains some of its rows")
    if layout.lora_bias and layout.use_dora:
        found.append("one expert has DoRA, another lora_bias")
    return [
        UsageError(
            f"{what}: PEFT cannot hold this in one adapter",
            where=", ".join(expert.name for expert in experts),
            mend="fold the soup into the base model: into_base=BASE",
        )
        for what in found
    ]


def missing_base(experts: Sequence[Expert]) -> list[SoupError]:
    """Return why a merged adapter of these experts needs the base model, for each that does."""
    found: list[SoupError] = []
    for expert in experts:
        each = next((each for each in expert.adapter.trained.values() if each.kind != "added"), None)
        if each is not None:
            what = "is relative to the base" if each.kind == "magnitude" else "takes the place of the base's"
            found.append(
                UsageError(
                    f"{expert.name}: {each.name} ({each.origin}) {what}, and no base is given",
                    where=str(expert.folder),
                    mend="give the base model: base=BASE; or fold the soup into it: into_base=BASE",
                )
            )
    return found


def _modules(experts: Sequence[Expert]) -> dict[str, LoraModule]:
    """Return every module that an expert adapts, as the first such expert holds it, sorted."""
    found: dict[str, LoraModule] = {}
    for expert in experts:
        for name, module in expert.adapter.modules.items():
            found.setdefault(name, module)
    return dict(sorted(found.items()))


def _targets(experts: Sequence[Expert], modules: Sequence[str]) -> tuple[str, ...]:
    """Return `target_modules` that match the adapted modules of the base and no others.

    Where every expert lists its targets, the union of the lists matches the union of the modules; where one gives a
    regular expression, leaves out layers, or has modules that it does not list (the output embedding, under
    ensure_weight_tying), the modules' full names do.
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
