"""The weights of one request: checked once, then passed by reference from the resolver to the gates."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from numbers import Real
from typing import TypeAlias

from blake3 import blake3

from personalized_soups.declare.profile import MAX_WEIGHT, Profile
from personalized_soups.errors import DeclarationError

# A weight for each layer: file-name patterns of layer names. The first pattern that matches a layer gives its weight; a
# layer that no pattern matches gets 0.
LayerWeights: TypeAlias = Mapping[str, float]
Weight: TypeAlias = float | LayerWeights
# A weight for each generated token, by its number. The prompt is read with the weight for token 0.
Schedule: TypeAlias = Callable[[int], Weight]
Weights: TypeAlias = Mapping[str, Weight | Schedule]
# Everything that names a mixture: a profile, weights by expert, the name of a profile or of one expert, weights that
# were resolved already, or None for the base alone.
ProfileLike: TypeAlias = "Profile | Weights | str | ExpertWeights | None"


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """Checked mixing weights, by expert; an expert that is not named has weight 0.

    Attributes:
        weights: the weight of each expert: a number, numbers by layer, or a function of the generated token's number.
        version: the set of experts whose names these weights were checked against; None if they were not checked.

    Example:
        >>> ExpertWeights.of(Profile(weights={"friendly": 3.0, "concise": 1.0}, normalize="sum")).weights
        {'friendly': 0.75, 'concise': 0.25}
    """

    weights: Mapping[str, Weight | Schedule] = field(default_factory=dict)
    version: int | None = field(default=None, compare=False)

    @classmethod
    def of(cls, profile: Profile, experts: Sequence[str] | None = None, version: int | None = None) -> ExpertWeights:
        """Return the weights of a profile as they enter a merge: divided by their sum where the profile says so.

        Args:
            profile: the profile, whose names are checked already.
            experts: all experts. The weights then have their order and use their string objects, so that a million
                profiles share the strings.
            version: of the set of experts.
        """
        resolved = profile.resolved_weights()
        if experts is not None:
            resolved = {name: resolved[name] for name in experts if name in resolved}
        return cls(resolved, version)

    @property
    def is_scheduled(self) -> bool:
        """Whether a weight depends on the generated token's number."""
        return any(callable(weight) for weight in self.weights.values())

    def at(self, step: int) -> dict[str, Weight]:
        """Return the weights for the generated token with the number `step`.

        Raises:
            DeclarationError: if a schedule returns something other than a weight.
        """
        return {
            name: checked_weight(weight(step), f"weights.{name} at step {step}") if callable(weight) else weight
            for name, weight in self.weights.items()
        }

    def scaled(self, scales: Mapping[str, float]) -> ExpertWeights:
        """Return a copy with the weights of some experts multiplied."""
        if not scales.keys() & self.weights.keys():
            return self
        scaled = {name: _times(weight, scales.get(name, 1.0)) for name, weight in self.weights.items()}
        return ExpertWeights(scaled, self.version)

    def cache_key(self, stamps: Mapping[str, int], model: str) -> str:
        """Return the key under which the keys and values of a prompt may be cached: 32 hex digits.

        The key changes with the weights that the prompt is read with (step 0), with the experts' files (`stamps`) and
        with the model.
        """
        content = sorted((name, stamps[name], _content(weight)) for name, weight in self.at(0).items() if weight != 0)
        return blake3(repr((model, content)).encode()).hexdigest(length=16)

    def restricted(self, experts: Collection[str], layers: Sequence[str]) -> ExpertWeights:
        """Return a copy without the experts, and without the layer patterns, that match nothing."""
        kept: dict[str, Weight | Schedule] = {}
        for name, weight in self.weights.items():
            if name not in experts:
                continue
            if isinstance(weight, Mapping):
                weight = {pattern: value for pattern, value in weight.items() if matches(pattern, layers)}  # noqa: PLW2901
            if weight != {}:
                kept[name] = weight
        return ExpertWeights(kept)


def checked_weight(weight: Weight, where: str) -> Weight:
    """Return a weight, or weights by layer, as floats.

    Raises:
        DeclarationError: if a weight is not a finite number.
    """
    if isinstance(weight, Mapping):
        return {pattern: checked_number(value, f"{where}[{pattern!r}]") for pattern, value in weight.items()}
    return checked_number(weight, where)


def checked_number(value: object, where: str) -> float:
    """Return a weight as a float.

    Raises:
        DeclarationError: if the value is not a finite number, or beyond `MAX_WEIGHT`.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        what = f"the weight {value!r} is not a finite number"
    elif abs(number := float(value)) > MAX_WEIGHT:
        what = f"the weight is {number!r}, but it must be between -{MAX_WEIGHT:g} and {MAX_WEIGHT:g}"
    else:
        return number
    raise DeclarationError(what, where=where, mend="give a number such as 0.6")


def matches(pattern: str, layers: Sequence[str]) -> bool:
    """Return whether a file-name pattern matches the name of at least one layer."""
    return any(fnmatchcase(layer, pattern) for layer in layers)


def _times(weight: Weight | Schedule, scale: float) -> Weight | Schedule:
    if callable(weight):
        return lambda step: _times_number(weight(step), scale)
    return _times_number(weight, scale)


def _times_number(weight: Weight, scale: float) -> Weight:
    if isinstance(weight, Mapping):
        return {pattern: value * scale for pattern, value in weight.items()}
    return weight * scale


def _content(weight: Weight) -> str:
    # The order of the patterns counts: the first one that matches a layer gives its weight.
    return repr(list(weight.items()) if isinstance(weight, Mapping) else weight)
