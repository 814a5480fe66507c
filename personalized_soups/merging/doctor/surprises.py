"""What will surprise in a merge of experts that can be merged, by the numbers that were measured of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import combinations

from personalized_soups.adapters.library import Expert
from personalized_soups.bank.expert_bank import ExpertBank
from personalized_soups.merging.doctor.diagnosis import Finding, Pile
from personalized_soups.merging.doctor.measures import Measures

# How many times the median of the others an expert's norm is before it is said to dominate.
DOMINANT = 4.0
# The share of the base's norm from which a change is larger than any fine-tuning that is known to leave a model whole.
LARGE = 0.5
# The cosine above which two experts are one direction.
ALIGNED = 0.9
# The overlap of both the inputs' and the outputs' spaces above which two experts act on the same features.
OVERLAPPING = 0.5
# Signs of independent deltas differ in half of their energy.
OPPOSED = 0.6
# `|sum w d|` against its value for orthogonal experts: two equal experts pile up to 1.41 of it.
CANCELS, PILES_UP = 0.5, 1.25

_MAX_SHOWN = 8


@dataclass(frozen=True, eq=False, slots=True)
class Group:
    """Experts whose files are sound, with what was measured of them. Experts are told by their places in the bank.

    `weights` are None where there is no profile, `base_norms` (by the base's tensors) where there is no base.
    """

    bank: ExpertBank
    measures: Measures
    weights: tuple[float, ...] | None
    dimensions: Mapping[str, str]
    base_norms: Mapping[str, float] | None
    duplicates: frozenset[tuple[int, int]]

    @property
    def chosen(self) -> tuple[int, ...]:
        """The experts that take part: those with a weight, all where there is no profile."""
        every = range(len(self.bank.experts))
        return tuple(every) if self.weights is None else tuple(index for index in every if self.weights[index] != 0)

    @property
    def measured(self) -> tuple[int, ...]:
        """Those that take part and hold numbers alone."""
        return tuple(index for index in self.chosen if index not in self.measures.faults)

    @property
    def shares_basis(self) -> bool:
        """Whether all that take part have the same A in each module."""
        return ExpertBank([self.bank.experts[index] for index in self.chosen]).shares_basis

    @property
    def pile(self) -> Pile | None:
        """What the profile's experts add up to; None without a profile, or where not all can be measured."""
        if self.weights is None or len(self.measured) < max(len(self.chosen), 1):
            return None
        weights = [self.weights[index] for index in self.measured]
        products = self.measures.products.tolist()
        square = math.fsum(
            weights[i] * weights[j] * products[one][other]
            for i, one in enumerate(self.measured)
            for j, other in enumerate(self.measured)
        )
        parts = [self.part(index) for index in self.measured]
        return Pile(math.sqrt(max(square, 0.0)), math.hypot(*parts), math.fsum(parts))

    def name(self, index: int) -> str:
        """Return an expert's name."""
        return self.bank.experts[index].name

    def part(self, index: int) -> float:
        """Return the norm of what an expert adds to a soup: `|w d|`, `|d|` where there is no profile."""
        weight = 1.0 if self.weights is None else abs(self.weights[index])
        return weight * self.measures.norm(index)

    def relative(self, index: int) -> float | None:
        """Return `|d| / |W|` over the tensors that an expert changes; None where the base is not given or lacks one."""
        if self.base_norms is None or index in self.measures.faults:
            return None
        names = {each.base_name for each in self.bank.experts[index].adapter.modules.values()}
        if not names <= self.base_norms.keys():
            return None
        whole = math.hypot(*(self.base_norms[name] for name in names))
        return self.measures.norm(index) / whole if 0 < whole < math.inf else None

    def are_of_one_dimension(self, one: int, other: int) -> bool:
        """Return whether two experts are known to be sides of one dimension, which nobody weighs together."""
        first, second = (self.dimensions.get(self.name(index)) for index in (one, other))
        return first is not None and first == second


def surprises(group: Group) -> list[Finding]:
    """Return what will surprise in a merge of these experts, and what explains its shape."""
    if not group.chosen:
        return []
    rules: tuple[Callable[[Group], Iterator[Finding]], ...] = (
        _untrained,
        _norms,
        _pairs,
        _piles,
        _damaged_base,
        _modules,
        _headers,
        _basis,
    )
    return [finding for rule in rules for finding in rule(group)]


def _untrained(group: Group) -> Iterator[Finding]:
    for index in group.measured:
        if group.measures.norm(index) == 0:
            yield Finding(
                "warning",
                "untrained",
                f"{group.name(index)} changes nothing: every product B A is 0, as before training",
                str(group.bank.experts[index].folder),
                "train it, or leave it out",
            )


def _norms(group: Group) -> Iterator[Finding]:
    parts = {index: group.part(index) for index in group.measured}
    for index, part in parts.items():
        others = [other for place, other in parts.items() if place != index and other > 0]
        usual = statistics.median(others) if others else math.inf
        if part >= DOMINANT * usual:
            yield Finding(
                "warning",
                "norm",
                f"{group.name(index)} is {part / usual:.3g} times as large as the median of the others: it will "
                "dominate the soup",
                group.name(index),
                f"give it a weight of about {usual / part:.2g} times the others'",
            )
        relative = group.relative(index)
        if relative is not None and relative >= LARGE:
            yield Finding(
                "warning",
                "large",
                f"{group.name(index)} changes the base by {relative:.3g} of its norm",
                group.name(index),
                "look whether its training diverged, or give it a small weight",
            )


def _pairs(group: Group) -> Iterator[Finding]:
    for one, other in combinations(group.measured, 2):
        where = f"{group.name(one)}, {group.name(other)}"
        if (one, other) in group.duplicates:
            yield Finding(
                "warning",
                "duplicate",
                f"{group.name(one)} and {group.name(other)} are one expert: equal weight files, byte for byte",
                where,
                "leave one of them out",
            )
            continue
        yield from _of_directions(group, one, other, where)


def _of_directions(group: Group, one: int, other: int, where: str) -> Iterator[Finding]:
    measures, names = group.measures, f"{group.name(one)} and {group.name(other)}"
    cosine = measures.cosine(one, other)
    if cosine is None:
        return
    if abs(cosine) > ALIGNED:
        if not group.are_of_one_dimension(one, other):
            does = "their weights add up" if cosine > 0 else "equal weights cancel"
            yield Finding(
                "warning",
                "one direction",
                f"{names} lie along one direction (cosine {cosine:.3f}): {does}",
                where,
                "look whether they were trained on the same data, and weigh them as one",
            )
        return
    inputs, outputs = measures.inputs(one, other) or 0.0, measures.outputs(one, other) or 0.0
    if min(inputs, outputs) >= OVERLAPPING:
        yield Finding(
            "warning",
            "overlap",
            f"{names} read and write the same features: their spaces overlap by {inputs:.2f} (inputs) and "
            f"{outputs:.2f} (outputs)",
            where,
            "judge their soup, not each alone: one can undo the other",
        )
    opposed = measures.opposed(one, other) or 0.0
    if opposed >= OPPOSED:
        yield Finding(
            "warning",
            "signs",
            f"{names} have opposite signs in {opposed:.0%} of their energy (half is chance): they work against each "
            "other",
            where,
            "weigh one of them only, or take the method ties, which elects signs",
        )


def _piles(group: Group) -> Iterator[Finding]:
    pile = group.pile
    if pile is None or pile.orthogonal == 0:
        return
    ratio = pile.norm / pile.orthogonal
    told = f"|sum w d| is {pile.norm:.3g}, {pile.orthogonal:.3g} were they orthogonal, {pile.most:.3g} at most"
    if ratio < CANCELS:
        yield Finding("warning", "cancel", f"the weighted experts cancel: {told}", "weights", "look at their signs")
    elif ratio > PILES_UP:
        yield Finding(
            "warning", "pile up", f"the weighted experts pile up: {told}", "weights", "take smaller weights for them"
        )


def _damaged_base(group: Group) -> Iterator[Finding]:
    for name, norm in (group.base_norms or {}).items():
        if not math.isfinite(norm):
            yield Finding("error", "base tensor", f"{name}: the base holds NaN or infinity", name, "give a sound base")


def _modules(group: Group) -> Iterator[Finding]:
    experts = [group.bank.experts[index] for index in group.chosen]
    every = {name for expert in experts for name in expert.adapter.modules}
    for expert in experts:
        own = set(expert.adapter.modules)
        missing = sorted(every - own)
        others = {name for other in experts if other is not expert for name in other.adapter.modules}
        if alike := _alike(own, others):
            yield Finding(
                "warning",
                "modules",
                f"{expert.name} shares no module with the other experts, but {len(alike)} of its names end like theirs "
                f"({', '.join(alike[0])})",
                str(expert.folder),
                "check that they are modules of one base and of one class of it; a base that has both needs nothing",
            )
        elif missing:
            more = ", ..." if len(missing) > _MAX_SHOWN else ""
            yield Finding(
                "note",
                "modules",
                f"{expert.name} lacks {len(missing)} modules that others adapt: it adds nothing there",
                ", ".join(missing[:_MAX_SHOWN]) + more,
                "nothing need be done",
            )
        if expert.adapter.trained:
            yield Finding(
                "note",
                "trained whole",
                f"{expert.name} holds {len(expert.adapter.trained)} tensors beside its low-rank changes "
                f"({', '.join(sorted({each.origin for each in expert.adapter.trained.values()}))})",
                str(expert.folder),
                "give the base where these are merged; they are not measured here",
            )


def _alike(own: Set[str], others: Set[str]) -> list[tuple[str, str]]:
    """Return the names of modules that end like another expert's from the first numbered layer on, with that name.

    Empty where the expert has a module that another one has.
    """
    if not own or not own.isdisjoint(others):
        return []
    tails = {_from_layer(name): name for name in sorted(others)}
    found = [(name, tails[_from_layer(name)]) for name in sorted(own) if _from_layer(name) in tails]
    return [pair for pair in found if "." in _from_layer(pair[0])]


def _from_layer(module: str) -> str:
    """Return the end of a name from its first numbered layer on: `layers.0.mlp.up_proj`; its last step without one."""
    steps = module.split(".")
    start = next((place - 1 for place, step in enumerate(steps) if step.isdigit() and place), len(steps) - 1)
    return ".".join(steps[start:])


def _headers(group: Group) -> Iterator[Finding]:
    experts = [group.bank.experts[index] for index in group.chosen]
    rules: tuple[tuple[str, Callable[[Expert], set[str]], str], ...] = (
        (
            "rank",
            lambda expert: {f"{each.rank}" for each in expert.adapter.modules.values()},
            "nothing need be done, but for the methods that sum A's and B's apart: they need one rank",
        ),
        (
            "scaling",
            lambda expert: {f"{each.scaling:g}" for each in expert.adapter.modules.values()},
            "nothing need be done: the scaling counts as trained; factor_average needs one for all",
        ),
        (
            "dtype",
            lambda expert: set(expert.adapter.dtypes),
            "nothing need be done: the merged adapter is float32, or the dtype that the merge is given",
        ),
    )
    for what, of, mend in rules:
        values = {expert.name: of(expert) for expert in experts}
        if len(set(map(frozenset, values.values()))) > 1:
            told = "; ".join(f"{name} has {', '.join(sorted(own))}" for name, own in values.items())
            yield Finding("note", what, f"the experts differ in {what}: {told}", ", ".join(values), mend)


def _basis(group: Group) -> Iterator[Finding]:
    if len(group.chosen) < 2:
        return
    where = ", ".join(group.name(index) for index in group.chosen)
    if group.shares_basis:
        yield Finding(
            "note",
            "shared basis",
            "all experts have the same A in every module: they merge exactly at their own rank",
            where,
            "nothing need be done",
        )
    elif any(len(set(group.bank.basis(name))) < len(group.bank.members(name)) for name in group.bank.modules):
        yield Finding(
            "note",
            "partly shared basis",
            "some experts have the same A in some modules: a merge takes those rows once",
            where,
            "nothing need be done",
        )
