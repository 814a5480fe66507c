"""Whether experts fit together: one base model, one kind and shape a module. Every disagreement is told at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from personalized_soups.adapters.library import Expert
from personalized_soups.adapters.modules import LoraModule
from personalized_soups.adapters.names import composite_core
from personalized_soups.adapters.provenance import BaseRecord
from personalized_soups.adapters.trained import TrainedTensor
from personalized_soups.errors import IncompatibleExpertsError

# A hundred lines of the same disagreement tell no more than these.
_MAX_SHOWN = 8


def disagreements(experts: Sequence[Expert], *, same_base: bool = False) -> list[IncompatibleExpertsError]:
    """Return everything in which experts disagree, from their headers and records alone; empty if they fit."""
    found = [] if same_base else _of_bases(experts)
    return found + other_names(experts) + _of_shapes(experts)


def strangers(experts: Sequence[Expert], fingerprint: str, where: str) -> list[IncompatibleExpertsError]:
    """Return one fault that names every expert which records another base's fingerprint than this; empty if none does.

    Experts without a fingerprint name their base by a path or id that need not be this one's.
    """
    known = BaseRecord(fingerprint=fingerprint)
    found = [
        f"{expert.name} was trained on {expert.base.name or 'a base without a name'} ({expert.base.fingerprint[:12]})"
        for expert in experts
        if expert.base.fingerprint is not None and not is_same_base(expert.base, known)
    ]
    if not found:
        return []
    return [
        IncompatibleExpertsError(
            f"this base ({fingerprint[:12]}) is not the experts': " + "; ".join(found),
            where=where,
            mend="give the base that they were trained on; if it is the same one converted, pass same_base=True",
        )
    ]


def is_same_base(
    one: BaseRecord, other: BaseRecord, *, revisions: tuple[str | None, str | None] = (None, None)
) -> bool:
    """Return whether two records name one base model: by fingerprint where both have one, else by name."""
    if one.fingerprint is not None and other.fingerprint is not None:
        return one.fingerprint == other.fingerprint
    if one.name is None or other.name is None:
        return one.name == other.name
    first, second = (revision or "main" for revision in revisions)
    return first == second and _place(one.name) == _place(other.name)


def _of_bases(experts: Sequence[Expert]) -> list[IncompatibleExpertsError]:
    different = [
        (one, other)
        for one, other in combinations(experts, 2)
        if not is_same_base(
            one.base, other.base, revisions=(one.adapter.config.revision, other.adapter.config.revision)
        )
    ]
    if not different:
        return []
    named = {expert.name: _described(expert) for pair in different for expert in pair}
    return [
        IncompatibleExpertsError(
            "the experts were trained on different bases: "
            + "; ".join(f"{name}: {base}" for name, base in list(named.items())[:_MAX_SHOWN]),
            where=", ".join(list(named)[:_MAX_SHOWN]),
            mend="merge experts of one base; if these are one base under several names, pass same_base=True",
        )
    ]


def other_names(experts: Sequence[Expert]) -> list[IncompatibleExpertsError]:
    """Return a fault if experts name the modules of one base differently; empty if none do.

    Their soup would hold both names, and a model that loads it would leave out those that it does not know. Such names
    differ only in wrappers and in the attributes under which a class of transformers keeps the model proper
    (`model.layers`, `model.language_model.layers`). Where one expert has both names, the base has both modules.
    """
    targets = [_targets_by_core(expert) for expert in experts]
    has_both = {core for own in targets for core, names in own.items() if len(names) > 1}
    found = []
    for (one, own), (other, others) in combinations(zip(experts, targets, strict=True), 2):
        apart = sorted(
            core for core in own.keys() & others.keys() if own[core] != others[core] and core not in has_both
        )
        if apart:
            (first,), (second,) = own[apart[0]], others[apart[0]]
            more = f" (and {len(apart) - 1} more)" if len(apart) > 1 else ""
            found.append(f"{one.name} has {first}, {other.name} has {second}{more}")
    if not found:
        return []
    more = f"; and {len(found) - _MAX_SHOWN} more pairs" if len(found) > _MAX_SHOWN else ""
    return [
        IncompatibleExpertsError(
            "the experts have different names for the same modules, so a model that loads their soup would leave out "
            "those that it does not know: " + "; ".join(found[:_MAX_SHOWN]) + more,
            where=", ".join(expert.name for expert in experts),
            mend="save the experts again from the base as one class loads it (AutoModelForCausalLM or "
            "AutoModelForImageTextToText, not both) and without wrappers (`model.module`), or rename one's tensors",
        )
    ]


def _targets_by_core(expert: Expert) -> dict[str, set[str]]:
    adapter = expert.adapter
    targets = [each.base_name for each in adapter.modules.values()]
    targets += [each.target for each in adapter.trained.values()]
    found: dict[str, set[str]] = {}
    for target in targets:
        found.setdefault(composite_core(target), set()).add(target)
    return found


def _of_shapes(experts: Sequence[Expert]) -> list[IncompatibleExpertsError]:
    first: dict[str, tuple[Expert, str]] = {}
    found = []
    for expert in experts:
        adapter = expert.adapter
        changes = {module.base_name: _change(module) for module in adapter.modules.values()}
        wholes = {f"{each.target} ({each.kind})": _whole(each) for each in adapter.trained.values()}
        for name, change in (*changes.items(), *wholes.items()):
            other, expected = first.setdefault(name, (expert, change))
            if change != expected:
                place = name.removesuffix(".weight")
                found.append(f"{place}: {other.name} has {expected}, {expert.name} has {change}")
    if not found:
        return []
    more = f" (and {len(found) - _MAX_SHOWN} more)" if len(found) > _MAX_SHOWN else ""
    return [
        IncompatibleExpertsError(
            "the experts were trained for layers of different kinds or shapes: " + "; ".join(found[:_MAX_SHOWN]) + more,
            where=", ".join(expert.name for expert in experts),
            mend="merge experts that were trained on one and the same base model",
        )
    ]


def _change(module: LoraModule) -> str:
    """Return what a low-rank change is for. Only the base tells a Conv1D from a linear layer (placement.place)."""
    shape = [module.out_features, module.in_features]
    if module.kind in {"linear", "transposed"}:
        return f"{shape}"
    of = f" of {module.blocks} experts" if module.blocks > 1 else ""
    kernel = f" with kernel {list(module.kernel)}" if module.kernel else ""
    return f"{module.kind} {shape}{of}{kernel}"


def _whole(trained: TrainedTensor) -> str:
    # experts may train different tokens of one embedding
    return f"rows of {trained.shape[1]}" if trained.kind == "rows" else f"{list(trained.shape)}"


def _described(expert: Expert) -> str:
    base = expert.base
    revision = f" at {expert.adapter.config.revision}" if expert.adapter.config.revision else ""
    mark = f" (fingerprint {base.fingerprint[:12]})" if base.fingerprint else ""
    return f"{base.name or 'not named'}{revision}{mark}"


def _place(name: str) -> str:
    """Return a base's name such that two spellings of one local folder are equal."""
    # os.path says no where Path.is_dir() raises: an adapter may name anything, even what is too long for a path
    return str(Path(name).resolve()) if os.path.isdir(name) else name.rstrip("/")  # noqa: PTH112
