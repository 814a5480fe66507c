"""The doctor's rules. They derive findings about valid experts from measurements and file headers.

A warning says that the soup may not behave as expected. A note explains a property of the merge and needs no action.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Set
from itertools import combinations

from personalized_soups.adapters.library import Expert
from personalized_soups.merging.doctor.diagnosis import Finding
from personalized_soups.merging.doctor.measured_experts import MeasuredExperts

# An expert dominates the soup if its norm is at least this many times the median norm of the other experts.
DOMINANT = 4.0
# If the norm of a delta is at least this share of the base's norm, the change is larger than that of any fine-tuning
# that is known to leave a model usable.
LARGE = 0.5
# Two experts have the same direction if the magnitude of their cosine is above this value.
ALIGNED = 0.9
# Two experts use the same features if the overlaps of their input spaces and of their output spaces are at least this.
OVERLAPPING = 0.5
# Two experts oppose each other if their signs differ in at least this share of their squared norm. Chance gives 0.5.
OPPOSED = 0.6
# Below the first bound, the weighted experts cancel. Above the second, they add up. The bounds apply to `|sum w d|`
# divided by its value for orthogonal experts. For two equal experts, this ratio is 1.41.
CANCELS, PILES_UP = 0.5, 1.25

_MAX_SHOWN = 8


def rule_findings(experts: MeasuredExperts) -> list[Finding]:
    """Return the findings of all rules: errors and warnings about the soup, and notes that explain the merge."""
    if not experts.chosen:
        return []
    rules: tuple[Callable[[MeasuredExperts], Iterator[Finding]], ...] = (
        _untrained,
        _norms,
        _pairs,
        _piles,
        _damaged_base,
        _modules,
        _headers,
        _basis,
    )
    return [finding for rule in rules for finding in rule(experts)]


def _untrained(experts: MeasuredExperts) -> Iterator[Finding]:
    for index in experts.measured:
        if experts.measures.norm(index) == 0:
            yield Finding(
                "warning",
                "untrained",
                f"{experts.name(index)} changes nothing: the product B @ A of every module is 0, as before training",
                str(experts.bank.experts[index].folder),
                "train the expert, or leave it out of the soup",
            )


def _norms(experts: MeasuredExperts) -> Iterator[Finding]:
    parts = {index: experts.part(index) for index in experts.measured}
    for index, part in parts.items():
        others = [value for number, value in parts.items() if number != index and value > 0]
        usual = statistics.median(others) if others else math.inf
        if part >= DOMINANT * usual:
            yield Finding(
                "warning",
                "norm",
                f"{experts.name(index)} is {part / usual:.3g} times as large as the median of the other experts, so it "
                "will dominate the soup",
                experts.name(index),
                f"give this expert a weight of about {usual / part:.2g} times the others' weights",
            )
        relative = experts.relative(index)
        if relative is not None and relative >= LARGE:
            yield Finding(
                "warning",
                "large",
                f"{experts.name(index)} makes a very large change: the norm of its deltas is {relative:.3g} times "
                "the norm of the base tensors that it adapts",
                experts.name(index),
                "check the training loss of this expert for divergence, or give this expert a small weight",
            )


def _pairs(experts: MeasuredExperts) -> Iterator[Finding]:
    for first, second in combinations(experts.measured, 2):
        where = f"{experts.name(first)}, {experts.name(second)}"
        if (first, second) in experts.duplicates:
            yield Finding(
                "warning",
                "duplicate",
                f"{experts.name(first)} and {experts.name(second)} are the same expert: their weight files are equal "
                "byte for byte",
                where,
                "leave one of the two experts out of the soup",
            )
            continue
        yield from _directions(experts, first, second, where)


def _directions(experts: MeasuredExperts, first: int, second: int, where: str) -> Iterator[Finding]:
    measures, names = experts.measures, f"{experts.name(first)} and {experts.name(second)}"
    cosine = measures.cosine(first, second)
    if cosine is None:
        return
    if abs(cosine) > ALIGNED:
        if not experts.are_of_one_dimension(first, second):
            effect = "their weights add up" if cosine > 0 else "equal weights cancel each other"
            yield Finding(
                "warning",
                "one direction",
                f"{names} have nearly the same direction (cosine {cosine:.3f}): {effect}",
                where,
                "check whether both were trained on the same data; choose their two weights as if they were one expert",
            )
        return
    inputs, outputs = measures.inputs(first, second) or 0.0, measures.outputs(first, second) or 0.0
    if min(inputs, outputs) >= OVERLAPPING:
        yield Finding(
            "warning",
            "overlap",
            f"{names} use the same features: the spaces of their A's and of their B's overlap "
            f"by {inputs:.2f} (inputs) and {outputs:.2f} (outputs)",
            where,
            "evaluate a soup of both experts and not only each expert: one expert can undo the other",
        )
    opposed = measures.opposed(first, second) or 0.0
    if opposed >= OPPOSED:
        yield Finding(
            "warning",
            "signs",
            f"{names} have opposite signs in {opposed:.0%} of their squared norm (50% is chance), so they "
            "cancel in part",
            where,
            "give a weight to only one of them, or use the method ties, which elects one sign per entry",
        )


def _piles(experts: MeasuredExperts) -> Iterator[Finding]:
    pile = experts.pile
    if pile is None or pile.orthogonal == 0:
        return
    ratio = pile.norm / pile.orthogonal
    norms = (
        f"the norm |sum w d| is {pile.norm:.3g}; it would be {pile.orthogonal:.3g} if the experts were orthogonal, and "
        f"{pile.most:.3g} if they had one direction"
    )
    if ratio < CANCELS:
        mend = "check the signs of the weights"
        yield Finding("warning", "cancel", f"the weighted experts cancel each other: {norms}", "weights", mend)
    elif ratio > PILES_UP:
        mend = "give smaller weights to the experts that have the same direction"
        yield Finding("warning", "pile up", f"the weighted experts add up: {norms}", "weights", mend)


def _damaged_base(experts: MeasuredExperts) -> Iterator[Finding]:
    for name, norm in (experts.base_norms or {}).items():
        if not math.isfinite(norm):
            what = f"the tensor {name} of the base contains NaN or infinity"
            yield Finding("error", "base tensor", what, name, "download or copy the base again")


def _modules(experts: MeasuredExperts) -> Iterator[Finding]:
    chosen = [experts.bank.experts[index] for index in experts.chosen]
    every = {name for expert in chosen for name in expert.adapter.modules}
    for expert in chosen:
        own = set(expert.adapter.modules)
        missing = sorted(every - own)
        others = {name for neighbor in chosen if neighbor is not expert for name in neighbor.adapter.modules}
        if alike := _alike(own, others):
            yield Finding(
                "warning",
                "modules",
                f"{expert.name} shares no module with the other experts, but {len(alike)} of its module names end "
                f"like theirs ({', '.join(alike[0])})",
                str(expert.folder),
                "check that all experts were trained on the same model class; if the base has both modules, no action "
                "is needed",
            )
        elif missing:
            more = ", ..." if len(missing) > _MAX_SHOWN else ""
            yield Finding(
                "note",
                "modules",
                f"{expert.name} does not adapt {len(missing)} of the modules that other experts adapt",
                ", ".join(missing[:_MAX_SHOWN]) + more,
                "no action is needed",
            )
        if expert.adapter.trained:
            origins = ", ".join(sorted({tensor.origin for tensor in expert.adapter.trained.values()}))
            yield Finding(
                "note",
                "trained whole",
                f"{expert.name} holds {len(expert.adapter.trained)} tensors in addition to its LoRA factors "
                f"({origins}); the doctor does not measure these tensors",
                str(expert.folder),
                "give the base when you merge this expert",
            )


def _alike(own: Set[str], others: Set[str]) -> list[tuple[str, str]]:
    """Return pairs of a module of one expert and a module of the others whose names have the same end.

    The end of a name starts at its first numbered layer. No pairs are returned if the expert shares a module with
    another expert.
    """
    if not own or not own.isdisjoint(others):
        return []
    tails = {_from_layer(name): name for name in sorted(others)}
    pairs = [(name, tails[_from_layer(name)]) for name in sorted(own) if _from_layer(name) in tails]
    return [pair for pair in pairs if "." in _from_layer(pair[0])]


def _from_layer(module: str) -> str:
    """Return the end of a module name from the first numbered layer on, such as `layers.0.mlp.up_proj`.

    Return the last component of the name if it has no numbered layer.
    """
    steps = module.split(".")
    start = next((index - 1 for index, step in enumerate(steps) if step.isdigit() and index), len(steps) - 1)
    return ".".join(steps[start:])


def _headers(experts: MeasuredExperts) -> Iterator[Finding]:
    chosen = [experts.bank.experts[index] for index in experts.chosen]
    rules: tuple[tuple[str, Callable[[Expert], set[str]], str], ...] = (
        (
            "rank",
            lambda expert: {f"{module.rank}" for module in expert.adapter.modules.values()},
            "no action is needed, unless the method sums A's and B's separately; such methods need equal ranks",
        ),
        (
            "scaling",
            lambda expert: {f"{module.scaling:g}" for module in expert.adapter.modules.values()},
            "no action is needed, unless the method is factor_average, which needs equal scalings",
        ),
        (
            "dtype",
            lambda expert: set(expert.adapter.dtypes),
            "no action is needed: the merged adapter has dtype float32 unless you give another dtype",
        ),
    )
    for kind, values_of, mend in rules:
        values = {expert.name: values_of(expert) for expert in chosen}
        if len(set(map(frozenset, values.values()))) > 1:
            listed = "; ".join(f"{name} has {', '.join(sorted(own))}" for name, own in values.items())
            yield Finding("note", kind, f"the experts differ in {kind}: {listed}", ", ".join(values), mend)


def _basis(experts: MeasuredExperts) -> Iterator[Finding]:
    if len(experts.chosen) < 2:
        return
    where = ", ".join(experts.name(index) for index in experts.chosen)
    if experts.shares_basis:
        yield Finding(
            "note",
            "shared basis",
            "all experts have the same A in every module, so their exact soup has the rank of one expert",
            where,
            "no action is needed",
        )
    elif any(len(set(experts.bank.basis(name))) < len(experts.bank.members(name)) for name in experts.bank.modules):
        yield Finding(
            "note",
            "partly shared basis",
            "some experts have the same A in some modules; a merge stacks the rows of a shared A only once",
            where,
            "no action is needed",
        )
