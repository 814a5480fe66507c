"""Who a row of a batch is for: profiles as they are given, and the weights that they have at a layer and at a step.

G rows of weights, E experts, S layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from numbers import Real
from typing import TypeAlias

import torch
from blake3 import blake3
from torch import Tensor

from personalized_soups.declare.profile import Profile, check_sides
from personalized_soups.errors import DeclarationError, UsageError, choose_from

# By layer: the first pattern (as of file names) that a layer's name matches says its weight; 0 where none does.
LayerWeights: TypeAlias = Mapping[str, float]
Weight: TypeAlias = float | LayerWeights
# Of the generated token's number: 0 is the first, whose weights the prompt is read with, too.
Schedule: TypeAlias = Callable[[int], Weight]
Weights: TypeAlias = Mapping[str, Weight | Schedule]
# A name is that of a profile that the model knows, or of one expert; None is the base alone.
Who: TypeAlias = "Profile | Weights | str | Row | None"

# float32 holds the gates; a weight of a user's is a handful.
_MAX_WEIGHT = 1e30


@dataclass(frozen=True, slots=True)
class Row:
    """The weights of one row of a batch, by expert; experts that it does not name have weight 0."""

    weights: Mapping[str, Weight | Schedule] = field(default_factory=dict)

    @property
    def is_scheduled(self) -> bool:
        """Whether a weight depends on the step."""
        return any(callable(weight) for weight in self.weights.values())

    def at(self, step: int) -> dict[str, Weight]:
        """Return the weights for the generated token number `step`.

        Raises:
            UsageError: if a schedule gives what is no weight.
        """
        return {
            name: checked_weight(weight(step), f"weights.{name} at step {step}") if callable(weight) else weight
            for name, weight in self.weights.items()
        }

    def scaled(self, scales: Mapping[str, float]) -> Row:
        """Return it with the weights of some experts multiplied."""
        if not scales.keys() & self.weights.keys():
            return self
        return Row({name: _times(weight, scales.get(name, 1.0)) for name, weight in self.weights.items()})

    def version(self, stamps: Mapping[str, int], model: str) -> str:
        """Return what a cache of keys and values of this row's prompt is known by: 32 hex digits.

        It changes with the weights that the prompt is read with (step 0), with the experts (`stamps`) and the model.
        """
        told = sorted((name, stamps[name], _told(weight)) for name, weight in self.at(0).items() if weight != 0)
        return blake3(repr((model, told)).encode()).hexdigest(length=16)

    def fitting(self, experts: Collection[str], layers: Sequence[str]) -> Row:
        """Return what is left of it with these experts and layers: patterns that match no layer are dropped."""
        kept: dict[str, Weight | Schedule] = {}
        for name, weight in self.weights.items():
            if name not in experts:
                continue
            if isinstance(weight, Mapping):
                weight = {pattern: value for pattern, value in weight.items() if _matches(pattern, layers)}  # noqa: PLW2901
            if weight != {}:
                kept[name] = weight
        return Row(kept)


def row_of(
    who: Who,
    experts: Sequence[str],
    profiles: Mapping[str, Row],
    dimension_of: Mapping[str, str],
    side_of: Mapping[str, str],
) -> Row:
    """Return the row that somebody is served by.

    Args:
        who: a profile, weights by expert, a name, a row that this function returned, or None.
        experts: that there are.
        profiles: the rows that names stand for.
        dimension_of, side_of: of the experts that have one, as `declare.profile.check_sides` takes them.

    Raises:
        DeclarationError: if it names an unknown expert or opposed sides, or a weight is no finite number.
        UsageError: if a name is unknown, or a profile asks for what is no mixture (another method, a lower rank).
    """
    if who is None:
        return Row()
    if isinstance(who, Row):
        _check_known(who.weights, experts, lambda name: f"weights.{name}")
        return who
    if isinstance(who, str):
        if who not in profiles and who in experts:
            return Row({who: 1.0})
        if who not in profiles:
            raise UsageError(
                f"nobody is called {who!r}: no profile and no expert",
                where="profiles",
                mend=choose_from(who, [*profiles, *experts]),
            )
        _check_known(profiles[who].weights, experts, lambda _: f"profile {who}")
        return profiles[who]
    if isinstance(who, Profile):
        _check_gated(who)
        _check_known(who.weights, experts, lambda name: who.place("weights", name))
        check_sides(who, dimension_of, side_of)
        resolved = who.resolved_weights()
        # by the experts' own strings: a model may know a million profiles
        return Row({name: resolved[name] for name in experts if name in resolved})
    if not isinstance(who, Mapping):
        raise UsageError(
            f"a {type(who).__name__} is no profile",
            where="profiles",
            mend='give a Profile, a dict of weights ({"friendly": 0.6}), a name, or None for the base alone',
        )
    _check_known(who, experts, lambda name: f"weights.{name}")
    row = Row(
        {
            name: weight if callable(weight) else checked_weight(weight, f"weights.{name}")
            for name, weight in who.items()
        }
    )
    sided = {name: 1.0 for name, weight in row.weights.items() if weight != 0}
    if sided:
        try:
            check_sides(Profile(weights=sided), dimension_of, side_of)
        except DeclarationError as fault:
            mend = "take one of them out, or give Profile(weights={...}, allow_opposed=True)"
            raise DeclarationError(fault.what, where=f"weights of {', '.join(sided)}", mend=mend) from None
    return row


def checked_weight(weight: Weight, where: str) -> Weight:
    """Return a weight, or weights by layer, as floats.

    Raises:
        DeclarationError: if it is no finite number.
    """
    if isinstance(weight, Mapping):
        return {pattern: checked_number(value, f"{where}[{pattern!r}]") for pattern, value in weight.items()}
    return checked_number(weight, where)


def checked_number(value: object, where: str) -> float:
    """Return a weight as a float.

    Raises:
        DeclarationError: if it is no finite number.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        what = f"the weight is {value!r}, which is no finite number"
    elif abs(number := float(value)) > _MAX_WEIGHT:
        what = f"the weight is {number!r}, beyond {_MAX_WEIGHT:g}"
    else:
        return number
    raise DeclarationError(what, where=where, mend="give a number such as 0.6")


def weight_table(
    rows: Sequence[Mapping[str, Weight]], experts: Sequence[str], layers: Sequence[str]
) -> tuple[Tensor, Tensor | None]:
    """Return weights_GE, float32 on the CPU, and layered_GSE where a weight differs between layers (else None).

    Raises:
        DeclarationError: if a pattern matches no layer.
    """
    table = [[weight if isinstance(weight := row.get(name, 0.0), float) else 0.0 for name in experts] for row in rows]
    weights_GE = torch.tensor(table, dtype=torch.float32).reshape(len(rows), len(experts))
    by_layer = [
        (at, experts.index(name), name, weight)
        for at, row in enumerate(rows)
        for name, weight in row.items()
        if isinstance(weight, Mapping)
    ]
    if not by_layer:
        return weights_GE, None
    layered_GSE = weights_GE[:, None, :].repeat(1, len(layers), 1)
    for at, expert, name, patterns in by_layer:
        layered_GSE[at, :, expert] = torch.tensor(_of_layers(patterns, layers, name), dtype=torch.float32)
    return weights_GE, layered_GSE


def _of_layers(patterns: LayerWeights, layers: Sequence[str], expert: str) -> list[float]:
    idle = [pattern for pattern in patterns if not _matches(pattern, layers)]
    if idle:
        raise DeclarationError(
            f"no layer that experts adapt is called {idle[0]!r}",
            where=f"weights.{expert}",
            mend=f"write patterns of names such as {layers[0]!r}: '*.mlp.*', '*.layers.0.*', '*'",
        )
    return [
        next((weight for pattern, weight in patterns.items() if fnmatchcase(layer, pattern)), 0.0) for layer in layers
    ]


def _check_known(names: Mapping[str, object], experts: Sequence[str], place: Callable[[str], str]) -> None:
    unknown = [name for name in names if name not in experts]
    if unknown:
        raise DeclarationError(
            f"no expert is called {', '.join(map(repr, unknown))}",
            where=place(unknown[0]),
            mend=choose_from(unknown[0], experts),
        )


def _check_gated(profile: Profile) -> None:
    if profile.method != "linear":
        raise UsageError(
            f"the profile asks for {profile.method}, a mixture is linear in the experts",
            where=profile.place("method"),
            mend="leave `method` out, or merge: psoups merge",
        )
    if profile.rank is not None:
        raise UsageError(
            f"the profile asks for rank {profile.rank}, a mixture is exact",
            where=profile.place("rank"),
            mend="leave `rank` out, or merge: psoups merge",
        )


def _times(weight: Weight | Schedule, scale: float) -> Weight | Schedule:
    if callable(weight):
        return lambda step: _scaled(weight(step), scale)
    return _scaled(weight, scale)


def _scaled(weight: Weight, scale: float) -> Weight:
    if isinstance(weight, Mapping):
        return {pattern: value * scale for pattern, value in weight.items()}
    return weight * scale


def _told(weight: Weight) -> str:
    # in their order: the first pattern that matches counts
    return repr(list(weight.items()) if isinstance(weight, Mapping) else weight)


def _matches(pattern: str, layers: Sequence[str]) -> bool:
    return any(fnmatchcase(layer, pattern) for layer in layers)
