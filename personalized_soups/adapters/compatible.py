"""Checks that experts can be merged: they have one base model, and each module has one kind and shape.

Each check reports all differences at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from personalized_soups.adapters.library import Expert
from personalized_soups.adapters.modules import LoraModule
from personalized_soups.adapters.names import composite_core
from personalized_soups.adapters.provenance import BaseAdapterRecord, BaseRecord
from personalized_soups.adapters.trained import TrainedTensor
from personalized_soups.errors import IncompatibleExpertsError

# The maximum number of differences that one message lists.
_MAX_SHOWN = 8


def disagreements(experts: Sequence[Expert], *, same_base: bool = False) -> list[IncompatibleExpertsError]:
    """Return one error for each kind of difference between experts, or [] if the experts fit together.

    The kinds are different bases, different base adapters, different names and different shapes. Only headers and
    records are read.

    Args:
        experts: the experts.
        same_base: do not compare the bases.
    """
    bases = [] if same_base else _of_bases(experts)
    return bases + other_adapters(experts) + other_names(experts) + other_shapes(experts)


def strangers(experts: Sequence[Expert], fingerprint: str, where: str) -> list[IncompatibleExpertsError]:
    """Return one error with the names of all experts that were trained on another base, or [] if there are none.

    Experts whose records have no fingerprint are skipped, because equal bases may have different paths or ids.

    Args:
        experts: the experts.
        fingerprint: the fingerprint of the given base.
        where: the name of the given base, for the error.
    """
    known = BaseRecord(fingerprint=fingerprint)
    names = [
        f"{expert.name} was trained on {expert.base.name or 'a base without a name'} ({expert.base.fingerprint[:12]})"
        for expert in experts
        if expert.base.fingerprint is not None and not is_same_base(expert.base, known)
    ]
    if not names:
        return []
    return [
        IncompatibleExpertsError(
            f"experts were trained on another base than the given one ({fingerprint[:12]}): " + "; ".join(names),
            where=where,
            mend="give the base of the experts, or pass same_base=True if the given base is a converted copy of it",
        )
    ]


def unlike(experts: Sequence[Expert], on: BaseAdapterRecord | None) -> list[IncompatibleExpertsError]:
    """Return one error with the names of all experts that were trained on another base adapter than `on`, or [].

    Experts without a record are skipped, because no file says on top of which adapter they were trained.

    Args:
        experts: the experts.
        on: the base adapter that is given, or None if the base is given alone.
    """
    different = [expert for expert in experts if expert.has_record and _digest(expert.on) != _digest(on)]
    if not different:
        return []
    of_experts = "; ".join(f"{expert.name}: {described_adapter(expert)}" for expert in different[:_MAX_SHOWN])
    first = different[0].on
    if on is None and first is not None:
        return [
            IncompatibleExpertsError(
                f"experts were trained on top of an adapter, but no adapter is given: {of_experts}",
                where=", ".join(expert.name for expert in different[:_MAX_SHOWN]),
                mend=f"give the folder of this adapter: on={first.name}",
            )
        ]
    assert on is not None
    return [
        IncompatibleExpertsError(
            f"experts were not trained on top of the adapter that is given ({on.name}, {on.digest[:12]}): {of_experts}",
            where=on.name,
            mend="give the adapter on top of which the experts were trained" if first else f"leave out on={on.name}",
        )
    ]


def described_adapter(expert: Expert) -> str:
    """Return a text that says on top of which adapter an expert was trained."""
    if expert.on is not None:
        return f"on top of {expert.on.name} ({expert.on.digest[:12]})"
    if expert.soup is not None and expert.soup.on is not None:
        return f"a soup that includes {expert.soup.on.name}"
    return "without an adapter"


def _digest(on: BaseAdapterRecord | None) -> str | None:
    return None if on is None else on.digest


def is_same_base(
    first: BaseRecord, second: BaseRecord, *, revisions: tuple[str | None, str | None] = (None, None)
) -> bool:
    """Return whether two records describe the same base model.

    If both records have a fingerprint, the fingerprints are compared. Otherwise, the names and revisions are compared.
    """
    if first.fingerprint is not None and second.fingerprint is not None:
        return first.fingerprint == second.fingerprint
    if first.name is None or second.name is None:
        return first.name == second.name
    revision, other_revision = (revision or "main" for revision in revisions)
    return revision == other_revision and _place(first.name) == _place(second.name)


def _of_bases(experts: Sequence[Expert]) -> list[IncompatibleExpertsError]:
    different = [
        (first, second)
        for first, second in combinations(experts, 2)
        if not is_same_base(
            first.base, second.base, revisions=(first.adapter.config.revision, second.adapter.config.revision)
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
            mend="merge experts of one base, or pass same_base=True if these are names of the same base",
        )
    ]


def other_adapters(experts: Sequence[Expert]) -> list[IncompatibleExpertsError]:
    """Return one error if the records of the experts name different base adapters, else []."""
    known = [expert for expert in experts if expert.has_record]
    if len({_digest(expert.on) for expert in known}) < 2:
        return []
    return [
        IncompatibleExpertsError(
            "the experts were trained on top of different adapters: "
            + "; ".join(f"{expert.name}: {described_adapter(expert)}" for expert in known[:_MAX_SHOWN]),
            where=", ".join(expert.name for expert in known[:_MAX_SHOWN]),
            mend="merge experts of one adapter, or train some of them again on top of the same adapter",
        )
    ]


def other_names(experts: Sequence[Expert]) -> list[IncompatibleExpertsError]:
    """Return one error if experts have different names for the same modules, else [].

    The soup of such experts (their weighted sum) would have both names, and a model that loads the soup would ignore
    the name that it does not know. Two names of one module differ only in wrappers or in the attributes under which a
    class of transformers keeps the language model (`model.layers`, `model.language_model.layers`). If one expert has
    both names, the base has two such modules, which is not an error.
    """
    targets = [_targets_by_core(expert) for expert in experts]
    has_both = {core for own in targets for core, names in own.items() if len(names) > 1}
    differences = []
    for (first, own), (second, others) in combinations(zip(experts, targets, strict=True), 2):
        cores = sorted(
            core for core in own.keys() & others.keys() if own[core] != others[core] and core not in has_both
        )
        if cores:
            (name,), (other_name,) = own[cores[0]], others[cores[0]]
            more = f" (and {len(cores) - 1} more modules)" if len(cores) > 1 else ""
            differences.append(f"{first.name} has {name}, but {second.name} has {other_name}{more}")
    return _error_of(
        differences,
        experts,
        "the experts have different names for the same modules, so a model that loads their soup would ignore the "
        "unknown names",
        mend="load the base with one class for all experts (AutoModelForCausalLM or AutoModelForImageTextToText), "
        "remove wrappers (`model.module`) and save the experts again, or rename the tensors of some experts",
    )


def _targets_by_core(expert: Expert) -> dict[str, set[str]]:
    adapter = expert.adapter
    targets = [module.base_name for module in adapter.modules.values()]
    targets += [tensor.target for tensor in adapter.trained.values()]
    by_core: dict[str, set[str]] = {}
    for target in targets:
        by_core.setdefault(composite_core(target), set()).add(target)
    return by_core


def other_shapes(experts: Sequence[Expert]) -> list[IncompatibleExpertsError]:
    """Return one error if experts adapt the same module in different kinds or shapes, else []."""
    first: dict[str, tuple[Expert, str]] = {}
    differences = []
    for expert in experts:
        adapter = expert.adapter
        changes = {module.base_name: _change(module) for module in adapter.modules.values()}
        wholes = {f"{tensor.target} ({tensor.kind})": _whole(tensor) for tensor in adapter.trained.values()}
        for name, change in (*changes.items(), *wholes.items()):
            other, expected = first.setdefault(name, (expert, change))
            if change != expected:
                place = name.removesuffix(".weight")
                differences.append(f"{place}: {other.name} has {expected}, but {expert.name} has {change}")
    return _error_of(
        differences,
        experts,
        "the experts adapt layers of different kinds or shapes",
        mend="merge experts that were trained on the same base model",
    )


def _error_of(
    differences: Sequence[str], experts: Sequence[Expert], what: str, *, mend: str
) -> list[IncompatibleExpertsError]:
    """Return one error that lists the first differences, or [] if there are no differences."""
    if not differences:
        return []
    more = f" (and {len(differences) - _MAX_SHOWN} more)" if len(differences) > _MAX_SHOWN else ""
    text = f"{what}: {'; '.join(differences[:_MAX_SHOWN])}{more}"
    return [IncompatibleExpertsError(text, where=", ".join(expert.name for expert in experts), mend=mend)]


def _change(module: LoraModule) -> str:
    """Return the kind and shape of the layer that a module adapts, as text for comparisons and messages."""
    # Conv1D and linear layers are not distinguished: only the shape of the base's tensor does that (placement.place)
    shape = [module.out_features, module.in_features]
    if module.kind in {"linear", "transposed"}:
        return f"{shape}"
    of = f" of {module.blocks} experts" if module.blocks > 1 else ""
    kernel = f" with kernel {list(module.kernel)}" if module.kernel else ""
    return f"{module.kind} {shape}{of}{kernel}"


def _whole(trained: TrainedTensor) -> str:
    # experts may train different tokens of one embedding, so the number of rows is not compared
    return f"rows of {trained.shape[1]}" if trained.kind == "rows" else f"{list(trained.shape)}"


def _described(expert: Expert) -> str:
    base = expert.base
    revision = f" at {expert.adapter.config.revision}" if expert.adapter.config.revision else ""
    mark = f" (fingerprint {base.fingerprint[:12]})" if base.fingerprint else ""
    return f"{base.name or 'a base without a name'}{revision}{mark}"


def _place(name: str) -> str:
    """Return the absolute path of a base if its name is a local folder, else the name.

    Two spellings of one path are then equal.
    """
    # os.path.isdir returns False where Path.is_dir() raises: the name may be anything, even too long for a path
    return str(Path(name).resolve()) if os.path.isdir(name) else name.rstrip("/")  # noqa: PTH112
